"""TODO."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdctl import console
from opdctl.cli.options import DryRun, Json, Overrides, Quiet, Recipes, RunDir, Verbose
from opdctl.cli.session import error_handling, print_json, read_recipe_options
from opdctl.errors import ExitCode

if TYPE_CHECKING:
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


def change(
    run_dir: RunDir,
    recipe: Recipes = None,
    set_: Overrides = None,
    branch: Annotated[
        Path | None,
        typer.Option("--branch", metavar="NEW_RUN_DIR", help="Leave the run as it is, and make a new one of it."),
    ] = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Go on with a begun run under another recipe, from its current step on, and record that.

    \b
    opdctl change runs/quickstart --set weight.gamma=0.7 --dry-run
    opdctl change runs/quickstart --set weight.gamma=0.7
    opdctl change runs/quickstart --set weight.name=uniform --branch runs/uniform
    then: opdctl train --output runs/quickstart
    """
    with error_handling(verbose, quiet):
        from opdctl.runs.open import resolve_auto_engines
        from opdctl.runs.run import load_run

        resolved = resolve_auto_engines(read_recipe_options(recipe, set_, run_dir), run_dir)
        _change(load_run(run_dir), resolved, branch, dry_run, json_)


def _change(run: "Run", recipe: "Recipe", branch: Path | None, dry_run: bool, as_json: bool) -> None:
    from opdctl.runs import recipe_change
    from opdctl.runs.run import next_stage_command

    found = recipe_change.plan_recipe_change(run, recipe)
    for line in found.lines():
        console.info(line)
    report = {
        "run_dir": str(branch or run.path),
        "step": found.step,
        "changes": [{"key": key, "old": old, "new": new} for key, old, new in found.settings],
        "dropped": [str(path) for path in found.dropped],
    }
    if dry_run:
        console.info("nothing was written")
    elif branch is not None:
        console.info(f"wrote {branch}: shares {recipe_change.branch(found, branch)} files with {run.path}")
        console.info(f"next: {next_stage_command(replace(run, path=branch))}")
    else:
        recipe_change.apply(found)
        console.info(f"{run.path}: from step {found.step} on under the new recipe")
        console.info(f"next: {next_stage_command(replace(run, recipe=recipe))}")
    if as_json:
        print_json(report)


def status(
    run_dir: RunDir,
    verify: Annotated[bool, typer.Option("--verify", help="Read every part and check its digest.")] = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Say what is done, missing or damaged in a run directory, and the next command.

    \b
    opdctl status runs/quickstart
    opdctl status runs/quickstart --verify
    """
    with error_handling(verbose, quiet):
        from opdctl.cli import runs
        from opdctl.runs import status
        from opdctl.runs.run import load_run

        found = status.collect_status(load_run(run_dir), verify=verify)
        console.print_fields(f"{run_dir}: {found['steps_done']} of {found['steps']} steps", runs._status_rows(found))
        if json_:
            print_json(runs._status_as_json(found))
        stages = found["stages"] + found["continuations"]
        if found["damaged_evaluations"] or any(stage.state == "damaged" for stage in stages):
            raise typer.Exit(ExitCode.BAD_DATA)


def _status_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the status as (what, state) lines: the steps before the first unfinished one together, then the rest."""
    unfinished = {stage.step for stage in found["stages"] if stage.state != "done"}
    finished = range(min([*unfinished, found["steps_done"]]))
    lines = [("finished", f"steps 0 to {finished[-1]}" if finished[-1] else "step 0")] if finished else []
    shown = [stage for stage in found["stages"] if stage.step not in finished] + found["continuations"]
    for stage in shown:
        lines.append((f"step {stage.step} {stage.stage}", f"{stage.state}  {stage.detail}".rstrip()))
    lines += [("damaged", problem) for problem in found["damaged_evaluations"]]
    for change in found["changes"]:
        lines.append((f"from step {change['step']}", f"another recipe: {'; '.join(change['settings'])}"))
    for sign in found["followers"]:
        life = f"{sign.age:.0f} s ago" if sign.is_alive else f"no sign of life for {sign.age:.0f} s"
        lines.append((sign.stage, f"step {sign.step}, {sign.state}  ({life}, process {sign.pid} on {sign.host})"))
    for summary in found["evaluations"]:
        lines.append((f"eval {summary['bench']}", f"{summary['model']}: {summary['avg']:.1%}"))
    return [*lines, ("next", found["next"])]


def _status_as_json(found: dict[str, Any]) -> dict[str, Any]:
    """Return the status as JSON values."""
    return {**found, **{key: [asdict(each) for each in found[key]] for key in ("stages", "continuations", "followers")}}
