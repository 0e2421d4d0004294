"""A fork that is killed at any moment leaves either no run or the complete one, and the other run as it was."""

import itertools
import shutil
import signal
from pathlib import Path

import pytest
from helpers.commands import contents, invoke
from helpers.forks import kill_at_change

from opdctl.runs.run import Run


def killed_at(moment: int, *command: object) -> bool:
    """Run a command that is killed before its `moment`-th change of a directory. Return whether it came so far."""
    return kill_at_change(moment, lambda: invoke(*command).code) == -signal.SIGKILL


@pytest.mark.parametrize("start", [0, 1, 2])
def test_killed_fork_is_complete_or_absent_and_a_second_one_ends_the_same(finished_run, tmp_path, start):
    run, new = Path(shutil.copytree(finished_run, tmp_path / "run")), tmp_path / "fork"
    before, ends, killed = contents(run), [], True
    command = ("run", "fork", run, new, "--set", "weight.gamma=0.7")
    for moment in itertools.count(start, 3):
        shutil.rmtree(new, ignore_errors=True)
        killed = killed_at(moment, *command)
        again = invoke(*command)
        assert again.code == 0 or again.kind == "unusable_output", again.err
        assert contents(run) == before
        assert Run.load(new).student_at(2)
        ends.append(contents(new))
        if not killed:
            break
    assert len(ends) > 5
    assert all(end == ends[-1] for end in ends)
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("start", [0, 1])
def test_killed_repair_is_completed_by_a_second_one(finished_run, tmp_path, start):
    run = tmp_path / "run"
    for moment in itertools.count(start, 2):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished_run, run)
        parts = sorted(run.glob("step-0000?/teacher/part-*"))
        for part in parts:
            part.write_bytes(part.read_bytes()[:-1])
        killed = killed_at(moment, "run", "repair", run)
        assert invoke("run", "repair", run).code == 0
        assert not any(part.exists() for part in parts)
        assert len(list((run / "corrupt").rglob("part-*"))) == len(parts)
        if not killed:
            break
    assert moment > 2
