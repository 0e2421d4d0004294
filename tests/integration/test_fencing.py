"""Processes that were suspended past their leases, at every kind of file that they publish: they change nothing."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import contents, invoke, sets
from helpers.forks import fork, wait

from opdctl import environment
from opdctl.artifacts import files, leases
from opdctl.errors import ExitCode
from opdctl.evaluation import evaluate
from opdctl.training import writing
from opdctl.training.export import StudentExporter

PUBLISHED = {
    "student": "student/step-00001",
    "record of the update": "step-00000/update.json",
    "trainer state in the background": "trainer/step-00001",
    "last trainer state": "trainer/step-00002",
    "last record": "step-00001/update.json",
}

WRITTEN_AT_THE_START = ("recipe.toml", "metrics.jsonl")


def call_when_written(monkeypatch: pytest.MonkeyPatch, wanted: Path, function: Callable[[Path], None]) -> None:
    """Call a function with the temporary path of `wanted`, once, when that is written and not renamed yet."""
    flush, export, copy, called = files.fsync_path, StudentExporter.export, writing.HeldStudent.copy_to, []

    def call(path: Path) -> None:
        if not called and path.parent == wanted.parent and path.name.endswith(f"-{wanted.name}"):
            called.append(path)
            function(path)

    def flush_and_call(path: Path) -> None:
        flush(path)
        call(path)

    def export_and_call(exporter: StudentExporter, directory: Path, *arguments: Any) -> dict[str, int]:
        sizes = export(exporter, directory, *arguments)
        call(directory)
        return sizes

    def copy_and_call(student: writing.HeldStudent, directory: Path) -> Mapping[str, int]:
        sizes = copy(student, directory)
        call(directory)
        return sizes

    monkeypatch.setattr(files, "fsync_path", flush_and_call)
    monkeypatch.setattr(StudentExporter, "export", export_and_call)  # a student is flushed after its rename
    monkeypatch.setattr(writing.HeldStudent, "copy_to", copy_and_call)


@pytest.mark.parametrize(
    ("name", "is_held"),
    [*((name, False) for name in PUBLISHED.values()), ("student/step-00001", True)],
    ids=[*PUBLISHED, "student in memory"],
)
def test_trainer_that_slept_past_its_lease_changes_nothing(
    finished_copy: Path, monkeypatch, name: str, is_held: bool
) -> None:
    """It sleeps before the rename of the file, until another process has the run's lease."""
    monkeypatch.setattr(environment, "waits_for_storage", lambda path: is_held)
    run, seen, heir = finished_copy, dict[str, bytes](), leases.Lease(finished_copy, "train")
    for path in (*run.glob("*/step-0000[12]"), run / "step-00000/update.json", run / "step-00001/update.json"):
        if path.is_dir() and path.parent.name in ("student", "trainer"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()

    def sleep(path: Path) -> None:
        (run / ".train.lock").unlink()  # as the acquisition of a stale lease does
        assert heir.acquire()
        seen.update(contents(run))

    call_when_written(monkeypatch, run / name, sleep)
    result = invoke("train", "--output", run, "--set", "eval.every_steps=0")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "lost_lease"), result.err
    assert contents(run) == {each: data for each, data in seen.items() if "/.tmp-" not in each}
    assert heir.is_held()
    heir.release()


@pytest.mark.parametrize("name", ["student/step-00002", "trainer/step-00002"])
def test_trainer_whose_temporary_files_are_gone_has_lost_its_lease(finished_copy: Path, monkeypatch, name: str) -> None:
    """It sleeps while it writes a directory. The new owner of the lease removes what others have left."""
    run, seen, heir = finished_copy, dict[str, bytes](), leases.Lease(finished_copy, "train")
    for path in (run / "student/step-00002", run / "trainer/step-00002", run / "step-00001/update.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def sleep(path: Path) -> None:
        (run / ".train.lock").unlink()
        assert heir.acquire()
        shutil.rmtree(path)
        seen.update(contents(run))

    call_when_written(monkeypatch, run / name, sleep)
    result = invoke("train", "--output", run, "--set", "eval.every_steps=0")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "lost_lease"), result.err
    assert contents(run) == seen
    heir.release()


def test_trainer_that_slept_before_it_flushed_a_student_has_lost_its_lease(finished_copy: Path, monkeypatch) -> None:
    """The new owner of the lease has removed the student, which has no record."""
    run, complete, heir = finished_copy, writing.complete_update, leases.Lease(finished_copy, "train")
    for path in (run / "student/step-00002", run / "trainer/step-00002", run / "step-00001/update.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {name: data for name, data in contents(run).items() if name not in WRITTEN_AT_THE_START}

    def sleep_and_complete(*arguments: Any) -> str:
        (run / ".train.lock").unlink()
        assert heir.acquire()
        shutil.rmtree(run / "student/step-00002")
        return complete(*arguments)

    monkeypatch.setattr(writing, "complete_update", sleep_and_complete)
    result = invoke("train", "--output", run, "--set", "eval.every_steps=0")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "lost_lease"), result.err
    found = {name: data for name, data in contents(run).items() if name not in WRITTEN_AT_THE_START}
    assert found == before
    heir.release()


EVALUATION = ("eval", "--model", "toy:student", "--bench", "sort12")
EVAL_SETTINGS = sets("eval.limit=4", "eval.max_tokens=8", "eval.num_parts=2", "rollout.engine=transformers")


def test_evaluation_that_slept_past_its_lease_writes_no_summary(tmp_path: Path, monkeypatch) -> None:
    """It sleeps before the rename of the summary, until another process has the lease of the evaluation."""
    flush, seen, heirs = files.fsync_path, {}, []

    def flush_and_sleep(path: Path) -> None:
        flush(path)
        if not seen and path.name.endswith("-summary.json"):
            directory = path.parent
            (directory.parent / f".{directory.name}.lock").unlink()
            heirs.append(leases.Lease(directory.parent, directory.name))
            assert heirs[0].acquire()
            seen.update(contents(tmp_path))

    monkeypatch.setattr(files, "fsync_path", flush_and_sleep)
    result = invoke(*EVALUATION, *EVAL_SETTINGS, "--run", tmp_path)
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "lost_lease"), result.err
    assert contents(tmp_path) == {each: data for each, data in seen.items() if "/.tmp-" not in each}
    heirs[0].release()


def test_evaluation_that_was_replaced_meanwhile_stays_as_it_is(tmp_path: Path, monkeypatch) -> None:
    """It sleeps when it has read the parts; then another process evaluates anew with other settings."""
    summarize, seen = evaluate._summarize_stage, {}

    def summarize_and_sleep(*arguments: Any) -> dict[str, Any]:
        summary = summarize(*arguments)
        if not seen:
            shutil.rmtree(tmp_path / "eval")
            monkeypatch.setattr(evaluate, "_summarize_stage", summarize)
            other = (*EVALUATION, *EVAL_SETTINGS, "--set", "seed=1", "--run", tmp_path)
            assert wait(fork(lambda: invoke(*other).code)) == 0
            seen.update(contents(tmp_path))
        return summary

    monkeypatch.setattr(evaluate, "_summarize_stage", summarize_and_sleep)
    result = invoke(*EVALUATION, *EVAL_SETTINGS, "--run", tmp_path)
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch"), result.err
    assert contents(tmp_path) == seen
