"""Runs side by side, and the run that a command takes without an argument."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.commands import invoke, rewrite_json

from opdctl.artifacts import leases
from opdctl.pipeline.overview import summarize_run
from opdctl.runs.run import Run


@pytest.fixture
def runs(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder runs/ with a finished run, and a broken one that was changed before."""
    folder = tmp_path / "runs"
    (folder / "broken").mkdir(parents=True)
    (folder / "broken/run.json").write_text("{")
    (folder / "broken/recipe.toml").write_text("")
    os.utime(folder / "broken", (0, 0))
    (folder / "good").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    return folder


def test_best_student_is_the_earliest_of_the_highest_accuracy(finished_copy: Path) -> None:
    for step, accuracy in enumerate((0.25, 0.5, 0.5)):
        rewrite_json(finished_copy / f"eval/sort12/step-{step:05d}/summary.json", avg=accuracy)
    seen = summarize_run(Run.load(finished_copy))
    assert (seen.newest, seen.best, seen.steps_done, seen.steps) == ((2, 0.5), (1, 0.5), 2, 2)
    files = [path for path in finished_copy.rglob("*") if path.is_file()]
    assert seen.bytes == sum(path.stat().st_size for path in files)
    status = invoke("status", finished_copy).out
    assert f"{finished_copy}/student/step-00001  (50.0% @1)" in status
    assert f"{finished_copy}/student/step-00002\n" in status


def test_state_of_a_run(finished_copy: Path) -> None:
    def state() -> str:
        return str(invoke("status", finished_copy, "--json").json()["state"])

    assert state() == "finished"
    with leases.hold_lease(finished_copy, "train"):
        assert state() == "running"
    (finished_copy / "step-00001/update.json").unlink()
    assert state() == "stopped"


def test_status_as_json_names_students_and_size(finished_copy: Path) -> None:
    rewrite_json(finished_copy / "eval/sort12/step-00001/summary.json", avg=0.99)
    seen = invoke("status", finished_copy, "--json").json()
    assert seen["newest_student"] == f"{finished_copy}/student/step-00002"
    assert (seen["best"], seen["best_student"]) == ([1, 0.99], f"{finished_copy}/student/step-00001")
    assert seen["bytes"] == sum(path.stat().st_size for path in finished_copy.rglob("*") if path.is_file())
    shutil.rmtree(finished_copy / "student/step-00001")
    assert invoke("status", finished_copy, "--json").json()["best_student"] is None
    assert "pruned  (99.0% @1)" in invoke("status", finished_copy).out


def test_folder_of_runs_is_listed(runs: Path, finished_run: Path) -> None:
    """A run that cannot be read does not hide the others."""
    for arguments in (["status", runs], ["list", "runs"]):
        shown = invoke(*arguments)
        assert shown.code == 0, shown.err
        row = next(line for line in shown.out.splitlines() if "good" in line)
        assert "2/2" in row
        assert "finished" in row
        assert "broken/run.json" in shown.err
        (listed,) = invoke(*arguments, "--json").json()["runs"]
        expected = summarize_run(Run.load(finished_run))
        assert (listed["run"][-4:], tuple(listed["best"]), listed["bytes"]) == ("good", expected.best, expected.bytes)
