"""Set corrupt artifacts of a run aside, so that the ordinary commands regenerate them."""

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opdctl.artifacts import directories, files
from opdctl.artifacts.manifests import ImportRecord, Manifest, PartRecord, StageHeader, SummaryRecord
from opdctl.artifacts.stage_dir import STAGE_MARKERS, recorded_stage
from opdctl.errors import OpdctlError
from opdctl.recipe.load import load_recorded_recipe
from opdctl.runs.layout import HELD_OUT_FILE, IMPORT_FILE, PROMPTS, PROMPTS_FILE, list_steps, parse_step
from opdctl.runs.run import Run, read_run_record


@dataclass(frozen=True)
class CorruptArtifact:
    """A corrupt part, record of a stage, student or trainer state.

    command: regenerates it, None if no command can. is_required: the run cannot continue without it, so it stays.
    """

    path: Path
    why: str
    command: str | None
    is_required: bool = False


def repair_records(path: Path, *, dry_run: bool) -> list[str]:
    """Set a corrupt recipe.toml or run.json aside, and write a recipe.toml that is missing or corrupt again from
    run.json. Return a line for each change.

    Raises:
        OpdctlError: both are missing or corrupt, or run.json has no recipe, as those of opdctl 0.2.0.
    """
    lines = []
    record = _read_if_intact(path / "run.json", lambda file: read_run_record(file.parent))
    recipe = _read_if_intact(path / "recipe.toml", partial(load_recorded_recipe, purpose="repair"))
    text = record.get("recipe") if record else None
    if recipe is None and text is None:
        raise OpdctlError(
            "missing_run",
            f"{path / 'recipe.toml'}: missing or corrupt, and run.json does not contain the recipe",
            hint=f"write it by `opdctl train --recipe FILE --output {shlex.quote(str(path))}`, with the recipe that "
            "started the run: each student's README.md contains it",
        )
    for value, name in ((record, "run.json"), (recipe, "recipe.toml")):
        if value is None and (path / name).exists():
            lines.append(f"{path / name} is corrupt: moved to {path / 'corrupt'}")
            if not dry_run:
                _move_to_corrupt(path, path / name)
    if recipe is None:
        lines.append(f"{path / 'recipe.toml'} is written from run.json, with the settings that the run started with")
        if not dry_run:
            files.write_text(path / "recipe.toml", str(text))
    return lines


def _read_if_intact(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what is read from a file, None if it is missing or corrupt."""
    try:
        return read(path) if path.exists() else None
    except OpdctlError as error:
        if error.kind not in ("corrupt_artifact", "checksum_mismatch", "invalid_recipe"):
            raise
        return None


def find_corrupt_artifacts(run: Run) -> list[CorruptArtifact]:
    """Return the corrupt prompts, parts, records of stages and updates, summaries, students and trainer states.

    Every file is read. What is missing is not listed: the ordinary command regenerates it.
    """
    artifacts = [*_find_prompts(run), *_find_updates(run)]
    kept_steps = run.kept_steps()
    for step in list_steps(run.path):
        artifacts += _find_in_step(run, step, kept_steps)
    artifacts += _find_states(run)
    for step, directory in list_steps(run.path / "continuations").items():
        command = run.manage_command_line("continuations", step)
        for path in _directories(directory.glob("*")):
            artifacts += _find_in_stage(path, command)
    for path in _directories(run.path.glob("eval/*/*")):
        command = run.evaluation_command_line(path.parent.name, path.name)
        for stage in (path, path / PROMPTS):
            artifacts += _find_in_stage(stage, command)
        artifacts += _find_json(path / "summary.json", SummaryRecord, command)
    for path in sorted(run.path.glob("eval/*/benchmark.json")):
        artifacts += _find_json(path, dict[str, Any], run.evaluation_command_line(path.parent.name))
    for path in sorted(run.path.glob("continuations/step-*/summary.json")):
        command = run.manage_command_line("continuations", parse_step(path.parent.name))
        artifacts += _find_json(path, dict[str, Any], command)
    return artifacts


def _find_prompts(run: Run) -> Iterator[CorruptArtifact]:
    record = read_run_record(run.path)["prompts"]
    for name, digest in ((PROMPTS_FILE, record["sha256"]), (HELD_OUT_FILE, record.get("held_out"))):
        path = run.path / name
        if digest and path.exists() and files.sha256_file(path) != digest:
            yield CorruptArtifact(path, f"{path}: checksum mismatch", run.command_line("train"))


def _find_json(path: Path, form: Any, command: str | None) -> Iterator[CorruptArtifact]:
    """Yield a JSON file if it is corrupt."""
    try:
        if path.exists():
            files.read_json(path, form)
    except OpdctlError as error:
        if error.kind == "unsupported_version":
            raise
        if path.exists():  # otherwise a worker has finished the stage in the meantime
            yield CorruptArtifact(path, error.message, command, is_required=command is None)


def _directories(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_dir() and not path.name.startswith("."))


def _find_in_step(run: Run, step: int, kept_steps: Collection[int]) -> Iterator[CorruptArtifact]:
    can_sample, rollout = run.policy_version(step) in kept_steps, run.step_path(step) / "rollout"
    if corrupt := list(_find_json(rollout / IMPORT_FILE, ImportRecord, None)):
        yield from corrupt
        return
    yield from _find_in_stage(rollout, run.rollout_command_line(step) if can_sample else None)
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
        yield from _find_json(file, forms.get(file, PartRecord), command)


def _find_states(run: Run) -> Iterator[CorruptArtifact]:
    """Yield the corrupt students and trainer states. The newest student is written again from its trainer state."""
    start, current, train = run.start_step, run.current_step(), run.command_line("train")
    unreadable = {int(parse_step(each.path.parent.name) or 0) + 1 for each in _find_updates(run)}
    for step in sorted({*range(max(start, 1), current + 1)} - unreadable):
        is_newest, is_start = step == current, step == start
        trainer, student = run.trainer_path(step), run.student_path(step)
        command = None if is_start else train
        check_trainer = partial(run.check_trainer_state, step)
        yield from _find_in_directory(trainer, check_trainer, command, is_newest and is_start)
        command = train if is_newest and not is_start else None
        yield from _find_in_directory(student, partial(_check_student, run, step), command, is_newest and is_start)


def _check_student(run: Run, step: int) -> None:
    directories.check_directory(run.student_path(step), run.student_digests(step))


def _find_updates(run: Run) -> Iterator[CorruptArtifact]:
    """Yield the corrupt records of updates. Training makes the last update again; of an earlier one only the metrics
    are lost."""
    for step in run.finished_steps():
        try:
            run.update(step)
        except OpdctlError as error:
            if error.kind == "unsupported_version":
                raise
            is_last = step == run.current_step() - 1
            yield CorruptArtifact(run.update_path(step), error.message, run.command_line("train") if is_last else None)


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
            moved.append(_move_to_corrupt(run.path, artifact.path))
    return moved


def _move_to_corrupt(run_dir: Path, path: Path) -> Path:
    target = run_dir / "corrupt" / path.relative_to(run_dir)
    files.make_directory(target.parent)
    files.discard(target)
    path.rename(target)
    return target
