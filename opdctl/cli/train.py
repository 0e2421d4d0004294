"""`opdctl train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opdctl import console, distributed
from opdctl.cli.options import DryRun, Json, Launcher, Overrides, Recipes, RunDir, RunOption, Verbose, with_launcher
from opdctl.cli.session import command_session, named_run, open_run_and_device, print_json, read_recipe_options
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opdctl.pipeline.progress import TrainingSummary
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


def train(
    run_dir: RunDir = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    no_fill: Annotated[
        bool, typer.Option("--no-fill", help="Only update: use the rollouts and scores of other jobs.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Only update, and wait for the rollouts and scores of other jobs.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload the newest student and its card to the model hub."),
    ] = None,
    launcher: Launcher = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Train step by step: make what is missing, update, write the next student.

    \b
    opdctl train --recipe quickstart
    opdctl train --recipe quickstart --set weight.name=uniform --output runs/uniform
    then: opdctl analyze-position runs/quickstart
    """
    with command_session(verbose, as_json=json_):
        settings = with_launcher(set_, launcher)
        resolved, path = read_recipe_options(recipe, settings, named_run(run_dir, run), "plan" if dry_run else "run")
        if push is not None:
            from opdctl.training.publish import check_repo_id

            check_repo_id(push)
        fill = not (no_fill or follow)
        models = resolved.models() if fill else _updated_from(resolved)
        if dry_run:
            from opdctl.cli.plan import show_plan

            on_trainer_gpus = resolved.pipeline.launcher == "local" or resolved.pipeline.placement == "colocated"
            show_plan(resolved, path, models, json_, colocated=fill and on_trainer_gpus)
            return
        if resolved.pipeline.launcher == "ray" and not distributed.is_launched():
            flags = {"--no-fill": no_fill, "--follow": follow, "--json": json_, "-v": verbose, "-q": verbose is False}
            options = [*_repeat("--recipe", recipe), *_repeat("--set", settings), *_repeat("--push", push and [push])]
            _train_on_cluster(resolved, path, [*options, *(flag for flag, is_given in flags.items() if is_given)])
            return
        from opdctl.pipeline.loop import run_training  # loads torch: a recipe error comes before
        from opdctl.pipeline.progress import summarize_training

        opened, device = open_run_and_device(resolved, path, *models)
        before = opened.current_step()
        clock = run_training(opened, device, fill=fill, follow=follow)
        if distributed.is_main():
            _report(summarize_training(opened, before, clock.seconds), fill, json_)
            if push is not None:
                _push(opened, push)


def _train_on_cluster(recipe: "Recipe", path: Path, options: list[str]) -> None:
    """Run the same command as the ranks of a cluster. Rank 0 prints its report."""
    from opdctl.cluster.ranks import run_ranks

    if code := run_ranks(recipe, path, ["train", str(path), *options]):
        raise typer.Exit(code)


def _repeat(option: str, values: "Sequence[str] | None") -> list[str]:
    """Return the words that give an option with each of the values."""
    return [word for value in values or () for word in (option, value)]


def _updated_from(recipe: "Recipe") -> list[str]:
    """Return the models whose files an update reads: full-vocabulary objectives need the teachers' output matrices."""
    from opdctl.recipe.components import build_objective

    return ["student", *(recipe.teacher_models() if build_objective(recipe).support == "full" else ())]


def _report(summary: "TrainingSummary", fill: bool, as_json: bool) -> None:
    run, done, steps = summary.run, summary.steps_done, summary.run.recipe.train.steps
    if not fill and done == summary.steps_before < steps:
        raise OpdctlError(
            "missing_input", f"{run.path}: step {done} has no teacher scores", hint=f"run `{run.next_command()}`"
        )
    if done == summary.steps_before:
        console.info(f"nothing to do: all {steps} steps are done")
    seconds = {stage: value for stage, value in summary.seconds.items() if value}
    times = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    console.print_fields(
        f"{run.path}: {done} of {steps} steps",
        [
            *_accuracy_fields(summary),
            ("time", f"{sum(seconds.values()):.1f} s: {times}" if times else "none"),
            ("student", str(summary.student)),
            ("next", run.next_command()),
        ],
    )
    if as_json:
        print_json(summary.as_dict())


def _accuracy_fields(summary: "TrainingSummary") -> list[tuple[str, str]]:
    """Return accuracy and best step, or nothing if nothing was evaluated."""
    if all(value is None for value in summary.accuracy.values()):
        return []
    shown = {key: "not measured" if value is None else f"{value:.1%}" for key, value in summary.accuracy.items()}
    teachers = ", ".join(f"{name} {shown[name]}" for name in summary.run.recipe.teacher_models())
    best = f"step {summary.best[0]}, {summary.best[1]:.1%}" if summary.best else "not measured"
    return [("accuracy", f"{shown['before']} → {shown['after']}  ({teachers})"), ("best", best)]


def _push(run: "Run", repo: str) -> None:
    """Upload the newest student."""
    from opdctl.training.publish import push_to_hub

    done = run.current_step()
    console.info(f"pushing {run.student_path(done)} to {repo}")
    address = push_to_hub(run.student_at(done).path, repo, f"{run.recipe.name}, step {done}")
    console.info(f"pushed {address}")
