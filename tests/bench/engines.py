"""Tokens per second of the engines, for generating and scoring: `python tests/bench/engines.py`.

All engines run in one process on the same work: with the toy teacher, and with a random Qwen3 of about 40 million
parameters and a vocabulary of 151,936. A call of the same shape precedes each measurement, so start and compilation are
not included; the result is the median of three measurements. Generated tokens are counted, and for scoring those of the
responses. The random model practically never samples an end of sequence, so its responses have the full length.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import qwen3
import torch

from opdctl.artifacts.records import sample_seed
from opdctl.engines.base import Engine, EngineContext, Request, ScoreRequest
from opdctl.environment import resolve_device
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Model, ModelShape, Sampling, Score
from opdctl.registry import ENGINES

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
ROUNDS = 3


def qwen3_shape(vocab_size: int) -> ModelShape:
    return ModelShape(
        num_hidden_layers=6,
        hidden_size=240,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=720,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
    )


def measure(call: Callable[[], int]) -> float:
    """Return tokens per second: the median over several calls, after a first one for warm-up."""
    call()
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        tokens = call()
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def measure_engine(
    engine: Engine, requests: list[Request], score_requests: list[ScoreRequest], sampling: Sampling
) -> dict[str, float]:
    """Return the tokens per second of generating and of scoring."""

    def generate() -> int:
        completions = engine.generate(requests, sampling, len(requests), lambda n: None)
        return sum(len(completion.response_ids) for completion in completions)

    def score() -> int:
        return sum(len(scores.logprobs) for scores in engine.score(score_requests, Score(), lambda n: None))

    return {"generate": measure(generate), "score": measure(score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], help="the first is the reference")
    parser.add_argument("--models", nargs="+", choices=["toy:teacher", "Qwen3"], default=["toy:teacher", "Qwen3"])
    parser.add_argument("--responses", type=int, default=32, help="responses of a batch")
    parser.add_argument("--tokens", type=int, default=32, help="maximum length of a response")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampling, device = Sampling(max_tokens=args.tokens), resolve_device(args.device)
    recipe = load_recipe([RECIPE], [f"rollout.max_tokens={args.tokens}", f"eval.max_tokens={args.tokens}"])
    print("| model | task | " + " | ".join(args.engines) + " | ratio |")
    print("|---|---|" + "---:|" * len(args.engines) + "---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            if name == "Qwen3":
                path = qwen3.save_model(qwen3_shape(args.vocab), Path(folder) / "qwen3")
            else:
                path = find_or_download(Model(model=name), "model")
            model, rng = ModelDir(path, "float32"), np.random.default_rng(0)
            prompts = [rng.integers(2, 28, 13).astype(np.int32) for _ in range(args.responses)]
            requests = [Request(prompt, sample_seed(0, str(index))) for index, prompt in enumerate(prompts)]
            responses = rng.integers(2, model.vocab_size, (args.responses, args.tokens)).astype(np.int32)
            score_requests = [ScoreRequest(prompt, ids) for prompt, ids in zip(prompts, responses, strict=True)]
            rates = {}
            for engine_name in args.engines:
                print(f"{name}: {engine_name}", file=sys.stderr, flush=True)
                engine = ENGINES.get(engine_name)(model, EngineContext(recipe, recipe.student, device))
                rates[engine_name] = measure_engine(engine, requests, score_requests, sampling)
                engine.close()
            label = f"{name}, {model.parameters() / 1e6:.3g} M parameters, vocabulary {model.vocab_size:,}"
            for task in ("generate", "score"):
                values = [rates[engine_name][task] for engine_name in args.engines]
                cells = [f"{rate:,.0f}" for rate in values] + [f"{values[-1] / values[0]:.2f}"]
                print(f"| {label} | {task} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
