"""`opdctl rollout` and `opdctl score-teacher`."""

import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opdctl import console, distributed
from opdctl.cli import completion
from opdctl.cli.options import DryRun, Json, Launcher, Overrides, Recipes, RunDir, RunOption, Verbose, with_launcher
from opdctl.cli.score_files import read_file_options, score_input_files
from opdctl.cli.session import command_session, named_run, open_run_and_device, print_json, read_recipe_options
from opdctl.errors import OpdctlError, did_you_mean

if TYPE_CHECKING:
    from opdctl.pipeline.stages import StageName, StageResult
    from opdctl.recipe.schema import Recipe

Step = Annotated[int | None, typer.Option("--step", min=0, help="The step to work on. Default: the current one.")]
Follow = Annotated[
    bool,
    typer.Option("--follow", help="Keep running with the model loaded; process each step when its inputs appear."),
]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="NAME", help="Score with one model: teacher, teacher-NAME or reference."),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="FILES",
        help="Score responses of other programs, without a run: a file, a quoted pattern or a folder; may be repeated. "
        "--output is the directory of the scores.",
        autocompletion=completion.complete_data_files,
    ),
]
TeacherModel = Annotated[
    str | None,
    typer.Option(
        "--teacher", metavar="PATH_OR_ID", help="With --input: the model that scores, a directory, a hub id or `toy:…`."
    ),
]


def rollout(
    run_dir: RunDir = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    step: Step = None,
    follow: Follow = False,
    launcher: Launcher = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Sample the current student's responses to a step's prompts.

    \b
    opdctl rollout --recipe quickstart
    opdctl rollout runs/quickstart --follow
    opdctl rollout runs/finished --step 64    (the final student of 64 updates)
    then: opdctl score-teacher
    """
    with command_session(verbose, as_json=json_):
        settings = with_launcher(set_, launcher)
        resolved, path = read_recipe_options(recipe, settings, named_run(run_dir, run), "plan" if dry_run else "run")
        _run("rollout", resolved, path, ["student"], step, follow=follow, dry_run=dry_run, as_json=json_)


def score_teacher(
    run_dir: RunDir = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    step: Step = None,
    only: Only = None,
    follow: Follow = False,
    input_: Input = None,
    teacher: TeacherModel = None,
    launcher: Launcher = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Score each token of a step's responses with the teacher, or with every teacher and the reference model.

    With --input, a teacher scores the responses in files of any program, without a run.

    \b
    opdctl score-teacher --recipe quickstart
    opdctl score-teacher runs/two-teachers --only teacher-math
    opdctl score-teacher --input 'rollouts/*.jsonl' --teacher Qwen/Qwen3-4B --output scored
    then: opdctl train --no-fill
    """
    with command_session(verbose, as_json=json_):
        if input_ or teacher is not None:
            of_run = {
                "RUN_DIR": run_dir,
                "--recipe": recipe,
                "--step": step,
                "--only": only,
                "--follow": follow or None,
                "--launcher": launcher,
            }
            request = read_file_options(input_, teacher, run, set_ or [], of_run)
            score_input_files(request, dry_run=dry_run, as_json=json_)
            return
        settings = with_launcher(set_, launcher)
        resolved, path = read_recipe_options(recipe, settings, named_run(run_dir, run), "plan" if dry_run else "run")
        scorers = _select_scorers(resolved, only)
        _run("score-teacher", resolved, path, scorers, step, follow=follow, dry_run=dry_run, as_json=json_)


def _select_scorers(recipe: "Recipe", only: str | None) -> list[str]:
    names = list(recipe.scorers())
    if only is not None and only not in names:
        raise OpdctlError("unknown_name", f"--only {only}{did_you_mean(only, names)}")
    return names if only is None else [only]


def _run(
    name: "StageName",
    recipe: "Recipe",
    path: Path,
    models: Collection[str],
    step: int | None,
    *,
    follow: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run a stage on one step, or follow the run. models: those that the stage loads."""
    from opdctl.cli.plan import show_plan
    from opdctl.pipeline.stages import follow_stage, resolve_step, run_stage

    if follow and step is not None:
        raise OpdctlError("invalid_usage", "--follow cannot be combined with --step", hint="give one of them")
    if dry_run:
        show_plan(recipe, path, models, as_json, colocated=False)
        return
    run, device = open_run_and_device(recipe, path, *models)
    if not follow:
        chosen = distributed.call_on_main(partial(resolve_step, run, step))
        _report(run_stage(run, device, name, chosen, models), as_json)
        return
    start, steps = time.monotonic(), list(range(run.current_step(), run.recipe.train.steps))
    follow_stage(run, device, name, models)
    console.info(f"{name}: all {run.recipe.train.steps} steps are done; next: {run.next_command()}")
    if as_json:
        seconds = time.monotonic() - start
        summary = {"stage": name, "steps": steps, "seconds": seconds, "next": run.next_command()}
        print_json({"run_dir": str(run.path), **summary})


def _report(result: "StageResult", as_json: bool) -> None:
    report, run, step = result.as_dict(), result.run, result.step
    paths = ", ".join(str(stage.path) for stage in result.stages)
    if not result.is_finished:
        done, total = result.count_finished_parts(), result.total_parts
        console.info(f"step {step}: {done} of {total} parts finished; other workers are producing the rest")
    elif result.parts_made:
        counts = f"{report['rows']} responses, {report['tokens']} tokens, {report['seconds']:.1f} s"
        console.info(f"step {step}: wrote {paths}: {counts}")
    elif step < run.current_step() == run.recipe.train.steps:
        console.info(f"nothing to do: all {run.recipe.train.steps} steps are done; raise train.steps to continue")
    else:
        console.info(f"nothing to do: {paths} {'is' if len(result.stages) == 1 else 'are'} finished")
    console.info(f"next: {report['next']}")
    if as_json:
        print_json(report)
