"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.cli.session import print_json

if TYPE_CHECKING:
    from opdctl.pipeline.costs import StageCost
    from opdctl.pipeline.plan import Plan
    from opdctl.recipe.schema import Recipe


def show_plan(recipe: Recipe, output: Path | None, as_json: bool) -> None:
    from opdctl.pipeline.plan import make_plan

    plan = make_plan(recipe, output)
    if as_json:
        print_json(plan.as_dict())
    console.print_fields("plan", plan_rows(plan))
    console.info("nothing was written")


def show_evaluation_plan(recipe: Recipe, output: Path | None, data: Path | None, as_json: bool) -> None:
    from opdctl.pipeline.plan import plan_evaluation

    found = plan_evaluation(recipe, output, data)
    if as_json:
        print_json(found)
    console.print_fields("plan", evaluation_rows(found))
    console.info("nothing was written")


def evaluation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the plan of an evaluation as (benchmark, how much) lines for a person."""
    return [
        (
            bench["bench"],
            f"{_format_count(bench['problems'])} problems, {_format_count(bench['responses'])} responses, "
            f"≤ {_format_count(bench['max_response_tokens'])} tokens",
        )
        for bench in found["benches"]
    ]


# ── For a person ─────────────────────────────────────────────────────────────────────────────────────────────────────


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as (what, how much) lines for a person."""
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    there = plan.hardware
    return [
        ("run directory", plan.run_dir),
        ("device", plan.device),
        ("prompts", f"{_format_count(plan.prompts)}; {plan.steps} steps of {plan.prompts_per_step}{epochs}"),
        ("responses", f"{plan.responses_per_step:,} a step in {plan.parts_per_step} parts"),
        ("tokens", f"≤ {plan.prompt_tokens_per_step:,} prompt + {plan.response_tokens_per_step:,} response a step"),
        (
            "artifacts",
            f"≤ {format_size(plan.artifact_bytes)} in all; a step ≤ {format_size(plan.rollout_bytes_per_step)} rollout + "
            f"{format_size(plan.score_bytes_per_step)} scores",
        ),
        ("disk", f"≤ {format_size(plan.disk_bytes)}: artifacts, {plan.students_kept} students, newest trainer states"),
        *(
            (
                name,
                f"{_format_count(plan.parameters[name])} parameters, {format_size(plan.model_bytes[name])} in its own type",
            )
            for name in plan.parameters
        ),
        (
            "hardware",
            f"{there.memory_gib:g} GiB, {there.tflops:g} TFLOP/s ({there.tflops_float32:g} in float32) and "
            f"{there.bandwidth_gbs:g} GB/s a GPU, of which {there.utilisation:.0%} is reached",
        ),
        *(row for name, stage in plan.stages.items() for row in _stage_rows(plan, name, stage)),
        (
            "in all",
            f"≤ {_format_hours(plan.gpu_hours())}; {_format_duration(plan.seconds())} where each stage waits for the one before",
        ),
    ]


def _stage_rows(plan: Plan, name: str, stage: StageCost | None) -> list[tuple[str, str]]:
    """Return what a stage takes in two lines: how much, and the memory by what takes it."""
    if stage is None:
        return [(name, "unknown: give the model's `shape`, or a benchmark whose size is known")]
    room = plan.hardware.memory_gib * 2**30
    fits = stage.seconds is not None and stage.bytes <= room
    at_once = "" if stage.at_once is None else f", {stage.at_once} responses at once"
    took = (
        f"≤ {_format_duration(stage.seconds)} × {plan.times[name]}, {_format_hours(stage.gpu_hours(plan.times[name]))}"
    )
    memory = f"{format_size(stage.bytes)} on each of {stage.gpus} GPU{'s' * (stage.gpus > 1)}{at_once}"
    unit, length = files.byte_unit(stage.bytes)
    parts = ", ".join(f"{count / length:.1f} {what}" for what, count in stage.memory.items() if count)
    return [(name, f"{memory}; {took}" if fits else f"DOES NOT FIT: {memory}"), ("", f"{unit}: {parts}")]


def _format_count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _format_hours(hours: float | None) -> str:
    return "an unknown number of GPU-hours" if hours is None else f"{hours:,.{0 if hours >= 10 else 1}f} GPU-hours"


def _format_duration(seconds: float | None) -> str:
    """Return a time for a person, in the unit that leaves one to three digits before the point."""
    if seconds is None:
        return "unknown time"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def format_size(count: int | None) -> str:
    """Return a number of bytes for a person, or that it is not known."""
    return "unknown size" if count is None else files.format_bytes(count)
