"""Time and memory of an update by response length and by batch size: `python tests/bench/growth.py --out DIR`.

A random Qwen3 is updated on random responses, with a fixed number of tokens per micro-batch. Each point is measured in
a separate process. Memory is the peak resident memory; the memory before the update is a dashed line.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against_trl import make_models
from matplotlib import pyplot as plt
from processes import peak_bytes, run_in_new_process

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe
from opdctl.runs.open import open_run
from opdctl.training.trainer import Trainer

PROMPT = 16


def random_response(index: int, length: int, vocab: int) -> ScoredResponse:
    rng = np.random.default_rng(index)
    response = Response(
        sample_id=f"r{index}",
        prompt_id=str(index),
        prompt_ids=rng.integers(3, vocab, PROMPT).astype(np.int32),
        response_ids=rng.integers(3, vocab, length).astype(np.int32),
        logprobs=rng.normal(-9, 1, length).astype(np.float32),
        finish_reason="length",
        policy_version=0,
        source="bench",
        teacher="teacher",
        answer=None,
    )
    return ScoredResponse(response, TokenScores(rng.normal(-9, 1, length).astype(np.float32)), None)


def make_recipe(name: str, models: Path, budget: int, **train: Any) -> Recipe:
    """Return the recipe of one update. budget: tokens of a micro-batch. train: further settings of that section."""
    (models / "prompts.jsonl").write_text('{"prompt": "t5"}\n')
    settings = {
        "name": name,
        "student.model": str(models / "student"),
        "student.dtype": "float32",
        "teacher.model": str(models / "teacher"),
        "prompts.source": str(models / "prompts.jsonl"),
        "rollout.engine": "transformers",
        "rollout.prompts_per_step": 1,
        "rollout.num_parts": 1,
        "score.engine": "transformers",
        "train.steps": 1,
        "train.tokens_per_micro_batch": budget,
        "train.gradient_checkpointing": True,
    }
    settings |= {f"train.{key}": value for key, value in train.items()}
    return load_recipe([], [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def measure(batch: int, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of the second update, and the memory in GiB before the first one and at the peak."""
    torch.set_num_threads(args.threads)
    recipe = make_recipe("growth", args.models, args.budget)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(open_run(recipe, Path(folder) / "run"), "cpu")
        samples = [random_response(index, length, args.vocab) for index in range(batch)]
        before = peak_bytes() / 2**30
        trainer._update(0, trainer.make_micro_batches(0, samples[:1]))
        start = time.perf_counter()
        trainer._update(0, trainer.make_micro_batches(0, samples))
    return {"seconds": time.perf_counter() - start, "before": before, "peak": peak_bytes() / 2**30}


def draw(points: dict[str, list[tuple[int, dict[str, float]]]], file: Path) -> None:
    """Draw seconds and memory, by length on the left and by batch size on the right; all axes start at zero."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row", constrained_layout=True)
    for column, (label, measurements) in enumerate(points.items()):
        xs = [x for x, _ in measurements]
        axes[0][column].plot(xs, [m["seconds"] for _, m in measurements], "o-")
        axes[1][column].plot(xs, [m["peak"] for _, m in measurements], "o-", label="peak")
        axes[1][column].plot(xs, [m["before"] for _, m in measurements], "--", color="gray", label="before the work")
        axes[1][column].set_xlabel(label)
        axes[0][column].set_xlim(left=0)
    axes[0][0].set_ylabel("seconds an update")
    axes[1][0].set_ylabel("resident memory, GiB")
    for axis in (axes[0][0], axes[1][0]):
        axis.set_ylim(bottom=0)
    axes[1][0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of growth.png")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=4160, help="tokens of a micro-batch")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        args.models = Path(folder)
        make_models(args.models, args.vocab)
        points: dict[str, list[tuple[int, dict[str, float]]]] = {
            "response length, tokens (batch 8)": [(n, run_in_new_process(measure, 8, n, args)) for n in args.lengths],
            "batch, responses of 256 tokens": [(n, run_in_new_process(measure, n, 256, args)) for n in args.batches],
        }
    for label, measurements in points.items():
        print(f"| {label} | seconds | tokens per second | peak GiB |\n|---|---|---|---|")
        for x, each in measurements:
            tokens = 8 * x if "length" in label else 256 * x
            print(f"| {x} | {each['seconds']:.2f} | {tokens / each['seconds']:,.0f} | {each['peak']:.2f} |")
    draw(points, args.out / "growth.png")


if __name__ == "__main__":
    main()
