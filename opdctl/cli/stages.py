"""TODO."""

import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from opdctl import console
from opdctl.cli.options import (
    DryRun,
    Follow,
    Json,
    Only,
    Output,
    Overrides,
    Quiet,
    Recipes,
    Repair,
    ShardOption,
    Step,
    Verbose,
)
from opdctl.cli.plan import show_plan
from opdctl.cli.session import (
    error_handling,
    open_run_and_device,
    print_json,
    read_recipe_options,
    resolve_shard,
    resolve_step,
)
from opdctl.errors import OpdctlError, did_you_mean

if TYPE_CHECKING:
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


def rollout(
    recipe: Recipes = None,
    set_: Overrides = None,
    output: Output = None,
    step: Step = None,
    shard: ShardOption = None,
    follow: Follow = False,
    repair: Repair = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Draw the current student's responses to a step's prompts.

    \b
    opdctl rollout --recipe recipes/quickstart.toml
    opdctl rollout --output runs/quickstart --step 3 --repair
    opdctl rollout --output runs/quickstart --follow
    then: opdctl score-teacher
    """
    with error_handling(verbose, quiet):
        reject_with_follow(follow, {"--step": step is not None, "--repair": repair})
        resolved = read_recipe_options(recipe, set_, output)
        if dry_run:
            show_plan(resolved, output, json_)
        elif follow:
            _follow("rollout", *open_run_and_device(resolved, output, "student"), json_, shard)
        else:
            _run_stage("rollout", *open_run_and_device(resolved, output, "student"), step, repair, json_, shard)


def score_teacher(
    recipe: Recipes = None,
    set_: Overrides = None,
    output: Output = None,
    step: Step = None,
    only: Only = None,
    shard: ShardOption = None,
    follow: Follow = False,
    repair: Repair = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score each token of a step's responses with the teacher, or with every teacher and the reference model.

    \b
    opdctl score-teacher --recipe recipes/quickstart.toml
    opdctl score-teacher --output runs/two-teachers --only teacher-math
    then: opdctl train --no-fill
    """
    with error_handling(verbose, quiet):
        reject_with_follow(follow, {"--step": step is not None, "--repair": repair})
        resolved = read_recipe_options(recipe, set_, output)
        names = _scorers(resolved, only)
        if dry_run:
            show_plan(resolved, output, json_)
        elif follow:
            _follow("score-teacher", *open_run_and_device(resolved, output, *names), json_, shard, names)
        else:
            _run_stage(
                "score-teacher", *open_run_and_device(resolved, output, *names), step, repair, json_, shard, names
            )


def reject_with_follow(follow: bool, others: Mapping[str, bool]) -> None:
    for option, given in others.items():
        if follow and given:
            raise OpdctlError(f"--follow goes from step to step and makes what is missing: give it without {option}")


def _scorers(recipe: "Recipe", only: str | None) -> list[str]:
    """Return the names of the models to score with."""
    names = list(recipe.scorers())
    if only is not None and only not in names:
        raise OpdctlError(f"--only {only}: no such model{did_you_mean(only, names)}")
    return names if only is None else [only]


def _run_stage(
    name: str,
    run: "Run",
    device: str,
    step: int | None,
    repair: bool,
    as_json: bool,
    shard: str | None,
    scorers: Collection[str] = (),
) -> None:
    """Run rollout, or score-teacher with the `scorers`, on one step."""
    from opdctl.engines.pool import open_engine_pool
    from opdctl.pipeline import plan, rollout, score
    from opdctl.runs.run import next_stage_command

    start, at, own = time.monotonic(), resolve_step(run, step), resolve_shard(shard)
    plan.check_space(run, [name.removesuffix("-teacher")])
    with open_engine_pool(run.recipe, device) as engines:
        if name == "rollout":
            made, stages = rollout.run_rollout(run, at, engines, repair=repair, shard=own), [run.rollout_stage(at)]
        else:
            made = score.run_scoring(run, at, engines, only=scorers, repair=repair, shard=own)
            stages = [run.score_stage(at, scorer) for scorer in scorers]
    parts = [part for stage in stages for part in (stage.manifest() or {"parts": []})["parts"]]
    folders = ", ".join(str(stage.path) for stage in stages)
    report = {
        "run_dir": str(run.path),
        "stage": name,
        "step": at,
        "parts": len(parts),
        "parts_made": made,
        "rows": sum(part["rows"] for part in parts),
        "tokens": sum(part["tokens"] for part in parts),
        "seconds": time.monotonic() - start,
        "next": next_stage_command(run),
    }
    counts = f"{report['rows']} responses, {report['tokens']} tokens, {report['seconds']:.1f} s"
    if not all(stage.is_finished() for stage in stages):
        there, whole = (
            sum(len(s.names) - len(s.missing(digests=False)) for s in stages),
            sum(len(s.names) for s in stages),
        )
        console.info(f"step {at}: {there} of {whole} parts are there; others are at work on the rest")
    elif made:
        console.info(f"step {at}: wrote {folders}: {counts}")
    elif run.current_step() == run.recipe.train.steps:
        console.info(f"nothing to do: all {run.recipe.train.steps} steps are done; raise train.steps to go on")
    else:
        console.info(f"nothing to do: {folders} {'is' if len(stages) == 1 else 'are'} finished")
    console.info(f"next: {report['next']}")
    if as_json:
        print_json(report)


def _follow(
    name: str, run: "Run", device: str, as_json: bool, shard: str | None, scorers: Collection[str] = ()
) -> None:
    """Run rollout, or score-teacher with the `scorers`, on one step after another."""
    from opdctl.pipeline import loop
    from opdctl.runs.run import next_stage_command

    start, first, steps = time.monotonic(), run.current_step(), run.recipe.train.steps
    loop.follow_stage(run, device, name, scorers, resolve_shard(shard))
    report = {
        "run_dir": str(run.path),
        "stage": name,
        "steps": list(range(first, steps)),
        "seconds": time.monotonic() - start,
        "next": next_stage_command(run),
    }
    console.info(f"{name}: all {steps} steps are done here; next: {report['next']}")
    if as_json:
        print_json(report)
