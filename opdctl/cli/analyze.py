"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdctl import console
from opdctl.cli.options import (
    AnalysedOutput,
    AnalysedRuns,
    CompareRuns,
    Continuations,
    ContinuedStep,
    DrawnWeights,
    DryRun,
    Json,
    Overrides,
    Quiet,
    Recipes,
    SampleId,
    Shade,
    ShardOption,
    Target,
    Verbose,
)
from opdctl.cli.session import (
    error_handling,
    print_json,
    read_recipe_options,
    resolve_shard,
    resolve_step,
    set_up_device,
)
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from opdctl.artifacts.stage_dir import WorkerShard
    from opdctl.runs.run import Run


def analyze_position(
    run_dirs: AnalysedRuns = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    output: AnalysedOutput = None,
    weights: DrawnWeights = None,
    sample: SampleId = None,
    shade: Shade = "signal",
    continuations: Continuations = False,
    step: ContinuedStep = 0,
    compare: CompareRuns = False,
    target: Target = None,
    shard: ShardOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged parts of the continuations again.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show where in the response the teacher's signal lies: figures, tables, a verdict, in one report.html.

    Works from the stored artifacts alone, without a model; only --continuations runs models. Of a recipe and --set,
    only weight.* and continuations.* matter here.

    \b
    opdctl analyze-position runs/quickstart
    opdctl analyze-position runs/quickstart --set weight.gamma=1.0 --weights prefix_ratio,teacher_confidence
    opdctl analyze-position runs/quickstart --sample sort12-abc/00003/0
    opdctl analyze-position runs/quickstart --continuations
    opdctl analyze-position --compare runs/uniform-0 runs/uniform-1 runs/iw_opd-0 runs/iw_opd-1
    """
    with error_handling(verbose, quiet):
        if compare:
            _compare_runs(run_dirs or [], target, output, json_)
            return
        run = _run_to_analyse(run_dirs or [], recipe, set_, output)
        names = weights.split(",") if weights is not None else None
        if continuations and not _continue(run, resolve_step(run, step), resolve_shard(shard), repair, dry_run, json_):
            return
        if sample is not None:
            _show_sample(run, sample, names, shade, json_)
        else:
            _analyze(run, names, dry_run, json_)


def _run_to_analyse(
    run_dirs: list[Path], recipe: list[Path] | None, overrides: list[str] | None, output: Path | None
) -> Run:
    """Open the run as recorded, with the weight and the continuations that the recipe and the overrides say."""
    from opdctl.runs.layout import run_path
    from opdctl.runs.run import load_run

    if len(run_dirs) > 1:
        raise OpdctlError(f"{len(run_dirs)} runs at once", hint="give one, or --compare them")
    path = run_dirs[0] if run_dirs else output
    resolved = read_recipe_options(recipe, overrides, path)
    run = load_run(path or run_path(resolved, None))
    changes = {"weight": resolved.weight, "continuations": resolved.continuations}
    return replace(run, recipe=run.recipe.model_copy(update=changes))


def _analyze(run: Run, weights: list[str] | None, dry_run: bool, as_json: bool) -> None:
    from opdctl.analysis import analyze, captions, report

    if dry_run:
        steps, left_out = analyze.scored_steps(run)
        console.info(
            f"{len(steps)} scored steps to read, {len(left_out)} that are not wholly scored; nothing was written"
        )
        if as_json:
            print_json({"run_dir": str(run.path), "steps": steps, "left_out": left_out})
        return
    found = analyze.analyze_run(run, weights)
    written = report.write_report(run.path / "analysis", found)
    for phase in found.phases:
        console.info(captions.sentence(phase))
    console.info(captions.headline(found.verdict), "bold")
    for said in captions.suggestions(found.verdict):
        console.info(said)
    console.print_table("token weights over all steps", *report.weight_lines(found))
    console.info(
        f"wrote {written['report']}, {len(written['figures'])} figures, {len(written['tables'])} tables beside it"
    )
    console.info(f"next: open {written['report']}")
    if as_json:
        print_json({**written})


def _show_sample(run: Run, sample_id: str, weights: list[str] | None, shade: str, as_json: bool) -> None:
    from opdctl.analysis import analyze, samples
    from opdctl.cli.sample_view import print_sample

    found = samples.load_sample(run, sample_id, analyze.scored_steps(run)[0], analyze.chosen_weights(run, weights))
    print_sample(found, shade)
    if as_json:
        print_json({**found.as_dict()})


def _continue(run: Run, step: int, shard: WorkerShard, repair: bool, dry_run: bool, as_json: bool) -> bool:
    """Make the continuations that are missing, or say how many there are; return whether nothing is left to others."""
    from opdctl.analysis import captions, continuations
    from opdctl.engines.pool import open_engine_pool
    from opdctl.runs.open import open_run
    from opdctl.runs.run import read_recipe

    if dry_run:
        console.info(continuations.describe_plan(run, step))
        return True
    models = ("student", *run.recipe.teacher_models())
    open_run(read_recipe(run.path), run.path, needs=models, record=False)  # refuses models that are not the run's
    with open_engine_pool(continuations.recipe_for_engines(run.recipe), set_up_device(run.recipe)) as engines:
        summary, made = continuations.run_continuations(run, step, engines, repair=repair, shard=shard)
    if summary is None:
        console.info(
            f"wrote {made} parts of {continuations.continuations_path(run, step)}; the summary comes with the last shard's parts"
        )
        if as_json:
            print_json({"run_dir": str(run.path), "parts_made": made})
        return False
    console.info(captions.continuations_sentence(summary))
    return True


def _compare_runs(paths: list[Path], target: float | None, output: Path | None, as_json: bool) -> None:
    from opdctl.analysis import report
    from opdctl.evaluation import learning_curves

    found = learning_curves.compare(paths, target)
    for each in found:
        console.info(comparison_line(each))
        console.print_table(f"{each['bench']}, {each['problems']} problems", *comparison_rows(each))
    written = report.write_comparison(output or Path("comparison"), found)
    console.info(f"wrote {', '.join(map(str, written))}")
    if as_json:
        print_json({"comparisons": found, "files": list(map(str, written))})


def comparison_line(found: Mapping[str, Any]) -> str:
    """Return a comparison as a sentence made from its numbers."""
    parts = []
    for setting in found["settings"]:
        last = setting["curve"][-1]
        steps, reached, seeds = setting["steps_to_target"], setting["reached"], setting["seeds"]
        when = "never" if steps is None else f"after {steps:.3g} steps"
        some = "" if reached in (0, seeds) else f" ({reached} of {seeds} seeds)"
        ends = f"{last['accuracy']:.1%} at step {last['step']}"
        parts.append(f"{setting['label']} reaches it {when}{some} and is at {ends}")
    return f"{found['bench']}, target {found['target']:.1%}: {'; '.join(parts)}."


def comparison_rows(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return a comparison for the terminal: the header, and a row a setting."""
    steps = sorted({point["step"] for setting in found["settings"] for point in setting["curve"]})
    body = []
    for setting in found["settings"]:
        at = {point["step"]: f"{point['accuracy']:.1%}" for point in setting["curve"]}
        reached = setting["steps_to_target"]
        steps_to = "–" if reached is None else f"{reached:.3g}"
        body.append([setting["label"], str(setting["seeds"]), *(at.get(step, "–") for step in steps), steps_to])
    return ("setting", "seeds", *map(str, steps), f"steps to {found['target']:.1%}"), body
