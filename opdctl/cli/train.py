"""TODO."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdctl import console, distributed
from opdctl.cli.options import DryRun, Json, Output, Overrides, Push, Quiet, Recipes, Repair, Verbose
from opdctl.cli.plan import show_plan
from opdctl.cli.session import error_handling, open_run_and_device, print_json, read_recipe_options
from opdctl.cli.stages import reject_with_follow
from opdctl.errors import ExitCode, OpdctlError

if TYPE_CHECKING:
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


def train(
    recipe: Recipes = None,
    set_: Overrides = None,
    output: Output = None,
    no_fill: Annotated[bool, typer.Option("--no-fill", help="Only update, on what other jobs have made.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Only update, and wait for what other jobs still have to make.")
    ] = False,
    list_weights: Annotated[bool, typer.Option("--list-weights", help="List the token weights, and stop.")] = False,
    list_objectives: Annotated[bool, typer.Option("--list-objectives", help="List the objectives, and stop.")] = False,
    push: Push = None,
    repair: Repair = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train step after step: make what is missing, update, write the next student.

    \b
    opdctl train --recipe recipes/quickstart.toml
    opdctl train --recipe recipes/quickstart.toml --set weight.name=uniform --output runs/uniform
    then: opdctl analyze-position runs/quickstart
    """
    with error_handling(verbose, quiet):
        if list_weights or list_objectives:
            _list_components(recipe, set_, output, list_weights, list_objectives, json_)
            return
        reject_with_follow(follow, {"--repair": repair})
        if no_fill and repair:
            raise OpdctlError("--no-fill makes no parts, so there is nothing to --repair", hint="give one of them")
        resolved = read_recipe_options(recipe, set_, output)
        if push is not None:
            from opdctl.training import publish

            publish.check_repo_id(push)
        if dry_run:
            show_plan(resolved, output, json_)
        else:
            needs = _needed_to_update(resolved) if no_fill or follow else resolved.models()
            run, device = open_run_and_device(resolved, output, *needs)
            _train(run, device, no_fill or follow, follow, repair, json_)
            if push is not None:
                _push(run, push)


def _list_components(
    recipes: list[Path] | None,
    overrides: list[str] | None,
    output: Path | None,
    weights: bool,
    objectives: bool,
    as_json: bool,
) -> None:
    """Print the components that a recipe can name; a given recipe's plugins are among them."""
    from opdctl.recipe.load import default_eval_recipe
    from opdctl.registry import OBJECTIVES, WEIGHTS

    if recipes or output:
        read_recipe_options(recipes, overrides, output)
    elif overrides:
        default_eval_recipe("toy:student", overrides)  # any recipe will do: the plugins matter
    found: dict[str, Any] = {}
    for wanted, title, registry in ((weights, "weights", WEIGHTS), (objectives, "objectives", OBJECTIVES)):
        if wanted:
            entries = registry.entries()
            console.print_components(title, entries)
            found[title] = [asdict(entry) for entry in entries]
    if as_json:
        print_json(found)


def _needed_to_update(recipe: "Recipe") -> list[str]:
    """Return the models whose files an update reads: full-vocabulary losses need the teachers' output matrices."""
    from opdctl.recipe.components import build_objective

    return ["student", *(recipe.teacher_models() if build_objective(recipe).support == "full" else ())]


def _train(run: "Run", device: str, no_fill: bool, follow: bool, repair: bool, as_json: bool) -> None:
    from opdctl.pipeline import loop

    before = run.current_step()
    clock = loop.run_training(run, device, fill=not no_fill, follow=follow, repair=repair)
    _report_training(run, before, clock.seconds, no_fill, as_json)


def _report_training(run: "Run", before: int, seconds: dict[str, float], no_fill: bool, as_json: bool) -> None:
    """Say what training came to: accuracy, where the time went, what was written, what to do next."""
    from opdctl.pipeline import progress
    from opdctl.runs.run import next_stage_command

    done, steps = run.current_step(), run.recipe.train.steps
    if no_fill and done == before < steps:
        raise OpdctlError(
            f"{run.path}: step {done} has no teacher scores to learn from yet",
            hint=f"run `{next_stage_command(run)}`",
            code=ExitCode.FAILED,
        )
    accuracy, student = progress.accuracy(run), run.student_path(done) if done else run.student.path
    if done == before:
        console.info(f"nothing to do: all {steps} steps are done")
    shown = {key: "not measured" if value is None else f"{value:.1%}" for key, value in accuracy.items()}
    teachers = ", ".join(f"{name} {shown[name]}" for name in run.recipe.teacher_models())
    spent = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if value)
    best = progress.best(run)
    measured = [("accuracy", f"{shown['before']} → {shown['after']}  ({teachers})")]
    measured += [("best", f"step {best[0]}, {best[1]:.1%}" if best else "not measured")]
    console.print_fields(
        f"{run.path}: {done} of {steps} steps",
        [
            *(measured if any(value is not None for value in accuracy.values()) else []),
            ("time", f"{sum(seconds.values()):.1f} s: {spent}" if spent else "none"),
            ("student", str(student)),
            ("next", next_stage_command(run)),
        ],
    )
    if as_json:
        print_json(
            {
                "run_dir": str(run.path),
                "steps": done,
                "student": str(student),
                "accuracy": accuracy,
                "best": {"step": best[0], "accuracy": best[1]} if best else None,
                "seconds": seconds,
            }
        )


def _push(run: "Run", repo: str) -> None:
    """Upload the newest student, if this process speaks for the run."""
    from opdctl.training import publish

    done = run.current_step()
    if distributed.is_main():
        console.info(f"pushing {run.student_path(done)} to {repo}")
        address = publish.push_to_hub(run.student_at(done).path, repo, f"{run.recipe.name}, step {done}")
        console.info(f"pushed {address}")
