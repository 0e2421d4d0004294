"""Plans at the terminal: what a run or an evaluation will take."""

from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.cli.session import print_json
from opdctl.pipeline.costs import StageCost
from opdctl.pipeline.plan import Plan, make_plan, plan_evaluation
from opdctl.recipe.schema import Recipe


def show_plan(recipe: Recipe, output: Path | None, as_json: bool) -> None:
    """Print the plan of a run. Nothing is written."""
    plan = make_plan(recipe, output)
    if as_json:
        print_json(plan.as_dict())
    console.print_fields("plan", plan_rows(plan))
    console.info("nothing was written")


def show_evaluation_plan(recipe: Recipe, output: Path | None, data: Path | None, as_json: bool) -> None:
    """Print the plan of an evaluation. Nothing is written."""
    plan = plan_evaluation(recipe, output, data)
    if as_json:
        print_json(plan)
    console.print_fields("plan", evaluation_rows(plan))
    console.info("nothing was written")


def evaluation_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the plan of an evaluation as (benchmark, size) rows."""
    return [
        (
            bench["bench"],
            f"{_format_count(bench['problems'])} problems, {_format_count(bench['responses'])} responses, "
            f"≤ {_format_count(bench['max_response_tokens'])} tokens",
        )
        for bench in plan["benches"]
    ]


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as (what, size) rows."""
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    gpu = plan.hardware
    return [
        ("run directory", plan.run_dir),
        ("device", plan.device),
        ("prompts", f"{_format_count(plan.prompts)}; {plan.steps} steps of {plan.prompts_per_step}{epochs}"),
        ("responses", f"{plan.responses_per_step:,} per step in {plan.parts_per_step} parts"),
        ("tokens", f"≤ {plan.prompt_tokens_per_step:,} prompt + {plan.response_tokens_per_step:,} response per step"),
        (
            "artifacts",
            f"≤ {format_size(plan.artifact_bytes)} in total; per step ≤ {format_size(plan.rollout_bytes_per_step)} "
            f"rollout + {format_size(plan.score_bytes_per_step)} scores",
        ),
        ("disk", f"≤ {format_size(plan.disk_bytes)}: artifacts, {plan.students_kept} students, newest checkpoints"),
        *(
            (
                name,
                f"{_format_count(plan.parameters[name])} parameters, {format_size(plan.model_bytes[name])}",
            )
            for name in plan.parameters
        ),
        (
            "hardware",
            f"{gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s ({gpu.tflops_float32:g} in float32) and "
            f"{gpu.bandwidth_gbs:g} GB/s per GPU, at {gpu.utilisation:.0%} utilization",
        ),
        *(row for name, stage in plan.stages.items() for row in _stage_rows(plan, name, stage)),
        (
            "total",
            f"≤ {_format_hours(plan.gpu_hours())}; {_format_duration(plan.seconds())} if stages run sequentially "
            "(estimate, not measured on GPUs)",
        ),
    ]


def _stage_rows(plan: Plan, name: str, stage: StageCost | None) -> list[tuple[str, str]]:
    """Return the rows of a stage: its memory and time, and the memory by purpose."""
    if stage is None:
        return [(name, "unknown: set the model's `shape`, or use a benchmark of known size")]
    available = plan.hardware.memory_gib * 2**30
    fits = stage.seconds is not None and stage.bytes <= available
    at_once = "" if stage.at_once is None else f", {stage.at_once} responses at once"
    time = (
        f"≤ {_format_duration(stage.seconds)} × {plan.times[name]}, {_format_hours(stage.gpu_hours(plan.times[name]))}"
    )
    memory = f"{format_size(stage.bytes)} on each of {stage.gpus} GPU{'s' * (stage.gpus > 1)}{at_once}"
    unit, length = files.byte_unit(stage.bytes)
    parts = ", ".join(f"{count / length:.1f} {what}" for what, count in stage.memory.items() if count)
    return [(name, f"{memory}; {time}" if fits else f"DOES NOT FIT: {memory}"), ("", f"{unit}: {parts}")]


def _format_count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _format_hours(hours: float | None) -> str:
    return "an unknown number of GPU-hours" if hours is None else f"{hours:,.{0 if hours >= 10 else 1}f} GPU-hours"


def _format_duration(seconds: float | None) -> str:
    """Return a time as text, in the largest unit of which it has at least two."""
    if seconds is None:
        return "unknown time"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def format_size(count: int | None) -> str:
    """Return a number of bytes as text; None is an unknown size."""
    return "unknown size" if count is None else files.format_bytes(count)
