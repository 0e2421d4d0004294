"""`opdctl status`."""

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from opdctl import console
from opdctl.artifacts import files
from opdctl.cli.list import list_runs
from opdctl.cli.options import Json, RunDir, RunOption, Verbose
from opdctl.cli.session import command_session, named_or_newest_run, print_json
from opdctl.errors import ExitCode

if TYPE_CHECKING:
    from opdctl.pipeline.overview import RunOverview
    from opdctl.runs.heartbeats import Heartbeat
    from opdctl.runs.status import RunStatus

OVERVIEW = ("state", "newest", "best", "newest_student", "best_student", "bytes", "age")
"""What --json has of the overview of a run."""


def status(
    run_dir: RunDir = None,
    run: RunOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and check its checksum.")] = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Show what is finished, missing or corrupt in a run directory, and the next command. A folder of runs is listed.

    \b
    opdctl status runs/quickstart
    opdctl status runs/quickstart --verify
    opdctl status runs
    """
    with command_session(verbose, as_json=json_):
        from opdctl.pipeline.overview import summarize_run
        from opdctl.runs.run import Run
        from opdctl.runs.status import collect_status

        path = named_or_newest_run(run_dir, run)
        if not (path / "run.json").exists() and any(path.glob("*/run.json")):
            rows = list_runs(path)
            if json_:
                print_json({"runs": rows})
            return
        found = collect_status(Run.load(path), verify=verify)
        steps = f"{found.run.current_step()} of {found.run.recipe.train.steps} steps"
        seen = summarize_run(found.run)
        console.print_fields(f"{path}: {steps}", _rows(found, seen))
        if json_:
            values = seen.as_dict()
            print_json({**found.as_dict(), **{name: values[name] for name in OVERVIEW}})
        if found.is_corrupt:
            raise typer.Exit(ExitCode.BAD_DATA)


def _rows(status: "RunStatus", seen: "RunOverview") -> list[tuple[str, str]]:
    """Return (what, state) rows. The steps before the first unfinished one share a row."""
    from opdctl.runs.status import protocol_differences

    run = status.run
    unfinished = {stage.step for stage in status.stages if stage.state != "done" and stage.step is not None}
    finished = range(run.start_step, min([*unfinished, run.current_step()]))
    rows = []
    if run.forked_from:
        rows.append(("forked from", f"{run.forked_from['run_dir']}, step {run.forked_from['step']}"))
    if finished:
        steps = f"step {finished[0]}" if len(finished) == 1 else f"steps {finished[0]} to {finished[-1]}"
        rows.append(("finished", steps))
    if removed := run.removed_steps():
        rows.append(("removed", f"the responses of {len(removed)} of these, the last of them of step {removed[-1]}"))
    if len(status.phases) > 1:
        first, *others = status.phases
        rows.append(("phase", f"{first.name}  weight {first.weight.name}, objective {first.objective.name}"))
        rows += [("phase", f"{phase.name}  {', '.join(phase.describe_changes())}") for phase in others]
    for stage in [*(stage for stage in status.stages if stage.step not in finished), *status.continuations]:
        rows.append((f"step {stage.step} {stage.stage}", f"{stage.state}  {stage.detail}".rstrip()))
    rows += [(each.stage, f"{each.state}  {each.detail}") for each in status.evaluations if each.state != "done"]
    rows += [(beat.stage, _describe(beat)) for beat in status.heartbeats]
    for each, protocol in zip(status.summaries, protocol_differences(status.summaries), strict=True):
        rows.append((f"eval {each['bench']}", f"{each['model']}: {each['avg']:.1%}  {protocol}".rstrip()))
    return [*rows, *_student_rows(seen), ("next", status.next_command())]


def _student_rows(seen: "RunOverview") -> list[tuple[str, str]]:
    """Return the newest and the best student with their directories, and the size of the run."""
    from opdctl.pipeline.overview import format_accuracy

    rows = [("newest student", shlex.quote(str(seen.newest_student)))] if seen.newest_student else []
    if seen.best:
        path = shlex.quote(str(seen.best_student)) if seen.best_student else "pruned"
        rows.append(("best student", f"{path}  ({format_accuracy(seen.best)})"))
    return [*rows, ("disk", files.format_bytes(seen.bytes))]


def _describe(beat: "Heartbeat") -> str:
    age = f"{beat.age:.0f} s ago" if beat.is_alive else f"no heartbeat for {beat.age:.0f} s"
    return f"step {beat.step}, {beat.state}  ({age}, process {beat.pid} on {beat.host})"
