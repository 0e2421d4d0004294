"""The state of a run directory: what is finished, missing or corrupt, and the next command. Only reads."""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from opdctl.artifacts import directories, files
from opdctl.artifacts.manifests import SummaryRecord
from opdctl.artifacts.stage_dir import StageDir, corrupt_file_hint, recorded_stage
from opdctl.errors import OpdctlError
from opdctl.runs.heartbeats import Heartbeat, read_heartbeats
from opdctl.runs.layout import PROMPTS, list_steps
from opdctl.runs.phases import TrainingPhase, training_phases
from opdctl.runs.run import Run

State = Literal["done", "partial", "missing", "corrupt"]


@dataclass(frozen=True)
class StageStatus:
    """One stage of one step. step: None for an evaluation."""

    step: int | None
    stage: str
    state: State
    detail: str


@dataclass(frozen=True)
class RunStatus:
    """The state of a run."""

    run: Run
    stages: list[StageStatus]
    continuations: list[StageStatus]
    evaluations: list[StageStatus]
    summaries: list[dict[str, Any]]
    """The finished evaluations."""
    heartbeats: list[Heartbeat]
    phases: list[TrainingPhase]
    """Empty if the record of an update is corrupt."""

    @property
    def is_corrupt(self) -> bool:
        return bool(self._corrupt())

    def _corrupt(self) -> list[StageStatus]:
        return [each for each in (*self.stages, *self.continuations, *self.evaluations) if each.state == "corrupt"]

    def _is_repairable(self, status: StageStatus) -> bool:
        """Whether `run repair` can help: the rollout of a pruned student cannot be sampled again."""
        if status.stage != "rollout" or status.step is None:
            return True
        return self.run.policy_version(status.step) in self.run.kept_steps()

    def next_command(self) -> str:
        """Return the command to run next: the repair of what is corrupt and can be regenerated, or the next stage."""
        run = self.run
        if any(map(self._is_repairable, self._corrupt())) and not run.is_newest_student_missing():
            return run.manage_command_line("repair")
        return next(filter(None, map(self._regenerate_command, self.stages)), run.next_command())

    def _regenerate_command(self, status: StageStatus) -> str | None:
        """Return the command that makes parts again that were removed from a step before the current one."""
        if status.stage == "update" or status.step is None or status.step >= self.run.current_step():
            return None
        if status.state not in ("partial", "missing") or not self._is_repairable(status):
            return None
        if status.stage == "rollout":
            return self.run.rollout_command_line(status.step)
        return f"{self.run.command_line('score-teacher', status.step)} --only {status.stage}"

    def as_dict(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        run = self.run
        stages = {
            name: [asdict(each) for each in getattr(self, name)]
            for name in ("stages", "continuations", "evaluations", "heartbeats")
        }
        return {
            "run_dir": str(run.path),
            "start_step": run.start_step,
            "steps_done": run.current_step(),
            "steps": run.recipe.train.steps,
            "removed_steps": run.removed_steps(),
            "is_finished": run.current_step() >= run.recipe.train.steps and not run.is_newest_student_missing(),
            **stages,
            "phases": [phase.as_dict() for phase in self.phases],
            "summaries": self.summaries,
            "forked_from": run.forked_from and {key: run.forked_from[key] for key in ("run_dir", "step")},
            "next": self.next_command(),
        }


def collect_status(run: Run, *, verify: bool = False) -> RunStatus:
    """Return the state of every started stage, of continuations and of evaluations. verify: read all files.

    Raises:
        OpdctlError: the prompts (if `verify`) or the record of the run are corrupt.
    """
    if verify:
        _ = run.prompts
    stages, removed = check_start(run, verify=verify), run.removed_steps()
    for step in itertools.takewhile(run.is_started, run.sampling_steps()):
        is_trained_on = step < run.recipe.train.steps or run.update_path(step).exists()
        is_removed = step in removed
        if (is_trained_on and not is_removed) or (run.step_path(step) / "rollout").exists():
            stages += [check_stage(run, step, name, verify=verify) for name in ("rollout", *run.scorers())]
        if is_trained_on and (run.update_path(step).exists() or not is_removed):
            stages.append(check_update(run, step, verify=verify))
    summaries = [_read_summary(run, path) for path in sorted(run.path.glob("eval/*/*/summary.json"))]
    continuations, evaluations = check_continuations(run, verify=verify), check_evaluations(run, verify=verify)
    phases: list[TrainingPhase] = []
    with contextlib.suppress(OpdctlError):  # of an update that is corrupt: its stage has the error
        phases = training_phases(run)
    return RunStatus(run, stages, continuations, evaluations, summaries, read_heartbeats(run), phases)


def _read_summary(run: Run, path: Path) -> dict[str, Any]:
    repair = run.manage_command_line("repair")
    hint = corrupt_file_hint(path, run.evaluation_command_line(path.parent.parent.name, path.parent.name), repair)
    summary: dict[str, Any] = files.read_json(path, SummaryRecord, hint)
    return summary


def protocol_differences(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each evaluation the settings, as text, in which those of its benchmark differ; "" if in none."""
    by_bench: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for summary in summaries:
        by_bench[summary["bench"]].append(summary.get("protocol", {}))
    texts = []
    for summary in summaries:
        others, protocol = by_bench[summary["bench"]], summary.get("protocol", {})
        differing = [key for key in protocol if any(other.get(key) != protocol[key] for other in others)]
        texts.append(", ".join(f"{key} {protocol[key]}" for key in differing))
    return texts


def check_start(run: Run, *, verify: bool) -> list[StageStatus]:
    """Return the state of the student and the trainer state that a fork starts from; nothing if the run is no fork."""
    step = run.start_step
    if not run.forked_from or not step:
        return []
    try:
        _check_state(run, step, verify=verify)
    except OpdctlError as error:
        return [StageStatus(step, "start", "corrupt", f"{error.message} ({error.hint})")]
    return [StageStatus(step, "start", "done", f"forked from {run.forked_from['run_dir']}")]


def check_stage(run: Run, step: int, name: str, *, verify: bool) -> StageStatus:
    """Return the state of a stage. Recorded parts must exist in their size and, if `verify`, match their checksum."""
    return _check(step, name, partial(_find_stage, run, step, name), "waiting for the previous stage", verify=verify)


def _find_stage(run: Run, step: int, name: str) -> StageDir | None:
    if name == "rollout":
        return run.rollout_stage(step)
    return run.score_stage(step, name) if run.rollout_stage(step).manifest() else None


def _check(
    step: int | None, name: str, find: Callable[[], StageDir | None], if_none: str, *, verify: bool
) -> StageStatus:
    try:
        stage = find()
        if stage is None:
            return StageStatus(step, name, "missing", if_none)
        corrupted = {
            index: why
            for index, why in stage.corrupted_parts(digests=verify).items()
            if (stage.path / stage.names[index]).exists()
        }
        missing = stage.missing(digests=verify)
    except OpdctlError as error:
        return StageStatus(step, name, "corrupt", f"{error.message} ({error.hint})")
    if corrupted:
        return StageStatus(step, name, "corrupt", "; ".join(corrupted.values()))
    if not missing:
        return StageStatus(step, name, "done" if stage.manifest() else "partial", f"{len(stage.names)} parts")
    done = len(stage.names) - len(missing)
    return StageStatus(step, name, "partial" if done else "missing", f"{done} of {len(stage.names)} parts")


def check_continuations(run: Run, *, verify: bool) -> list[StageStatus]:
    """Return the state of the continuations of each step and model: of the started ones and, until there is a summary,
    of the ones that are still to be made."""
    statuses = []
    for step, directory in list_steps(run.path / "continuations").items():
        command = run.manage_command_line("continuations", step)
        models = {path.name for path in directory.iterdir() if path.is_dir()}
        if not (directory / "summary.json").exists():
            models |= {"student", *run.recipe.teacher_models()}
        for model in sorted(models):
            find = partial(recorded_stage, directory / model, command, run.manage_command_line("repair"))
            statuses.append(_check(step, f"continuations by {model}", find, "", verify=verify))
    return statuses


def check_evaluations(run: Run, *, verify: bool) -> list[StageStatus]:
    """Return the state of every started evaluation, and of its prompts and its benchmark's record if they are
    corrupt."""
    statuses, repair = [], run.manage_command_line("repair")
    for path in sorted(path for path in run.path.glob("eval/*/*") if path.is_dir() and not path.name.startswith(".")):
        commands, name = (
            (run.evaluation_command_line(path.parent.name, path.name), repair),
            f"eval {path.parent.name} {path.name}",
        )
        advice = f"run `{commands[0]}`"
        status = _check(None, name, partial(recorded_stage, path, *commands), "", verify=verify)
        if status.state == "done" and not (path / "summary.json").exists():
            status = StageStatus(None, name, "partial", "summary.json is missing")
        if status.state in ("partial", "missing"):
            status = replace(status, detail=", ".join(filter(None, [status.detail, advice])))
        prompts = _check(
            None, f"{name} {PROMPTS}", partial(recorded_stage, path / PROMPTS, *commands), "", verify=verify
        )
        statuses += [status, *([prompts] if prompts.state == "corrupt" else [])]
    for path in sorted(run.path.glob("eval/*/benchmark.json")) if verify else ():
        command = run.evaluation_command_line(path.parent.name)
        try:
            files.read_json(path, hint=corrupt_file_hint(path, command, repair))
        except OpdctlError as error:
            name = f"eval {path.parent.name} {path.name}"
            statuses.append(StageStatus(None, name, "corrupt", f"{error.message} ({error.hint})"))
    return statuses


def check_update(run: Run, step: int, *, verify: bool) -> StageStatus:
    """Return the state of a step's update, and of the student and the trainer state that it wrote."""
    if not run.update_path(step).exists():
        return StageStatus(step, "update", "missing", "")
    try:
        _check_update_files(run, step, verify=verify)
    except OpdctlError as error:
        return StageStatus(step, "update", "corrupt", f"{error.message} ({error.hint})")
    student = run.student_path(step + 1)
    return StageStatus(step, "update", "done", str(student) if student.is_dir() else "student pruned")


def _check_update_files(run: Run, step: int, *, verify: bool) -> None:
    record = run.update(step)
    _check_state(run, step + 1, verify=verify)
    is_removed = not (run.step_path(step) / "rollout").is_dir()
    if verify and not is_removed and not _same_artifacts(record["inputs"], run.update_input_digests(step)):
        raise files.corrupt_artifact(run.step_path(step), "the update was made from other responses or scores")


def _check_state(run: Run, step: int, *, verify: bool) -> None:
    """Check that the newest student exists and, if `verify`, the student and the trainer state after `step` updates."""
    student, trainer = run.student_path(step), run.trainer_path(step)
    if step == run.current_step() and not student.is_dir():
        raise files.corrupt_artifact(student, "the newest student is missing", f"run `{run.command_line('train')}`")
    if verify and student.is_dir():
        directories.check_directory(student, run.student_digests(step), run.student_hint(step))
    if verify and trainer.is_dir():
        run.check_trainer_state(step)


def _same_artifacts(recorded: Mapping[str, str], present: Mapping[str, str]) -> bool:
    """Whether an update was made from the present artifacts. A plugin may have changed since."""
    return all(recorded.get(name) == digest for name, digest in present.items() if not name.startswith("plugin "))
