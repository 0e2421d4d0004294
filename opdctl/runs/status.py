"""`opdctl status`: what is done, missing or damaged in a run directory, and the next command. Reads, never writes."""

import itertools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opdctl.artifacts import directories, files, stage_dir
from opdctl.artifacts.manifests import Manifest, StageHeader, SummaryRecord
from opdctl.artifacts.records import SCHEMA_VERSION
from opdctl.artifacts.stage_dir import Fingerprint, StageDir
from opdctl.errors import OpdctlError
from opdctl.runs.compatibility import artifact_changes
from opdctl.runs.heartbeats import read_heartbeats
from opdctl.runs.layout import list_steps
from opdctl.runs.run import Run, next_stage_command


@dataclass(frozen=True)
class StageStatus:
    """One stage of one step. state: done, partial, missing or damaged."""

    step: int
    stage: str
    state: str
    detail: str


def check_stage(run: Run, step: int, name: str, *, verify: bool) -> StageStatus:
    """Return what stands of a stage. Recorded parts must be there in their size; with `verify`, in their digest too."""
    return _check(step, name, partial(_stage, run, step, name), "waits for the stage before", verify=verify)


def _check(step: int, name: str, find: Callable[[], StageDir | None], none: str, *, verify: bool) -> StageStatus:
    """Return what stands of the stage that `find` returns; `none` is what to say where there is none yet."""
    try:
        stage = find()
        if stage is None:
            return StageStatus(step, name, "missing", none)
        problems = stage.corrupted_parts(digests=verify)
        missing = stage.missing(digests=verify)
    except OpdctlError as error:
        return StageStatus(step, name, "damaged", f"{error.message} ({error.hint})")
    if problems:
        return StageStatus(step, name, "damaged", "; ".join(problems.values()))
    if not missing:
        return StageStatus(step, name, "done" if stage.manifest() else "partial", f"{len(stage.names)} parts")
    done = len(stage.names) - len(missing)
    return StageStatus(step, name, "partial" if done else "missing", f"{done} of {len(stage.names)} parts")


def _stage(run: Run, step: int, name: str) -> StageDir | None:
    if name == "rollout":
        return run.rollout_stage(step)
    return run.score_stage(step, name) if run.rollout_stage(step).manifest() else None


def continuations(run: Run, *, verify: bool) -> list[StageStatus]:
    """Return what stands of the continuations, of each step that was gone on from and each model: of those that began,
    and until there is a summary of those that are to."""
    found = []
    for step, folder in list_steps(run.path / "continuations").items():
        again = f"opdctl analyze-position {shlex.quote(str(run.path))} --continuations --step {step}"
        models = {path.name for path in folder.iterdir() if path.is_dir()}
        if not (folder / "summary.json").exists():
            models |= {"student", *run.recipe.teacher_models()}
        for model in sorted(models):
            find = partial(_as_recorded, folder / model, again)
            found.append(_check(step, f"continuations by {model}", find, "", verify=verify))
    return found


def _as_recorded(path: Path, rerun_command: str) -> StageDir | None:
    """Return a stage as its folder records it, None before its first part, whose name says how many there are to be."""
    sealed, begun = (path / "manifest.json", Manifest), (path / "in_progress.json", StageHeader)
    record_path, kind = sealed if sealed[0].exists() else begun
    if not record_path.exists():
        return None
    record = files.read_json(record_path, kind, f"remove {path} and run `{rerun_command}`")
    listed = [part["name"] for part in record.get("parts", ())]
    names = listed or [part.name for part in path.glob("part-?????-of-?????.parquet")]
    if not names:
        return None
    fingerprint, parts = Fingerprint(record["settings"], record["inputs"]), int(Path(names[0]).stem.rpartition("-")[2])
    return StageDir(
        path,
        stage=record["stage"],
        parts=parts,
        suffix=".parquet",
        fingerprint=fingerprint,
        rerun_command=rerun_command,
    )


def check_update(run: Run, step: int, *, verify: bool) -> StageStatus:
    """Return what stands of a step's update, and of the student and trainer state that came of it."""
    if not run.update_path(step).exists():
        return StageStatus(step, "update", "missing", "")
    try:
        record, newest = run.update(step), step + 1 == run.current_step()
        student, trainer = run.student_path(step + 1), run.trainer_path(step + 1)
        if newest and not student.is_dir():
            raise files.corrupt_artifact(student, "the newest is missing", run.command_line("train") + " --repair")
        again = (
            run.command_line("train") + " --repair makes it again" if newest else "remove it: no step needs it any more"
        )
        before = "train takes the state before it, or remove it"
        for path, digests, way in ((student, record["student"], again), (trainer, record["trainer"], before)):
            if verify and path.is_dir():
                directories.check_directory(path, digests, way)
        if verify and not _same_artifacts(record["inputs"], run.update_input_digests(step)):
            raise files.corrupt_artifact(run.step_path(step), "the update was made from other responses or scores")
    except OpdctlError as error:
        return StageStatus(step, "update", "damaged", f"{error.message} ({error.hint})")
    kept = run.student_path(step + 1).is_dir()
    return StageStatus(step, "update", "done", str(run.student_path(step + 1)) if kept else "its student is not kept")


def _same_artifacts(recorded: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether an update was made from the artifacts that are there; a plugin may have changed since."""
    return all(recorded.get(name) == digest for name, digest in found.items() if not name.startswith("plugin "))


def evaluations(run: Run, *, verify: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the summaries of the finished evaluations, and what is damaged among them."""
    paths = sorted(run.path.glob("eval/*/*/summary.json"))
    problems = [problem for path in paths for problem in stage_dir.verify_stage(path.parent)] if verify else []
    again = f"remove it and run `{run.command_line('eval')}`: it is made again from the graded responses"
    return [files.read_json(path, SummaryRecord, again) for path in paths], problems


def collect_status(run: Run, *, verify: bool = False) -> dict[str, Any]:
    """Return the state of every stage of every step begun, the continuations and evaluations, and the next command.

    Raises OpdctlError (code 3) where what all of it rests on is damaged: with `verify` the prompts, too.
    """
    if verify:
        _ = run.prompts
    done = run.current_step()
    stages = []
    for step in itertools.takewhile(run.is_started, range(run.recipe.train.steps)):
        stages += [check_stage(run, step, name, verify=verify) for name in ("rollout", *run.scorers())]
        stages.append(check_update(run, step, verify=verify))
    summaries, problems = evaluations(run, verify=verify)
    return {
        "schema_version": SCHEMA_VERSION,
        "run_dir": str(run.path),
        "steps_done": done,
        "steps": run.recipe.train.steps,
        "stages": stages,
        "continuations": continuations(run, verify=verify),
        "evaluations": summaries,
        "damaged_evaluations": problems,
        "changes": recipe_changes(run),
        "followers": read_heartbeats(run),
        "next": next_command(run, stages),
    }


def recipe_changes(run: Run) -> list[dict[str, Any]]:
    """Return at which steps the recipe was changed, and how."""
    found = []
    for step, recipe in sorted(run.earlier.items()):
        settings = artifact_changes(recipe, run.at(step).recipe)
        found.append({"step": step, "settings": [f"{key} {old!r} → {new!r}" for key, old, new in settings]})
    return [change for change in found if change["settings"]]


def next_command(run: Run, stages: list[StageStatus]) -> str:
    """Return the command to run next: repair what can be made again first, then what is missing, then the result."""
    for stage in stages:
        # Responses can only be drawn again while the student that drew them is kept.
        if stage.state != "damaged":
            continue
        if stage.stage == "rollout" and run.policy_version(stage.step) in run.kept_steps():
            return run.command_line("rollout", stage.step) + " --repair"
        if stage.stage in run.scorers():
            return run.command_line("score-teacher", stage.step) + " --repair"
        if stage.state == "damaged" and stage.stage == "update" and stage.step + 1 == run.current_step():
            return run.command_line("train") + " --repair"
    return next_stage_command(run)
