"""Signals and Ctrl-C in the middle of a stage: finished parts are kept, leases and temporary files are not."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import QUICKSTART, artifacts, contents, invoke, sets
from helpers.forks import fork, wait

from opdctl.artifacts.leases import Lease
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.models.decoding import DecodeBatch
from opdctl.runs import status

SIGNALS = [
    (signal.SIGTERM, ExitCode.REQUEUE),
    (signal.SIGUSR1, ExitCode.REQUEUE),
    (signal.SIGINT, ExitCode.INTERRUPTED),
]
SETTINGS = sets("rollout.max_tokens=40", "rollout.num_parts=4", "train.steps=1")


def signal_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int) -> None:
    """Let this process get a signal in the `call`-th call of a method, after the work of the call."""
    call_after(monkeypatch, owner, name, call, lambda: os.kill(os.getpid(), number))


def call_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, function: Callable[[], None]) -> None:
    """Call a function at the end of the `call`-th call of a method."""
    method, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        result = method(*arguments, **options)
        calls.append(1)
        if len(calls) == call:
            function()
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


class Dropped:
    """Gets a signal in `__del__`, where Python ignores the exception of the handler."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def ignore() -> None:
    Dropped()


def catch() -> None:
    """As a library that catches everything."""
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)


def replace() -> None:
    """As a library that wraps every exception."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        raise RuntimeError("interrupted") from None


@pytest.mark.parametrize("swallow", [ignore, catch, replace])
@pytest.mark.parametrize(
    ("command", "owner", "method", "files"),
    [
        (("rollout", "--step", 1), DecodeBatch, "feed", "step-00001/rollout/part-*"),
        (("score-teacher", "--step", 1), TransformersEngine, "_score_batch", "step-00001/teacher/part-*"),
        (("train", "--set", "train.steps=3"), torch.optim.AdamW, "step", "student/step-00003"),
        (("status",), status, "collect_status", "nothing"),  # its last work
    ],
    ids=["rollout", "score-teacher", "train", "status"],
)
def test_swallowed_signal_stops_the_command(finished_copy, monkeypatch, swallow, command, owner, method, files):
    for path in finished_copy.glob(files):
        path.unlink()
    name, *options = command
    words = (name, finished_copy) if name == "status" else (name, "--output", finished_copy, *options)
    with monkeypatch.context() as patch:
        call_after(patch, owner, method, 1, swallow)
        result = invoke(*words)
    assert result.code == ExitCode.REQUEUE, result.err
    assert "Stopped by SIGTERM" in result.err
    assert "Traceback" not in result.err
    check_clean(finished_copy)
    assert not list(finished_copy.glob(files))
    assert invoke(*words).code == 0
    assert list(finished_copy.glob(files)) or files == "nothing"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_before_the_command_begins_is_quiet(number, code):
    program = "import os, runpy, sys\n"
    program += f"sys.meta_path.insert(0, type('Slow', (), dict(find_spec=lambda *a: os.kill(os.getpid(), {number:d}) "
    program += "if a[1] == 'opdctl.cli.main' else None))())\n"
    program += "sys.argv = ['opdctl', 'list', 'weights']; runpy.run_module('opdctl', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_at_the_end_of_the_interpreter_changes_nothing(number):
    program = "import os, runpy, sys\n"
    program += f"class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, {number:d})\n"
    program += "import opdctl; opdctl.late = Late()\n"
    program += "sys.argv = ['opdctl', 'list', 'weights']; runpy.run_module('opdctl', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
