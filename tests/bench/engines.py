"""Tokens per second of the engines, drawing and scoring: `python tests/bench/engines.py`.

All in one run, engine after engine on the same work: with the embedded teacher, and with a random Qwen3 of about 40
million parameters over a vocabulary of 151,936. A call of the same shape goes before each measurement, so that neither
start nor compilation is in it; of three measurements the median counts. Tokens drawn are counted, and of scoring those
of the responses. The random model draws no end of sequence on its own account, so all its responses are of full length.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opdctl.artifacts.records import sample_seed
from opdctl.engines.base import Engine, EngineContext, Request, ScoreRequest
from opdctl.environment import resolve_device
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Model, Sampling, Score
from opdctl.registry import ENGINES

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 3


def random_qwen3(folder: Path, vocab_size: int) -> Path:
    """Write a Qwen3 of random weights, one matrix for input and output, and a tokenizer of as many ids."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=240,
        intermediate_size=720,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = {f"w{index}": index for index in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)
    return folder


def measure(call: Callable[[], int]) -> float:
    """Return tokens per second: the median of some calls after one that is not counted."""
    call()
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        tokens = call()
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def rates(
    engine: Engine, requests: list[Request], answered: list[ScoreRequest], sampling: Sampling
) -> dict[str, float]:
    def draw() -> int:
        completions = engine.generate(requests, sampling, len(requests), lambda n: None)
        return sum(len(completion.response_ids) for completion in completions)

    def score() -> int:
        return sum(len(each.logprobs) for each in engine.score(answered, Score(), lambda n: None))

    return {"generate": measure(draw), "score": measure(score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], help="the first is the reference")
    parser.add_argument("--models", nargs="+", choices=["toy:teacher", "Qwen3"], default=["toy:teacher", "Qwen3"])
    parser.add_argument("--responses", type=int, default=32, help="in work at once")
    parser.add_argument("--tokens", type=int, default=32, help="of a response, at most")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampling, device = Sampling(max_tokens=args.tokens), resolve_device(args.device)
    sizes = [f"rollout.max_tokens={args.tokens}", f"eval.max_tokens={args.tokens}"]
    recipe = load_recipe([ROOT / "recipes" / "quickstart.toml"], sizes)
    print("| model | work | " + " | ".join(args.engines) + " | ratio |")
    print("|---|---|" + "---:|" * len(args.engines) + "---:|")
    with tempfile.TemporaryDirectory() as folder:
        paths = {"toy:teacher": find_or_download(Model(model="toy:teacher"), "model"), "Qwen3": Path(folder) / "qwen3"}
        random_qwen3(paths["Qwen3"], args.vocab)
        for name, path in paths.items():
            if name not in args.models:
                continue
            model, rng = ModelDir(path, "float32"), np.random.default_rng(0)
            prompts = [rng.integers(2, 28, 13).astype(np.int32) for _ in range(args.responses)]
            requests = [Request(prompt, sample_seed(0, str(index))) for index, prompt in enumerate(prompts)]
            responses = rng.integers(2, model.vocab_size, (args.responses, args.tokens)).astype(np.int32)
            answered = [ScoreRequest(p, response) for p, response in zip(prompts, responses, strict=True)]
            found = {}
            for kind in args.engines:
                print(f"{name}: {kind}", file=sys.stderr, flush=True)
                engine = ENGINES.get(kind)(model, EngineContext(recipe, recipe.student, device))
                found[kind] = rates(engine, requests, answered, sampling)
                engine.close()
            label = f"{name}, {model.parameters() / 1e6:.3g} M parameters, vocabulary {model.vocab_size:,}"
            for work in ("generate", "score"):
                each = [found[kind][work] for kind in args.engines]
                cells = [f"{rate:,.0f}" for rate in each] + [f"{each[-1] / each[0]:.2f}"]
                print(f"| {label} | {work} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
