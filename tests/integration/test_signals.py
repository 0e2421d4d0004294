"""Signals and Ctrl-C in the middle of a stage: finished parts are kept, leases and temporary files are not."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICKSTART, artifacts, contents, invoke, sets
from helpers.forks import fork, wait

from opdctl.artifacts.leases import Lease
from opdctl.cli import session
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode

SIGNALS = [
    (signal.SIGTERM, ExitCode.REQUEUE),
    (signal.SIGUSR1, ExitCode.REQUEUE),
    (signal.SIGINT, ExitCode.INTERRUPTED),
]
SETTINGS = sets("rollout.max_tokens=40", "rollout.num_parts=4", "train.steps=1")


@pytest.fixture(autouse=True)
def restored_handlers():
    """Commands install handlers of this process; restore those of the test runner."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signal_at_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, number: int) -> None:
    """Let this process get a signal in the `call`-th call of a method, after the work of the call."""
    method, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        result = method(*arguments, **options)
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, interrupted)


def check_clean(run: Path) -> None:
    hidden = [path for path in run.rglob(".*") if path.name != ".gitignore"]
    assert hidden == []
    assert not list(run.glob("heartbeats/*"))


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize(
    ("command", "owner", "method", "stage"),
    [
        ("rollout", TransformersEngine, "stream_completions", "rollout"),
        ("score-teacher", TransformersEngine, "stream_scores", "teacher"),
    ],
)
def test_signal_in_the_third_part_keeps_two(tmp_path, monkeypatch, number, code, command, owner, method, stage):
    run, whole = tmp_path / "run", tmp_path / "whole"
    for path in (run, whole):
        if command == "score-teacher":
            assert invoke("rollout", "--recipe", QUICKSTART, *SETTINGS, "--output", path).code == 0
    assert invoke(command, "--recipe", QUICKSTART, *SETTINGS, "--output", whole).code == 0
    with monkeypatch.context() as patch:
        signal_at_call(patch, owner, method, 3, number)
        result = invoke(command, "--recipe", QUICKSTART, *SETTINGS, "--output", run)
    assert result.code == code
    assert "finished parts are kept" in result.err
    assert "Traceback" not in result.err
    check_clean(run)
    assert len([path for path in (run / "step-00000" / stage).glob("part-*") if "receipt" not in path.name]) == 2
    again = invoke(command, "--output", run, "--json")
    assert (again.code, again.json()["parts_made"]) == (0, 2)
    assert contents(run / "step-00000" / stage) == contents(whole / "step-00000" / stage)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_in_an_update_loses_that_update_only(finished_copy, monkeypatch, number, code):
    before = contents(finished_copy)
    more = ("--output", finished_copy, "--set", "train.steps=3", "--set", "eval.every_steps=0")
    with monkeypatch.context() as patch:
        signal_at_call(patch, torch.optim.AdamW, "step", 1, number)
        result = invoke("train", *more)
    assert result.code == code
    check_clean(finished_copy)
    after = contents(finished_copy)
    assert {name for name in before if after[name] != before[name]} == {"recipe.toml"}
    assert not (finished_copy / "step-00002/update.json").exists()
    assert invoke("train", *more).code == 0
    assert invoke("status", finished_copy, "--verify").code == 0


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_in_an_evaluation(finished_copy, monkeypatch, number, code):
    before = contents(finished_copy)
    command = ("eval", "--output", finished_copy, "--set", "eval.samples=2", "--set", "eval.num_parts=2")
    for path in (finished_copy / "eval").rglob("step-00002"):
        shutil.rmtree(path)
    with monkeypatch.context() as patch:
        signal_at_call(patch, TransformersEngine, "stream_completions", 2, number)
        assert invoke(*command).code == code
    check_clean(finished_copy)
    assert invoke(*command).code == 0
    assert contents(finished_copy / "student") == {
        name.removeprefix("student/"): data for name, data in before.items() if name.startswith("student/")
    }


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_during_the_cleanup(tmp_path, monkeypatch, number, code):
    """A repeated SIGTERM or SIGUSR1 is ignored; a second Ctrl-C ends the process, as a kill would."""
    output = tmp_path / "run"
    signal_at_call(monkeypatch, Lease, "release", 2, number)  # of the part in work; the first one was complete
    signal_at_call(monkeypatch, TransformersEngine, "stream_completions", 2, number)
    command = ("rollout", "--recipe", QUICKSTART, *SETTINGS, "--output", output)
    assert wait(fork(lambda: invoke(*command).code)) == code
    monkeypatch.undo()
    assert invoke(*command).code == 0
    assert invoke("rollout", "--recipe", QUICKSTART, *SETTINGS, "--output", tmp_path / "other").code == 0
    assert artifacts(output) == artifacts(tmp_path / "other")


def test_handlers_of_repeated_signals(monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(session, "_stop_signal", "")
    monkeypatch.setattr(session, "_is_interrupted", False)
    with pytest.raises(session.StopRequested):
        session._request_stop(signal.SIGTERM, None)
    session._request_stop(signal.SIGUSR1, None)
    assert session._stop_signal == "SIGTERM"
    with pytest.raises(KeyboardInterrupt):
        session._interrupt(signal.SIGINT, None)
    assert codes == []
    with pytest.raises(KeyboardInterrupt):  # since the process did not end here
        session._interrupt(signal.SIGINT, None)
    assert codes == [ExitCode.INTERRUPTED]


def test_interrupt_before_the_command_begins_is_quiet():
    program = "import os, runpy, sys\n"
    program += "sys.meta_path.insert(0, type('Slow', (), {'find_spec': lambda *a: os.kill(os.getpid(), 2) "
    program += "if a[1] == 'opdctl.cli.main' else None})())\n"
    program += "sys.argv = ['opdctl', 'list', 'weights']; runpy.run_module('opdctl', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
