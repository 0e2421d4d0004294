"""`--dry-run`: show the plan of a run or an evaluation."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.cli.session import print_json
from opdctl.pipeline.costs import FIT_FRACTION
from opdctl.pipeline.evaluation_plan import plan_benchmarks
from opdctl.pipeline.plan import Plan, ShownPrompt, make_plan
from opdctl.pipeline.stage_plan import StagePlan
from opdctl.recipe.schema import Recipe

GIB = 2**30
SHOWN_CHARS, SHOWN_TOKENS = 2000, 16
"""Of the first prompt: its characters, and the tokens at its start and at its end."""


def show_plan(recipe: Recipe, path: Path, needs: Collection[str], as_json: bool, *, colocated: bool) -> None:
    """Print the plan of a run, whose stages are colocated or have separate allocations. Nothing is written.

    needs: the models whose files the command reads.

    Raises:
        OpdctlError: as the run would.
    """
    plan = make_plan(recipe, path, needs, colocated=colocated)
    if as_json:
        print_json(plan.as_dict())
    console.print_fields("plan", _plan_rows(plan))
    console.print_table(*_memory_table(plan.stages))
    console.print_fields("memory", _memory_rows(plan.stages))
    for name, prompt in plan.first_prompt.items():
        readers = f", {name}" if len(plan.first_prompt) > 1 else ""
        console.print_fields(f"first prompt{readers}", _prompt_rows(prompt))
    console.info("nothing was written")
    if plan.unavailable:
        raise plan.unavailable


def show_evaluation_plan(recipe: Recipe, path: Path, data: Path | None, as_json: bool) -> None:
    """Print the plan of an evaluation. Nothing is written."""
    plans = plan_benchmarks(recipe, data)
    if as_json:
        benches = [asdict(plan) for plan in plans]
        print_json({"run_dir": str(path), "benches": benches, "settings": recipe.eval.changes})
    rows = [
        (
            plan.bench,
            f"{_format_count(plan.problems)} problems, {_format_count(plan.responses)} responses, "
            f"≤ {_format_count(plan.max_response_tokens)} tokens",
        )
        for plan in plans
    ]
    settings = [("settings", _format_settings(recipe.eval.changes))] if recipe.eval.changes else []
    console.print_fields("plan", [*rows, *settings])
    console.info("nothing was written")


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan of a run as (name, size) rows."""
    stages, epochs = plan.stages, "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    prompt_tokens, response_tokens = plan.prompt_tokens_per_step, plan.response_tokens_per_step
    rollout, scores = _format_size(plan.rollout_bytes_per_step), _format_size(plan.score_bytes_per_step)
    artifacts, disk = _format_size(plan.artifact_bytes), _format_size(plan.disk_bytes)
    gpu, cpu = stages.hardware, _format_size(stages.node_bytes)
    rows = [
        ("run directory", plan.run_dir),
        ("device", plan.device),
        ("prompts", f"{_format_count(plan.prompts)}; {plan.steps} steps of {plan.prompts_per_step}{epochs}"),
        ("responses", f"{plan.responses_per_step:,} per step in {plan.parts_per_step} parts"),
        ("tokens", f"≤ {prompt_tokens:,} prompt + {response_tokens:,} response per step"),
        ("sampling", _format_settings(plan.sampling)),
        ("environment", plan.environment),
        ("artifacts", f"≤ {artifacts} in total; per step ≤ {rollout} rollout + {scores} scores"),
        ("disk", f"≤ {disk}: artifacts, {plan.students_kept} students, newest checkpoints"),
        *(
            (name, f"{_format_count(count)} parameters, {_format_size(plan.model_bytes[name])}")
            for name, count in plan.parameters.items()
        ),
        (
            "hardware",
            f"{gpu.memory_gib:g} GiB, {gpu.tflops:g} TFLOP/s ({gpu.tflops_float32:g} in float32) and "
            f"{gpu.bandwidth_gbs:g} GB/s per GPU, at {gpu.utilization:.0%} utilization",
        ),
        *((f"on {gpus}", command) for gpus, command in stages.commands.items()),
        *((name, _time_text(stages, name)) for name in stages.stages),
        ("CPU memory", f"≤ {cpu} on a node for trainer processes that load, and sleeping engines"),
        (
            "total",
            f"≤ {_format_hours(stages.gpu_hours())}; {_format_duration(stages.seconds())} "
            "(estimate, not measured on GPUs)",
        ),
    ]
    hidden = {"CPU memory"} if stages.node_bytes == 0 else set()
    hidden |= set() if plan.sampling else {"sampling"}
    hidden |= set() if plan.environment else {"environment"}
    return [row for row in rows if row[0] not in hidden]


def _prompt_rows(prompt: ShownPrompt) -> list[tuple[str, str]]:
    """Return a prompt as text and as tokens. The middle of a long one is left out."""
    pieces = [f"{token_id} {piece!r}" for token_id, piece in zip(prompt["token_ids"], prompt["pieces"], strict=True)]
    text, half = prompt["text"], SHOWN_CHARS // 2
    if len(text) > SHOWN_CHARS:
        text = f"{text[:half]} … {text[-half:]}"
    if len(pieces) > 2 * SHOWN_TOKENS:
        pieces = [*pieces[:SHOWN_TOKENS], "…", *pieces[-SHOWN_TOKENS:]]
    count = len(prompt["token_ids"])
    return [("id", prompt["id"]), ("text", text), (f"{count} tokens", ", ".join(pieces))]


def _time_text(plan: StagePlan, name: str) -> str:
    cost = plan.stages[name]
    if cost is None:
        return "unknown: set the model's `shape`, or use a benchmark of known size"
    concurrent = f", {cost.concurrent_responses} responses at a time" if cost.concurrent_responses else ""
    time = f"≤ {_format_duration(cost.seconds)} × {plan.repetitions(name)}, {_format_hours(plan.gpu_hours_of(name))}"
    note = f"; {cost.note}" if cost.note else ""
    return f"{time} on {cost.gpus} GPU{'s' * (cost.gpus > 1)}{concurrent}{note}"


def _memory_table(plan: StagePlan) -> tuple[str, list[str], list[list[str]]]:
    """Return title, header and rows of a table of what shares the memory of a GPU."""
    memory = {name: held for name in plan.stages if (held := plan.memory(name))}
    holders = list(dict.fromkeys(holder for held in memory.values() for holder in held))
    title = f"GiB on each GPU at the same time: at most {plan.limit_bytes / GIB:.1f}, {FIT_FRACTION:.0%} of the memory"
    rows = []
    for name, held in memory.items():
        cells = [f"{held[holder] / GIB:.1f}" if holder in held else "" for holder in holders]
        rows.append([name, *cells, f"{sum(held.values()) / GIB:.1f}", "yes" if plan.fits(name) else "NO"])
    return title, ["stage", *holders, "sum", "fits"], rows


def _memory_rows(plan: StagePlan) -> list[tuple[str, str]]:
    """Return what each stage itself holds, by purpose, and how much too much."""
    rows: dict[str, str] = {}
    for name, cost in plan.stages.items():
        if not cost or not cost.memory:
            continue
        unit, unit_bytes = files.byte_unit(cost.bytes)
        items = f"{unit}: " + ", ".join(f"{n / unit_bytes:.1f} {purpose}" for purpose, n in cost.memory.items() if n)
        if not plan.fits(name):
            problem = cost.obstacle or f"{_format_size(plan.excess_bytes(name))} too much"
            remedy = f"set {plan.remedies[name]}" if plan.remedies[name] else "no single setting is enough"
            rows[name] = f"DOES NOT FIT: {problem}; {remedy}; {items}"
        elif items not in rows.values():
            rows[name] = items
    return list(rows.items())


def _format_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


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


def _format_size(count: float | None) -> str:
    """Return a number of bytes as text; None is an unknown size."""
    return "unknown size" if count is None else files.format_bytes(round(count))
