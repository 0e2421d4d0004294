"""`--dry-run`: show the plan of a run or an evaluation."""

from dataclasses import asdict
from pathlib import Path

from opdctl import console
from opdctl.artifacts import files
from opdctl.cli.session import print_json
from opdctl.pipeline.costs import StageCost
from opdctl.pipeline.plan import EvaluationPlan, Plan, StagePlan, make_plan, plan_evaluation
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
        print_json(asdict(plan))
    console.print_fields("plan", evaluation_rows(plan))
    console.info("nothing was written")


def evaluation_rows(plan: EvaluationPlan) -> list[tuple[str, str]]:
    """Return the plan of an evaluation as (benchmark, size) rows."""
    return [
        (
            benchmark.bench,
            f"{_format_count(benchmark.problems)} problems, {_format_count(benchmark.responses)} responses, "
            f"≤ {_format_count(benchmark.max_response_tokens)} tokens",
        )
        for benchmark in plan.benches
    ]


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan of a run as (name, size) rows."""
    return [
        ("run directory", plan.run_dir),
        ("device", plan.device),
        *_prompt_rows(plan),
        *_artifact_rows(plan),
        *_cost_rows(plan.stages),
    ]


def _prompt_rows(plan: Plan) -> list[tuple[str, str]]:
    prompts = plan.prompts
    epochs = "" if prompts.epochs is None else f" = {prompts.epochs:.2f} epochs"
    prompt_tokens, response_tokens = prompts.prompt_tokens_per_step, prompts.response_tokens_per_step
    return [
        ("prompts", f"{_format_count(prompts.prompts)}; {plan.steps} steps of {prompts.prompts_per_step}{epochs}"),
        ("responses", f"{prompts.responses_per_step:,} per step in {prompts.parts_per_step} parts"),
        ("tokens", f"≤ {prompt_tokens:,} prompt + {response_tokens:,} response per step"),
    ]


def _artifact_rows(plan: Plan) -> list[tuple[str, str]]:
    artifacts = plan.artifacts
    rollout, scores = format_size(artifacts.rollout_bytes_per_step), format_size(artifacts.score_bytes_per_step)
    total, disk = format_size(artifacts.artifact_bytes), format_size(artifacts.disk_bytes)
    return [
        ("artifacts", f"≤ {total} in total; per step ≤ {rollout} rollout + {scores} scores"),
        ("disk", f"≤ {disk}: artifacts, {artifacts.students_kept} students, newest checkpoints"),
        *(
            (name, f"{_format_count(count)} parameters, {format_size(artifacts.model_bytes[name])}")
            for name, count in artifacts.parameters.items()
        ),
    ]


def _cost_rows(plan: StagePlan) -> list[tuple[str, str]]:
    gpu = plan.hardware
    return [
        (
            "hardware",
            f"{gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s ({gpu.tflops_float32:g} in float32) and "
            f"{gpu.bandwidth_gbs:g} GB/s per GPU, at {gpu.utilization:.0%} utilization",
        ),
        *(row for name, cost in plan.stages.items() for row in _stage_rows(plan, name, cost)),
        (
            "total",
            f"≤ {_format_hours(plan.gpu_hours())}; {_format_duration(plan.seconds())} if stages run sequentially "
            "(estimate, not measured on GPUs)",
        ),
    ]


def _stage_rows(plan: StagePlan, name: str, cost: StageCost | None) -> list[tuple[str, str]]:
    """Return the rows of a stage: its memory and time, and the memory by purpose."""
    if cost is None:
        return [(name, "unknown: set the model's `shape`, or use a benchmark of known size")]
    available, repetitions = plan.hardware.memory_gib * 2**30, plan.repetitions[name]
    fits = cost.seconds is not None and cost.bytes <= available
    concurrent = "" if cost.concurrent_responses is None else f", {cost.concurrent_responses} concurrent responses"
    time = f"≤ {_format_duration(cost.seconds)} × {repetitions}, {_format_hours(cost.gpu_hours(repetitions))}"
    memory = f"{format_size(cost.bytes)} on each of {cost.gpus} GPU{'s' * (cost.gpus > 1)}{concurrent}"
    unit, unit_bytes = files.byte_unit(cost.bytes)
    parts = ", ".join(f"{count / unit_bytes:.1f} {purpose}" for purpose, count in cost.memory.items() if count)
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
