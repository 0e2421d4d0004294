"""`opdctl analyze-position`."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from opdctl import console
from opdctl.cli.options import DryRun, Json, Overrides, Recipes, RunDir, RunOption, Verbose, Weights
from opdctl.cli.session import command_session, named_run, print_json, read_recipe_options

if TYPE_CHECKING:
    from opdctl.analysis.analyze import PhaseChoice
    from opdctl.recipe.load import Purpose
    from opdctl.runs.run import Run


def analyze_position(
    run_dir: RunDir = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    weights: Weights = None,
    phases: Annotated[
        Literal["quarters", "ends"],
        typer.Option(
            "--phases",
            help="Compare the first and the last quarter of the steps, or the first step and the final student.",
        ),
    ] = "quarters",
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Also write each figure as PDF and PNG, and a table of the paper's figures."),
    ] = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Show where in the response the teacher's signal is: figures, tables and a test of bias, in one report.html.

    Reads the stored artifacts only and loads no model. Of --recipe and --set, only weight.* matters here.

    \b
    opdctl analyze-position runs/quickstart
    opdctl analyze-position runs/quickstart --phases ends
    opdctl analyze-position runs/quickstart --weights iw_opd:gamma=1,teacher_confidence
    then: opdctl run show runs/quickstart SAMPLE_ID
    """
    with command_session(verbose, as_json=json_):
        loaded = load_run_for_analysis(named_run(run_dir, run), recipe, set_)
        _analyze(loaded, weights, phases, paper, dry_run, json_)


def load_run_for_analysis(
    named: Path | None, recipe: list[str] | None, overrides: list[str] | None, purpose: "Purpose" = "read"
) -> "Run":
    """Return the run as recorded, with the weight and the continuations of the recipe and the overrides."""
    from opdctl.runs.run import Run

    resolved, path = read_recipe_options(recipe, overrides, named, purpose)
    run = Run.load(path)
    update = {"weight": resolved.weight, "continuations": resolved.continuations}
    return replace(run, recipe=run.recipe.model_copy(update=update))


def _analyze(
    run: "Run", weights: str | None, phases: "PhaseChoice", for_paper: bool, dry_run: bool, as_json: bool
) -> None:
    from opdctl.analysis import analyze, captions, page, report, verdict

    if dry_run:
        steps, skipped = analyze.scored_steps(run)
        analyze.analyze_run(run, weights, phases)
        console.answer(f"{len(steps)} scored steps to read, {len(skipped)} with incomplete scores; nothing was written")
        if as_json:
            print_json({"run_dir": str(run.path), "steps": steps, "skipped": skipped})
        return
    analysis = analyze.analyze_run(run, weights, phases)
    written = report.write_report(run.path / "analysis", analysis, for_paper=for_paper)
    for phase in analysis.phases:
        console.answer(captions.phase_sentence(phase))
    if draw := captions.final_student_sentence(analysis):
        console.warn(draw)
    for answer in verdict.answers(analysis):
        console.answer(f"{answer.question} {answer.headline}", "bold")
        if answer.details:
            console.answer(answer.details)
    console.print_table("token weights over all steps", *page.format_weight_table(analysis))
    # Each figure and each table is in files of several formats.
    counts = {kind: len({Path(name).stem for name in written[kind]}) for kind in ("figures", "tables")}
    others = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    console.info(f"wrote {shlex.quote(str(written['report']))}, {others}; open it in a browser")
    if run.recipe.tracking.report_to:
        from opdctl.training.tracking import save_to_trackers

        save_to_trackers(run.recipe, run.path, Path(written["report"]))
    if analysis.samples:  # not if all responses are empty
        console.info(f"next: {run.command_line('run show')} {shlex.quote(analysis.samples[-1].sample_id)}")
    if as_json:
        print_json(written)
