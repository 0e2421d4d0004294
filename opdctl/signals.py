"""Signals that end a command: SIGTERM, SIGUSR1 and Ctrl-C.

A handler remembers the signal and raises an exception at once. The interpreter ignores an exception in a `__del__` or a
weakref callback, and libraries catch every exception in places. So `check` raises it again wherever a command can stop:
for each batch, before each rename, in each poll of what others do, and before a command ends.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Literal

from opdctl.errors import ExitCode

EPISODE_THREAD = "episode "
"""How the name of a thread starts that plays an episode and may hang: the end of a command does not wait for it."""
SIGNAL_CODES = {
    signal.SIGTERM: ExitCode.REQUEUE,
    signal.SIGUSR1: ExitCode.REQUEUE,
    signal.SIGINT: ExitCode.INTERRUPTED,
}


class StopRequested(KeyboardInterrupt):
    """This process got a signal. Libraries let a KeyboardInterrupt pass more often than other exceptions."""

    def __init__(self, number: int):
        super().__init__(number)
        self.name, self.exit_code = signal.Signals(number).name, SIGNAL_CODES[signal.Signals(number)]


_received: int | None = None  # the first signal of this command
_phase: Literal["loading", "running", "ending"] = "loading"


def install_handlers() -> None:
    """Handle the signals. Until `raise_signals`, one ends the process with its exit code, without a message."""
    for number in SIGNAL_CODES:
        signal.signal(number, _handle)


def ignore_signals() -> None:
    """Ignore the signals. The interpreter's end would restore the system's action, which loses the exit code."""
    for number in SIGNAL_CODES:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def raise_signals() -> Iterator[None]:
    """Raise StopRequested in the block at the first signal.

    After the block the exit code is decided: a later signal does not change it.
    """
    global _received, _phase
    report = sys.unraisablehook
    sys.unraisablehook = lambda ignored: None if ignored.exc_type is StopRequested else report(ignored)
    _received, _phase = None, "running"
    try:
        yield
    finally:
        _phase = "ending"
        sys.unraisablehook = report


def _handle(number: int, frame: FrameType | None) -> None:
    """Act by phase. A scheduler may repeat its signal while this process cleans up: that changes nothing.

    A second Ctrl-C ends the process, as a kill would.
    """
    global _received
    is_repeated = _received is not None or _phase == "ending"
    if _phase == "loading" or (number == signal.SIGINT and is_repeated):
        os._exit(SIGNAL_CODES[signal.Signals(_received or number)])
    if _phase == "running" and not _is_stopping():
        _received = _received or number
        raise StopRequested(_received)


def check() -> None:
    """Raise again what a signal raised, unless the caller already cleans up. Only the main thread does.

    Raises:
        StopRequested: this command got a signal.
    """
    if _received is not None and threading.current_thread() is threading.main_thread() and not _is_stopping():
        raise StopRequested(_received)


def received() -> StopRequested | None:
    """Return the signal that this command got, None if it got none."""
    return None if _received is None else StopRequested(_received)


def _is_stopping() -> bool:
    """Whether the caller is in a `finally` or `except` block, or in an exit of a context, of a StopRequested."""
    error = sys.exception()
    while error is not None and not isinstance(error, StopRequested):
        error = error.__context__
    return error is not None
