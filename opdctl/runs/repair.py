"""Set corrupt artifacts of a run aside, so that the ordinary commands make them again."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from opdctl.artifacts import directories, files
from opdctl.artifacts.stage_dir import StageDir, recorded_stage
from opdctl.errors import OpdctlError
from opdctl.runs.layout import list_steps
from opdctl.runs.run import Run


@dataclass(frozen=True)
class CorruptArtifact:
    """A corrupt part or directory. command: makes it again; None if that is impossible, as its policy was pruned."""

    path: Path
    why: str
    command: str | None


def find_corrupt_artifacts(run: Run) -> list[CorruptArtifact]:
    """Return the corrupt parts of all stages, and the newest student and the trainer states if they are corrupt.

    Every file is read. A part that is missing is not listed: the ordinary command makes it.
    """
    artifacts: list[CorruptArtifact] = []
    for step in list_steps(run.path):
        artifacts += _find_in_step(run, step)
    artifacts += _find_states(run)
    for step, directory in list_steps(run.path / "continuations").items():
        command = f"opdctl run continuations {shlex.quote(str(run.path))} --step {step}"
        for path in _directories(directory.glob("*")):
            artifacts += _find_in_stage(recorded_stage(path, command), command)
    for path in _directories(run.path.glob("eval/*/*")):
        command = f"{run.command_line('eval')} --bench {path.parent.name}"
        artifacts += _find_in_stage(recorded_stage(path, command), command)
    return artifacts


def _directories(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_dir() and not path.name.startswith("."))


def _find_in_step(run: Run, step: int) -> Iterator[CorruptArtifact]:
    command = run.command_line("rollout", step)
    can_sample = run.policy_version(step) in run.kept_steps()
    yield from _find_in_stage(recorded_stage(run.step_path(step) / "rollout", command), command if can_sample else None)
    for name in run.scorers():
        command = f"{run.command_line('score-teacher', step)} --only {name}"
        yield from _find_in_stage(recorded_stage(run.step_path(step) / name, command), command)


def _find_in_stage(stage: StageDir | None, command: str | None) -> Iterator[CorruptArtifact]:
    if stage is None:
        return
    for index, why in stage.corrupted_parts().items():
        path = stage.path / stage.names[index]
        if path.exists() or path.is_symlink():
            yield CorruptArtifact(path, why, command)


def _find_states(run: Run) -> Iterator[CorruptArtifact]:
    """Yield the corrupt trainer states, and the newest student if it is corrupt. Older students are not read again."""
    current = run.current_step()
    for step in list_steps(run.path / "trainer"):
        if run.start_step < step <= current:
            yield from _find_in_directory(run, run.trainer_path(step), run.trainer_digests(step))
    if current > run.start_step:
        yield from _find_in_directory(run, run.student_path(current), run.student_digests(current))


def _find_in_directory(run: Run, path: Path, digests: Mapping[str, str]) -> Iterator[CorruptArtifact]:
    if path.is_dir():
        try:
            directories.check_directory(path, digests)
        except OpdctlError as error:
            yield CorruptArtifact(path, error.message, run.command_line("train"))


def set_aside(run: Run, artifacts: list[CorruptArtifact]) -> list[Path]:
    """Move the artifacts that can be made again to the directory `corrupt` of the run, and return their new paths."""
    moved = []
    for artifact in artifacts:
        if artifact.command is not None:
            target = set_aside_path(run, artifact.path)
            files.make_directory(target.parent)
            files.discard(target)
            artifact.path.rename(target)
            moved.append(target)
    return moved


def set_aside_path(run: Run, path: Path) -> Path:
    """Return where a corrupt artifact of a run is moved to."""
    return run.path / "corrupt" / path.relative_to(run.path)
