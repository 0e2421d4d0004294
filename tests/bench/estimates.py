"""What `--dry-run` estimates against what is measured: `python tests/bench/estimates.py`.

A random Qwen3 goes through the real trainer and the real engines on the CPU, each work in a process of its own, with
responses at their limit, so that bounds and figures can be the same. Memory: the process's peak resident set above
what it held before the model was loaded, arrays of a MiB and more given back as they are freed. Products: FLOPs of all
matrix products, counted by torch while they run, and estimated without attention, which torch does not count on a CPU.
Time: CPU seconds, beside those of one large product of as many FLOPs in the same process; their ratio is the
utilisation that was reached. Of drawing, whose bound is the reading of weights, no product is large.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import qwen3
import torch
from growth import scored
from torch.utils.flop_counter import FlopCounterMode

from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.pool import open_engine_pool
from opdctl.engines.transformers import TransformersEngine
from opdctl.pipeline import costs, rollout, score
from opdctl.pipeline.plan import make_plan
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import ModelShape, Recipe, Score
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.training.trainer import Trainer

PROMPT = 16
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **named: 2 * a[0] * a[1] * b[1]}  # not in torch's own list
SHAPE = ModelShape(
    layers=6, hidden=256, heads=4, kv_heads=2, head_size=64, feed_forward=768, vocabulary=16_384, tied=True
)
WORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "update": ("update", {}),
    "update, activations recomputed": ("update", {"train.gradient_checkpointing": True}),
    "update, bfloat16": ("update", {"student.dtype": "bfloat16"}),
    "update, LoRA": ("update", {"lora.rank": 16}),
    "update, whole vocabulary": ("update", {"objective.name": "reverse_kl", "objective.support": "full"}),
    "score": ("score", {}),
    "rollout": ("rollout", {"rollout.prompts_per_step": 64}),
}


@dataclass(frozen=True)
class Measured:
    """Bytes, FLOPs of products, and CPU seconds of the work and of one product of as many FLOPs."""

    bytes: int
    flops: int
    seconds: float
    bare_seconds: float


def recipe_of(models: Path, args: argparse.Namespace, settings: dict[str, Any]) -> Recipe:
    given = {
        "name": "estimates",
        "student.model": str(models / "model"),
        "student.dtype": "float32",
        "teacher.model": str(models / "model"),
        "teacher.dtype": "float32",
        "prompts.source": str(models / "prompts.jsonl"),
        "prompts.max_tokens": PROMPT,
        "rollout.engine": "transformers",
        "rollout.prompts_per_step": args.batch,
        "rollout.max_tokens": args.length - PROMPT,
        "rollout.num_parts": 1,
        "score.engine": "transformers",
        "score.tokens_per_batch": args.batch * args.length,
        "train.steps": 1,
        "train.tokens_per_micro_batch": args.batch * args.length,
    }
    return load_recipe([], [f"{key}={json.dumps(value)}" for key, value in (given | settings).items()])


def work_of(run: Run, work: str) -> Callable[[], object]:
    """Load what a work needs, and return it as a function."""
    recipe = run.recipe
    samples = [
        scored(index, recipe.rollout.max_tokens, SHAPE.vocabulary) for index in range(recipe.responses_per_step())
    ]
    if work == "update":
        if recipe.score.hidden_states:
            hidden_TD = (
                np.random.default_rng(0).normal(size=(recipe.rollout.max_tokens, SHAPE.hidden)).astype(np.float32)
            )
            for sample in samples:
                object.__setattr__(sample.teacher, "hidden_states", lambda: hidden_TD)
        trainer = Trainer(run, "cpu")
        return lambda: trainer._update(0, trainer.make_micro_batches(0, samples))
    engine = TransformersEngine(run.student, "cpu")
    prompts = [sample.response.prompt_ids for sample in samples]
    if work == "rollout":
        requests = [Request(prompt, index) for index, prompt in enumerate(prompts)]
        return lambda: engine.generate(requests, recipe.rollout, len(requests), lambda n: None)
    answered = [ScoreRequest(sample.response.prompt_ids, sample.response.response_ids) for sample in samples]
    settings = Score(tokens_per_batch=recipe.score.tokens_per_batch)
    return lambda: engine.score(answered, settings, lambda n: None)


def measure(work: str, recipe: Recipe) -> Measured:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(recipe, Path(folder) / "run")
        before = _resident("VmRSS")
        do = work_of(run, work)
        do()  # from the second update on there are gradients and moments
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again: loading is not the work
        start = time.process_time()
        do()
        seconds = time.process_time() - start
        peak = _resident("VmHWM") - before
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
            do()
    flops = counted.get_total_flops()
    return Measured(peak, flops, seconds, _bare(flops, recipe.student.dtype))


def _resident(what: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024


def _bare(flops: int, dtype: str) -> float:
    """Return the CPU seconds of large products of so many FLOPs."""
    matrix = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    matrix @ matrix
    start = time.process_time()
    for _ in range(4):
        matrix @ matrix
    return (time.process_time() - start) * flops / (4 * 2 * 2048**3)


def estimate(work: str, recipe: Recipe) -> tuple[int, float]:
    """Return the bytes that `--dry-run` counts, and the FLOPs of products without attention."""
    stage = {
        "update": lambda: costs.update_cost(recipe, SHAPE, SHAPE),
        "score": lambda: costs.score_cost(recipe, SHAPE, recipe.student.dtype),
        "rollout": lambda: costs.rollout_cost(recipe, SHAPE),
    }[work]()
    response = recipe.responses_per_step() * recipe.rollout.max_tokens
    body = costs.forward_flops(SHAPE, recipe.responses_per_step() * PROMPT + response, 0)
    head = 2 * costs.head_parameters(SHAPE) * response
    if work != "update":
        return stage.bytes, body + head
    lora = recipe.lora.rank > 0
    whole = head if recipe.objective.params.get("support") == "full" else 0  # the teacher's output matrix
    return stage.bytes, (3 - lora + recipe.train.gradient_checkpointing) * body + (3 - lora) * head + whole


def files(models: Path, args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Make one whole step, and return the bytes of its files, measured and estimated."""
    recipe = recipe_of(models, args, {"rollout.prompts_per_step": 64, "rollout.num_parts": 4})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        estimated = make_plan(recipe, path).artifacts
        run = open_run(recipe, path)
        with open_engine_pool(recipe, "cpu") as engines:
            rollout.run_rollout(run, 0, engines)
            score.run_scoring(run, 0, engines)
        Trainer(run, "cpu").train_step(0)
        measured = {
            name: sum(file.stat().st_size for file in (path / name).rglob("*") if file.is_file())
            for name in ("step-00000/rollout", "step-00000/teacher", "student", "trainer")
        }
    weights = estimated.parameters["student"]
    assert weights is not None
    assert estimated.score_bytes_per_step is not None
    counted = (
        estimated.rollout_bytes_per_step,
        estimated.score_bytes_per_step,
        4 * weights,
        costs.STATE_BYTES * weights,
    )
    return {name: (size, one) for (name, size), one in zip(measured.items(), counted, strict=True)}


def _worker(work: str, recipe: Recipe, results: Any) -> None:
    results.put(measure(work, recipe))


def in_a_process(work: str, recipe: Recipe) -> Measured:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_worker, args=(work, recipe, results))
    process.start()
    found: Measured = results.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt and its response")
    parser.add_argument("--works", nargs="*", default=list(WORKS), help=", ".join(WORKS))
    args = parser.parse_args()
    # So that what is freed is given back: else the heap's gaps are measured, which no GPU's allocator has so.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    print(f"{args.batch} responses, {args.length} tokens each with their prompt; measured / estimated\n")
    print(
        "| work | MiB measured | estimated | ratio | TFLOP counted | estimated | ratio | utilisation |\n|" + "---|" * 8
    )
    with tempfile.TemporaryDirectory() as folder:
        qwen3.save(SHAPE, Path(folder) / "model")
        (Path(folder) / "prompts.jsonl").write_text('{"prompt": "w5"}\n' * 64)
        for name in args.works:
            work, settings = WORKS[name]
            recipe = recipe_of(Path(folder), args, settings)
            (size, flops), found = estimate(work, recipe), in_a_process(work, recipe)
            cells = [f"{found.bytes / 2**20:,.0f}", f"{size / 2**20:,.0f}", f"{found.bytes / size:.2f}"]
            cells += [f"{found.flops / 1e12:.3f}", f"{flops / 1e12:.3f}", f"{found.flops / flops:.2f}"]
            print(f"| {name} | {' | '.join(cells)} | {found.bare_seconds / found.seconds:.0%} |", flush=True)
        print("\n| files of a step | KiB measured | estimated | ratio |\n|---|---|---|---|")
        for name, (size, counted) in files(Path(folder), args).items():
            print(f"| {name} | {size / 1024:,.0f} | {counted / 1024:,.0f} | {size / counted:.2f} |")


if __name__ == "__main__":
    main()
