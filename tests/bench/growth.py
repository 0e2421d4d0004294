"""How an update grows, by response length and by batch: `python tests/bench/growth.py --out DIR`.

A random Qwen3 is updated on random responses, at one budget of tokens a micro-batch. Each point has a process of its
own. Memory is the process's peak; what it takes before any work is drawn as a line.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against_trl import make_models
from matplotlib import pyplot as plt

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores
from opdctl.recipe.load import load_recipe
from opdctl.runs.open import open_run
from opdctl.training.trainer import Trainer

LENGTHS, BATCHES = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32, 64)
PROMPT = 16


def scored(index: int, length: int, vocab: int) -> ScoredResponse:
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


def measure(batch: int, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Return seconds of the second update, and the process's memory before the first and at its peak, in GiB."""
    torch.set_num_threads(args.threads)
    (args.models / "prompts.jsonl").write_text('{"prompt": "t5"}\n')
    settings = {
        "name": "growth",
        "student.model": str(args.models / "student"),
        "student.dtype": "float32",
        "teacher.model": str(args.models / "teacher"),
        "prompts.source": str(args.models / "prompts.jsonl"),
        "rollout.engine": "transformers",
        "rollout.prompts_per_step": 1,
        "rollout.num_parts": 1,
        "score.engine": "transformers",
        "train.steps": 1,
        "train.tokens_per_micro_batch": args.budget,
        "train.gradient_checkpointing": True,
    }
    recipe = load_recipe([], [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(open_run(recipe, Path(folder) / "run"), "cpu")
        samples = [scored(index, length, args.vocab) for index in range(batch)]
        before = _peak()
        trainer._update(0, trainer.make_micro_batches(0, samples[:1]))
        start = time.perf_counter()
        trainer._update(0, trainer.make_micro_batches(0, samples))
    return {"seconds": time.perf_counter() - start, "before": before, "peak": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _worker(batch: int, length: int, args: argparse.Namespace, results: Any) -> None:
    results.put(measure(batch, length, args))


def in_a_process(batch: int, length: int, args: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_worker, args=(batch, length, args, results))
    process.start()
    found: dict[str, float] = results.get()
    process.join()
    return found


def draw(points: dict[str, list[tuple[int, dict[str, float]]]], file: Path) -> None:
    """Draw seconds and memory, by length on the left and by batch on the right, on axes that both begin at zero."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row", constrained_layout=True)
    for column, (label, found) in enumerate(points.items()):
        xs = [x for x, _ in found]
        axes[0][column].plot(xs, [each["seconds"] for _, each in found], "o-")
        axes[1][column].plot(xs, [each["peak"] for _, each in found], "o-", label="peak")
        axes[1][column].plot(xs, [each["before"] for _, each in found], "--", color="gray", label="before the work")
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--budget", type=int, default=4160)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        args.models = Path(folder)
        make_models(args.models, args.vocab)
        points: dict[str, list[tuple[int, dict[str, float]]]] = {
            "response length, tokens (batch 8)": [(n, in_a_process(8, n, args)) for n in LENGTHS],
            "batch, responses of 256 tokens": [(n, in_a_process(n, 256, args)) for n in BATCHES],
        }
    for label, found in points.items():
        print(f"| {label} | seconds | tokens a second | peak GiB |\n|---|---|---|---|")
        for x, each in found:
            tokens = 8 * x if "length" in label else 256 * x
            print(f"| {x} | {each['seconds']:.2f} | {tokens / each['seconds']:,.0f} | {each['peak']:.2f} |")
    draw(points, args.out / "growth.png")


if __name__ == "__main__":
    main()
