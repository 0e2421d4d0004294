"""What a signal does, by the phase of a command, and when its exception is raised again."""

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from opdctl import signals
from opdctl.errors import ExitCode
from opdctl.signals import StopRequested


class Exited(BaseException):
    """In the place of the end of this process. Its argument is the exit code."""


@pytest.fixture(autouse=True)
def handlers(monkeypatch) -> Iterator[None]:
    """Install the handlers, at the start of a process."""
    before = {number: signal.getsignal(number) for number in signals.SIGNAL_CODES}

    def end_process(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", end_process)
    monkeypatch.setattr(signals, "_phase", "loading")
    monkeypatch.setattr(signals, "_received", None)
    signals.install_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Dropped:
    """Sends a signal to this process when it is garbage-collected, where an exception is ignored."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "code"), signals.SIGNAL_CODES.items())
def test_signal_while_the_program_is_loaded_ends_it_with_its_code(number, code):
    with pytest.raises(Exited) as exited:
        signal.raise_signal(number)
    assert exited.value.args == (code,)


def run(work: Callable[[], object]) -> None:
    with signals.raise_signals():
        work()


@pytest.mark.parametrize(("number", "code"), signals.SIGNAL_CODES.items())
def test_ignored_exception_is_raised_again(number, code, capsys):
    def work() -> None:
        signals.check()
        Dropped(number)
        signals.check()

    with pytest.raises(StopRequested) as stop:
        run(work)
    assert (stop.value.name, stop.value.exit_code) == (signal.Signals(number).name, code)
    assert capsys.readouterr().err == ""


def test_repeated_signal_is_raised_again_if_the_first_was_ignored():
    def work() -> None:
        Dropped(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(StopRequested) as stop:
        run(work)
    assert stop.value.name == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_cleanup_is_not_disturbed(number):
    steps = []

    def clean_up() -> Iterator[None]:
        try:
            yield
        finally:
            signal.raise_signal(number)
            signals.check()
            steps.append("generator")

    def work() -> None:
        generator = clean_up()
        next(generator)
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            signals.check()
            generator.close()
            steps.append("block")

    with pytest.raises(StopRequested):
        run(work)
    assert steps == ["generator", "block"]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_in_the_cleanup_ends_the_process(first):
    def work() -> None:
        try:
            signal.raise_signal(first)
        finally:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Exited) as exited:
        run(work)
    assert exited.value.args == (signals.SIGNAL_CODES[first],)


def test_signal_after_the_command_changes_nothing():
    run(lambda: None)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Exited) as exited:
        signal.raise_signal(signal.SIGINT)
    assert exited.value.args == (ExitCode.INTERRUPTED,)


def test_other_threads_finish_their_files():
    checked = []

    def check() -> None:
        signals.check()
        checked.append(threading.current_thread())

    def work() -> None:
        Dropped(signal.SIGTERM)
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
        signals.check()

    with pytest.raises(StopRequested):
        run(work)
    assert len(checked) == 1
