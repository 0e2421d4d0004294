"""The estimates of `--dry-run` compared with measurements: `python tests/bench/estimates.py`.

A random Qwen3 runs in the real trainer and engines on the CPU, each task in a separate process. All responses have the
maximum length, so upper bounds and measurements can agree. Memory: the peak resident memory of the process minus that
before the model was loaded; freed arrays of a MiB and more are returned to the system. FLOPs: of all matrix products,
counted by torch at run time; the estimate excludes attention, which torch does not count on a CPU. Time: CPU seconds,
compared with those of one large product of the same FLOPs in the same process; their ratio is the utilization. The
products of a rollout are small: reading the weights limits its speed.
"""

import argparse
import json
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
from growth import random_response
from processes import peak_bytes, reset_peak, resident_bytes, run_in_new_process
from torch.utils.flop_counter import FlopCounterMode

from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.pool import open_engine_pool
from opdctl.engines.transformers import TransformersEngine
from opdctl.models import BLOCK_LOGITS, CHUNK_LOGITS
from opdctl.models.shapes import head_parameters
from opdctl.pipeline import costs, rollout, score
from opdctl.pipeline.plan import make_plan
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe, Score
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.training.trainer import Trainer

PROMPT_TOKENS = 16
IN_PLACE_FLOPS = {torch.ops.aten.addmm_: lambda _, a, b, **named: 2 * a[0] * a[1] * b[1]}  # torch does not count it
SHAPE = qwen3.SMALL_SHAPE
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "update": ("update", {}),
    "update, activations recomputed": ("update", {"train.gradient_checkpointing": True}),
    "update, bfloat16": ("update", {"student.dtype": "bfloat16"}),
    "update, LoRA": ("update", {"lora.rank": 16}),
    "update, full vocabulary": ("update", {"objective.name": "reverse_kl", "objective.support": "full"}),
    "score": ("score", {}),
    "rollout": ("rollout", {"rollout.prompts_per_step": 64}),
}
"""The stage and the further recipe settings of each task."""


@dataclass(frozen=True)
class Measurement:
    """Bytes, FLOPs of matrix products, and CPU seconds of a task. product_seconds: of one product of the same FLOPs."""

    bytes: int
    flops: int
    seconds: float
    product_seconds: float


def make_recipe(models: Path, args: argparse.Namespace, settings: dict[str, Any]) -> Recipe:
    common = {
        "name": "estimates",
        "student.model": str(models / "model"),
        "student.dtype": "float32",
        "teacher.model": str(models / "model"),
        "teacher.dtype": "float32",
        "prompts.source": str(models / "prompts.jsonl"),
        "prompts.max_tokens": PROMPT_TOKENS,
        "rollout.engine": "transformers",
        "rollout.prompts_per_step": args.batch,
        "rollout.max_tokens": args.length - PROMPT_TOKENS,
        "rollout.num_parts": 1,
        "score.engine": "transformers",
        "score.tokens_per_batch": args.batch * args.length,
        "train.steps": 1,
        "train.tokens_per_micro_batch": args.batch * args.length,
    }
    return load_recipe([], [f"{key}={json.dumps(value)}" for key, value in (common | settings).items()])


def prepare(run: Run, stage: str) -> Callable[[], object]:
    """Load the models of a stage, and return a function that runs the stage in memory."""
    recipe = run.recipe
    max_tokens = recipe.rollout.max_tokens
    samples = [random_response(index, max_tokens, SHAPE.vocab_size) for index in range(recipe.responses_per_step())]
    if stage == "update":
        if recipe.score.hidden_states:
            hidden_TD = np.random.default_rng(0).normal(size=(max_tokens, SHAPE.hidden_size)).astype(np.float32)
            for sample in samples:
                object.__setattr__(sample.teacher, "hidden_states", lambda: hidden_TD)
        trainer = Trainer(run, "cpu")
        return lambda: trainer._update(0, trainer.make_micro_batches(0, samples))
    engine = TransformersEngine(run.student, "cpu")
    prompts = [sample.response.prompt_ids for sample in samples]
    if stage == "rollout":
        requests = [Request(prompt, index) for index, prompt in enumerate(prompts)]
        return lambda: engine.generate(requests, recipe.rollout, len(requests), lambda n: None)
    score_requests = [ScoreRequest(sample.response.prompt_ids, sample.response.response_ids) for sample in samples]
    settings = Score(tokens_per_batch=recipe.score.tokens_per_batch)
    return lambda: engine.score(score_requests, settings, lambda n: None)


def measure(stage: str, recipe: Recipe) -> Measurement:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(recipe, Path(folder) / "run")
        before = resident_bytes()
        run_once = prepare(run, stage)
        run_once()  # gradients and moments exist from the second update on
        reset_peak()  # so that it excludes loading
        start = time.process_time()
        run_once()
        seconds = time.process_time() - start
        peak = peak_bytes() - before
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE_FLOPS) as counter:
            run_once()
    flops = counter.get_total_flops()
    return Measurement(peak, flops, seconds, product_seconds(flops, recipe.student.dtype))


def product_seconds(flops: int, dtype: str) -> float:
    """Return the CPU seconds of large matrix products with this number of FLOPs."""
    matrix = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    matrix @ matrix
    start = time.process_time()
    for _ in range(4):
        matrix @ matrix
    return (time.process_time() - start) * flops / (4 * 2 * 2048**3)


def estimate(stage: str, recipe: Recipe) -> tuple[int, float]:
    """Return the bytes that `--dry-run` estimates, and the FLOPs of matrix products without attention.

    The chunks of logits are those of a CPU, which are smaller than the estimated ones of a GPU.
    """
    costs.GPU_CHUNK_LOGITS, costs.GPU_BLOCK_LOGITS = CHUNK_LOGITS, BLOCK_LOGITS
    cost = {
        "update": lambda: costs.update_cost(recipe, SHAPE, SHAPE),
        "score": lambda: costs.score_cost(recipe, SHAPE, recipe.student.dtype),
        "rollout": lambda: costs.rollout_cost(recipe, SHAPE),
    }[stage]()
    response_tokens = recipe.responses_per_step() * recipe.rollout.max_tokens
    body = costs.forward_flops(SHAPE, recipe.responses_per_step() * PROMPT_TOKENS + response_tokens, 0)
    head = 2 * head_parameters(SHAPE) * response_tokens
    if stage != "update":
        return cost.bytes, body + head
    is_lora = recipe.lora.rank > 0
    teacher_head = head if recipe.objective.params.get("support") == "full" else 0
    passes = 3 - is_lora + recipe.train.gradient_checkpointing
    return cost.bytes, passes * body + (3 - is_lora) * head + teacher_head


def file_sizes(models: Path, args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Run one complete step, and return the measured and estimated bytes of its files."""
    recipe = make_recipe(models, args, {"rollout.prompts_per_step": 64, "rollout.num_parts": 4})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        plan = make_plan(recipe, path)
        run = open_run(recipe, path)
        with open_engine_pool(recipe, "cpu") as engines:
            rollout.run_rollout(run, 0, engines)
            score.run_scoring(run, 0, engines)
        Trainer(run, "cpu").train_step(0)
        run.finish_update()
        names = ("step-00000/rollout", "step-00000/teacher", "student", "trainer")
        measured = [sum(file.stat().st_size for file in (path / name).rglob("*") if file.is_file()) for name in names]
    parameters = plan.parameters["student"]
    assert parameters is not None
    assert plan.score_bytes_per_step is not None
    checkpoint_bytes = costs.state_bytes(recipe) * parameters
    estimated = (plan.rollout_bytes_per_step, plan.score_bytes_per_step, 4 * parameters, checkpoint_bytes)
    return dict(zip(names, zip(measured, estimated, strict=True), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="responses of an update and of a score batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt and its response")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    args = parser.parse_args()
    # Freed arrays return to the system. Otherwise heap fragmentation is measured, which GPU allocators do not have.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    print(f"{args.batch} responses, {args.length} tokens each with their prompt; ratio is measured / estimated\n")
    columns = "| task | MiB measured | estimated | ratio | TFLOP counted | estimated | ratio | utilization |"
    print(columns + "\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        qwen3.save_model(SHAPE, Path(folder) / "model")
        (Path(folder) / "prompts.jsonl").write_text('{"prompt": "w5"}\n' * 64)
        for name in args.tasks:
            stage, settings = TASKS[name]
            recipe = make_recipe(Path(folder), args, settings)
            estimated_bytes, estimated_flops = estimate(stage, recipe)
            measured = run_in_new_process(measure, stage, recipe)
            cells = [f"{measured.bytes / 2**20:,.0f}", f"{estimated_bytes / 2**20:,.0f}"]
            cells += [f"{measured.bytes / estimated_bytes:.2f}"]
            cells += [f"{measured.flops / 1e12:.3f}", f"{estimated_flops / 1e12:.3f}"]
            cells += [f"{measured.flops / estimated_flops:.2f}", f"{measured.product_seconds / measured.seconds:.0%}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        print("\n| files of a step | KiB measured | estimated | ratio |\n|---|---|---|---|")
        for name, (size, estimated) in file_sizes(Path(folder), args).items():
            print(f"| {name} | {size / 1024:,.0f} | {estimated / 1024:,.0f} | {size / estimated:.2f} |")


if __name__ == "__main__":
    main()
