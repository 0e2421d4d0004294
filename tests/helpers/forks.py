"""Forked processes, which have the libraries loaded, and kills at a chosen change of a directory."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

MAX_WAIT_SECONDS = 240.0  # for a process that should end
CHANGES = ("replace", "rename", "unlink", "rmdir", "link")
"""Functions of `os`. Parts, manifests and directories are created and removed by these only, so a kill between two of
them leaves the same names."""


def fork(function: Callable[[], int]) -> int:
    """Call a function in a forked process, which ends with the exit code that it returns. Return the process id."""
    if child := os.fork():
        return child
    code = 99
    try:
        code = function()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int | None:
    """Return the exit code of a child, or minus the number of the signal that killed it, or None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def wait(pid: int) -> int:
    """Wait for a child, and return its exit code. One that does not end prints where it is, and the test fails."""
    end = time.monotonic() + MAX_WAIT_SECONDS
    while (code := exit_code(pid)) is None:
        if time.monotonic() > end:
            abort(pid)
            pytest.fail(f"process {pid} did not end in {MAX_WAIT_SECONDS:g} seconds")
        time.sleep(0.01)
    return code


def abort(pid: int) -> None:
    """End a child by a signal at which pytest's faulthandler prints the stack of each of its threads."""
    os.kill(pid, signal.SIGABRT)
    os.waitpid(pid, 0)


def kill_at_change(moment: int | None, function: Callable[[], int], changes: Sequence[str] = CHANGES) -> int:
    """Call a function in a forked process that is killed before its `moment`-th change of a directory.

    moment: None for no kill. Return the process's exit code.
    """
    return wait(fork(lambda: _call_until(moment, function, changes)))


def _call_until(moment: int | None, function: Callable[[], int], changes: Sequence[str]) -> int:
    count = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return change

    for name in changes:
        setattr(os, name, counted(getattr(os, name)))
    return function()
