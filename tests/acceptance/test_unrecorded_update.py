"""The next rollout begins while an update is being recorded, and writes nothing before: a kill undoes the update."""

import errno
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import QUICKSTART, artifacts, invoke, names, sets
from helpers.forks import fork, wait
from helpers.training import train

from opdctl import environment
from opdctl.artifacts import files
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.run import Run
from opdctl.training import writing

SETTINGS = ("rollout.max_tokens=16", "eval.every_steps=0", "train.steps=3", "train.keep_latest=9")
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(path, *SETTINGS).code == 0
    return path


@pytest.fixture(params=["page cache", "memory"])
def is_held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether engines read the student from memory, as where the run's file system lets writers wait."""
    is_held: bool = request.param == "memory"
    monkeypatch.setattr(environment, "waits_for_storage", lambda path: is_held)
    return is_held


def wait_for_responses(patch: pytest.MonkeyPatch, before_record: Callable[[Path], None], student: int) -> None:
    """Let the update that makes policy version `student` be recorded only when that student has sampled a response.

    before_record: called then, with the directory of the student.
    """
    complete, generate, sampled = writing.complete_student, TransformersEngine.stream_completions, threading.Event()

    def generate_and_report(engine: TransformersEngine, *arguments: Any, **options: Any) -> Any:
        for result in generate(engine, *arguments, **options):
            if engine._directory.path.name == f"step-{student:05d}":
                sampled.set()
            yield result

    def complete_late(path: Path, own: Any) -> dict[str, str]:
        if path.name == f"step-{student:05d}":
            assert sampled.wait(WAIT_SECONDS)
            before_record(path)
        return complete(path, own)

    patch.setattr(writing, "complete_student", complete_late)
    patch.setattr(TransformersEngine, "stream_completions", generate_and_report)


def train_with(output: Path, before_record: Callable[[Path], None], student: int) -> int:
    """Train in a forked process as `wait_for_responses` has it, and return its exit code."""

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            wait_for_responses(patch, before_record, student)
            return train(output, *SETTINGS).code

    return wait(fork(work))


def test_next_rollout_is_sampled_meanwhile_and_not_written(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    output, seen = tmp_path / "run", tmp_path / "seen"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "held"))
    (tmp_path / "held").mkdir()

    def note_files(student: Path) -> None:
        held = list(tmp_path.glob("held/opdctl-*/step-00001/model.safetensors"))
        assert bool(held) == is_held
        assert all(str(path.resolve()).startswith("/memfd:") for path in held)
        seen.write_text("\n".join(sorted(str(path.relative_to(output)) for path in output.rglob("*"))))

    assert train_with(output, note_files, student=1) == 0
    at_the_time = seen.read_text().splitlines()
    assert "student/step-00001/model.safetensors" in at_the_time
    assert "step-00000/update.json" not in at_the_time
    assert not [name for name in at_the_time if name.startswith("step-00001/") and "/." not in name]
    assert not list(tmp_path.glob("held/*"))
    assert artifacts(output) == artifacts(undisturbed)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("student", [1, 2])
def test_run_killed_meanwhile_repeats_the_update(
    undisturbed: Path, tmp_path: Path, is_held: bool, student: int
) -> None:
    output = tmp_path / "run"
    code = train_with(output, lambda path: os.kill(os.getpid(), signal.SIGKILL), student)
    assert code == -signal.SIGKILL
    assert Run.load(output).current_step() == student - 1
    assert not list(output.glob(f"step-{student:05d}/rollout/*"))
    assert invoke("status", output, "--verify").code == 0
    assert train(output, *SETTINGS).code == 0
    assert artifacts(output) == artifacts(undisturbed)
    assert sorted(names(output)) == sorted(names(undisturbed))


def test_signal_meanwhile_ends_the_run_after_the_record(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train_with(output, lambda path: os.kill(os.getpid(), signal.SIGTERM), student=2) == ExitCode.REQUEUE
    assert Run.load(output).current_step() == 2
    assert not list(output.rglob(".tmp-*"))
    assert train(output, *SETTINGS).code == 0
    assert artifacts(output) == artifacts(undisturbed)


def test_full_disk_meanwhile_is_one_error_and_repeats_the_update(
    undisturbed: Path, tmp_path: Path, is_held: bool
) -> None:
    output, flush = tmp_path / "run", files.fsync_path

    def fail(path: Path) -> None:
        if path.parent.name == "step-00002" and path.name == "config.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    with pytest.MonkeyPatch.context() as patch:
        wait_for_responses(patch, lambda path: patch.setattr(files, "fsync_path", fail), student=2)
        result = train(output, *SETTINGS)
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "disk_full"), result.err
    assert Run.load(output).current_step() == 1
    assert not list(output.glob("step-00002/rollout/*"))
    assert train(output, *SETTINGS).code == 0
    assert artifacts(output) == artifacts(undisturbed)


def test_training_without_the_next_rollout_ends_with_the_error_of_the_record(tmp_path: Path, monkeypatch) -> None:
    """No trainer state follows, and no rollout that would wait for the record."""
    output, options = tmp_path / "run", sets(*SETTINGS, "train.save_every_steps=2")
    for command in ("rollout", "score-teacher"):
        assert invoke(command, "--recipe", QUICKSTART, *options, "--output", output).code == 0

    def fail(path: Path, own: Any) -> dict[str, str]:
        time.sleep(0.5)
        raise OpdctlError("disk_full", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(writing, "complete_student", fail)
        result = invoke("train", "--no-fill", "--output", output)
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "disk_full"), result.err
    assert Run.load(output).current_step() == 0
    assert invoke("train", "--no-fill", "--output", output).code == 0
    assert Run.load(output).current_step() == 1
