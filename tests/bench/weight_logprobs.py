"""Weights by the log-probs of a bfloat16 engine and by the trainer's: `python tests/bench/weight_logprobs.py`.

One step is sampled and scored in bfloat16, with the toy models or with a random Qwen3 (`--model qwen3`), by
transformers or `--engine vllm`. The script prints the difference of the student's log-probs between engine and trainer,
that of the token weights, and that of the gradient. `--noise` adds normal noise of this RMS, in nats, to the stored
log-probs, as a stand-in for an engine with more rounding.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from qwen3 import save_model
from torch import Tensor

from opdctl.artifacts.records import Logprobs, ScoredResponse
from opdctl.engines.pool import open_engine_pool
from opdctl.losses.token_weights import Weight, build_weight, weigh
from opdctl.pipeline import rollout, score
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import ModelShape
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs
from opdctl.training.microbatches import make_micro_batches
from opdctl.training.trainer import Trainer

WEIGHTS = {
    "iw_opd": {},
    "iw_opd signed": {"signed": True},
    "prefix_ratio 0.001": {"alpha": 0.001},
    "prefix_ratio 0.01": {"alpha": 0.01},
    "prefix_ratio 0.1": {"alpha": 0.1},
}
SHAPE = ModelShape(
    num_hidden_layers=12,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=8192,
    tie_word_embeddings=True,
)


def make_run(folder: Path, args: argparse.Namespace) -> Run:
    """Return a run whose first step is sampled and scored."""
    models = {"student": "toy:student", "teacher": "toy:teacher"}
    source = {"prompts.source": "toy:sort12", "prompts.limit": args.responses}
    if args.model == "qwen3":
        models = {name: str(save_model(SHAPE, folder / name)) for name in models}
        perturb(Path(models["student"]))
        rows = [json.dumps({"prompt": f"w{index + 2} w5"}) for index in range(args.responses)]
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        source = {"prompts.source": str(folder / "prompts.jsonl")}
    settings = source | {
        "name": "weight_logprobs",
        "rollout.engine": args.engine,
        "rollout.prompts_per_step": args.responses,
        "rollout.max_tokens": args.length,
        "rollout.num_parts": 1,
        "score.engine": "transformers",
        "train.steps": 1,
        "pipeline.threads": args.threads,
        "vllm.enforce_eager": True,
    }
    settings |= {f"{name}.model": model for name, model in models.items()}
    settings |= {f"{name}.dtype": "bfloat16" for name in models}
    recipe = load_recipe([], [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    run = open_run(recipe, folder / "run")
    with open_engine_pool(run.recipe, "cpu") as engines:
        rollout.run_rollout(run, 0, engines)
        score.run_scoring(run, 0, engines)
    return run


def perturb(folder: Path) -> None:
    """Make the student another model than the teacher: with a tenth of random noise on each matrix."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def gradient(run: Run, samples: list[ScoredResponse], weight: Weight, own: Mapping[str, Logprobs] | None) -> Tensor:
    """Return the gradient of the step, concatenated; in float32: bfloat16 rounds it by more than the weights do."""
    student = run.recipe.student.model_copy(update={"dtype": "float32"})
    trainer = Trainer(dataclasses.replace(run, recipe=run.recipe.model_copy(update={"student": student})), "cpu")
    for batch in make_micro_batches(run.recipe, 0, samples, weight, "cpu", own):
        trainer._backward(dataclasses.replace(batch, old_logp_N=None))
    return torch.cat([p.grad.flatten() for p in trainer._model.parameters() if p.grad is not None])


def add_noise(samples: Sequence[ScoredResponse], rms: float) -> list[ScoredResponse]:
    generator = np.random.default_rng(0)
    noisy = []
    for sample in samples:
        logprobs = sample.response.logprobs
        logprobs = (logprobs + generator.normal(0, rms, len(logprobs))).astype(np.float32)
        noisy.append(dataclasses.replace(sample, response=dataclasses.replace(sample.response, logprobs=logprobs)))
    return noisy


def measure(run: Run, samples: list[ScoredResponse]) -> None:
    trainer = Trainer(run, "cpu")
    own = trainer._old_logprobs(0, samples)
    pairs = [(sample.response.logprobs, own[sample.response.sample_id]) for sample in samples]
    difference = np.concatenate([engine - trained for engine, trained in pairs]).astype(np.float64)
    advantage = np.concatenate([s.teacher.logprobs - trained for s, (_, trained) in zip(samples, pairs, strict=True)])
    rms = float(np.sqrt(np.mean(difference**2)))
    print(
        f"{len(samples)} responses, {len(difference)} tokens: log-probs differ by {rms:.2g} nats RMS, "
        f"{np.abs(difference).max():.2g} at most; mean |A| {np.abs(advantage).mean():.2g}"
    )
    print("| weight | mean | mean difference | greatest difference | gradient: cosine | relative difference |")
    print("|---|---|---|---|---|---|")
    for label, params in WEIGHTS.items():
        weight = build_weight(label.split()[0], params)
        stored, trained = (
            np.concatenate(
                weigh(weight, [to_weight_inputs(s, 0, logp) for s, logp in zip(samples, logps, strict=True)])
            )
            for logps in zip(*pairs, strict=True)
        )
        apart = np.abs(stored - trained)
        first, second = (gradient(run, samples, weight, logps) for logps in (None, own))
        cosine = float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))
        relative = float((first - second).norm() / second.norm())
        print(
            f"| {label} | {trained.mean():.3f} | {apart.mean():.1e} | {apart.max():.1e} "
            f"| 1 - {1 - cosine:.1e} | {relative:.1e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["toy", "qwen3"], default="toy")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="maximum length of a response in tokens")
    parser.add_argument("--noise", type=float, default=0.0, help="RMS of noise on the stored log-probs, in nats")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), args)
        samples = list(read_scored(run, 0))
        measure(run, add_noise(samples, args.noise) if args.noise else samples)


if __name__ == "__main__":
    main()
