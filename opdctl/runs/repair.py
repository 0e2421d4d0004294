"""Set corrupt artifacts of a run aside, so that the ordinary commands regenerate them."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opdctl.artifacts import directories, files
from opdctl.artifacts.manifests import Manifest, PartRecord, StageHeader
from opdctl.artifacts.stage_dir import STAGE_MARKERS, recorded_stage
from opdctl.errors import OpdctlError
from opdctl.runs.layout import PROMPTS, list_steps
from opdctl.runs.run import Run


@dataclass(frozen=True)
class CorruptArtifact:
    """A corrupt part, record of a stage, student or trainer state.

    command: regenerates it, None if no command can. is_required: the run cannot continue without it, so it stays.
    """

    path: Path
    why: str
    command: str | None
    is_required: bool = False


def find_corrupt_artifacts(run: Run) -> list[CorruptArtifact]:
    """Return the corrupt parts and records of all stages, and the corrupt students and trainer states.

    Every file is read. What is missing is not listed: the ordinary command regenerates it.
    """
    artifacts: list[CorruptArtifact] = []
    kept_steps = run.kept_steps()
    for step in list_steps(run.path):
        artifacts += _find_in_step(run, step, kept_steps)
    artifacts += _find_states(run)
    for step, directory in list_steps(run.path / "continuations").items():
        command = run.manage_command_line("continuations", step)
        for path in _directories(directory.glob("*")):
            artifacts += _find_in_stage(path, command)
    for path in _directories(run.path.glob("eval/*/*")):
        for stage in (path, path / PROMPTS):
            artifacts += _find_in_stage(stage, f"{run.command_line('eval')} --bench {path.parent.name}")
    return artifacts


def _directories(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_dir() and not path.name.startswith("."))


def _find_in_step(run: Run, step: int, kept_steps: Collection[int]) -> Iterator[CorruptArtifact]:
    can_sample = run.policy_version(step) in kept_steps
    yield from _find_in_stage(
        run.step_path(step) / "rollout", run.command_line("rollout", step) if can_sample else None
    )
    for name in run.scorers():
        command = f"{run.command_line('score-teacher', step)} --only {name}"
        yield from _find_in_stage(run.step_path(step) / name, command)


def _find_in_stage(path: Path, command: str | None) -> Iterator[CorruptArtifact]:
    """Yield the corrupt records of a stage or, if there are none, its corrupt parts."""
    records = list(_find_records(path, command))
    yield from records
    stage = None if records else recorded_stage(path, command or "opdctl rollout")
    if stage is None:
        return
    for index, why in stage.corrupted_parts().items():
        part = path / stage.names[index]
        if part.exists() or part.is_symlink():
            yield CorruptArtifact(part, why, command, is_required=command is None)


def _find_records(path: Path, command: str | None) -> Iterator[CorruptArtifact]:
    """Yield the corrupt JSON files of a stage. Without them its parts count as missing."""
    forms: dict[Path, type] = dict(zip((path / name for name in STAGE_MARKERS), (StageHeader, Manifest), strict=True))
    for file in [*forms, *sorted(path.glob("part-*.receipt.json"))]:
        try:
            if file.exists():
                files.read_json(file, forms.get(file, PartRecord))
        except OpdctlError as error:
            if error.kind == "unsupported_version":
                raise
            if file.exists():  # otherwise a worker has finished the stage in the meantime
                yield CorruptArtifact(file, error.message, command, is_required=command is None)


def _find_states(run: Run) -> Iterator[CorruptArtifact]:
    """Yield the corrupt students and trainer states. The newest student is written again from its trainer state."""
    start, current, train = run.start_step, run.current_step(), run.command_line("train")
    for step in range(max(start, 1), current + 1):
        is_newest, is_start = step == current, step == start
        trainer, student = run.trainer_path(step), run.student_path(step)
        command = None if is_start else train
        check_trainer = partial(run.check_trainer_state, step)
        yield from _find_in_directory(trainer, check_trainer, command, is_newest and is_start)
        command = train if is_newest and not is_start else None
        check_student = partial(directories.check_directory, student, run.student_digests(step))
        yield from _find_in_directory(student, check_student, command, is_newest and is_start)


def _find_in_directory(
    path: Path, check: Callable[[], object], command: str | None, is_required: bool
) -> Iterator[CorruptArtifact]:
    if path.is_dir():
        try:
            check()
        except OpdctlError as error:
            if error.kind == "unsupported_version":
                raise
            yield CorruptArtifact(path, error.message, command, is_required)


def set_aside(run: Run, artifacts: list[CorruptArtifact]) -> list[Path]:
    """Move the artifacts that the run can continue without to its directory `corrupt`, and return their new paths."""
    moved = []
    for artifact in artifacts:
        if not artifact.is_required:
            target = run.path / "corrupt" / artifact.path.relative_to(run.path)
            files.make_directory(target.parent)
            files.discard(target)
            artifact.path.rename(target)
            moved.append(target)
    return moved
