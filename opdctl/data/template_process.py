"""A process that renders a chat template with limits on time, memory and the length of its result. Imports no torch.

A template is a program of the model's author. Its loops may not end, and one expression of it may take all memory in a
function of C, which nothing in its own process can interrupt. The process is a fork, which takes milliseconds and has
the tokenizer already. It renders one request after another, and the system ends it at its limit of processor time.
"""

import contextlib
import json
import os
import signal
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from opdctl.errors import summarize_exception

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS, MEAN_CPU_SECONDS = 2.0, 0.1
"""Limits on the processor time of one prompt, and on the mean of many. Most take less than 0.001 s."""
MAX_WAIT_SECONDS = 60.0
"""For a prompt. A process that waits, as for a lock that another thread held at the fork, takes no processor time."""
MAX_EXTRA_BYTES = 2**28
"""Of memory, more than the process has at its start."""
MAX_CHARS, MAX_GROWTH = 2**20, 8
"""A rendered prompt may have this many characters more, and times as many, than its messages and arguments."""
MAX_REASON_CHARS = 300
IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal sends them to all processes. This one ends with its parent."""


class TemplateError(Exception):
    """A template cannot be rendered, or exceeds a limit. The message is a predicate: its subject is the template."""


class TemplateProcess:
    """Renders chats with the chat template of a tokenizer, or with another template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None):
        self._connection, other_end = Pipe()
        process_id = os.fork()
        if not process_id:
            _serve(tokenizer, chat_template, other_end, self._connection)
        other_end.close()
        self._end = weakref.finalize(self, _end_process, os.getpid(), process_id, self._connection)
        self._reason = ""
        self._ahead: deque[tuple[Any, Any]] = deque()

    def send_ahead(self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
        """Let the process render chats, (messages, arguments) each, that `render` is called with next, in this order.

        The change of processes for each chat takes longer than most templates.
        """
        self._drop_ahead()
        self._send(chats)
        self._ahead.extend(chats)

    def render(self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """Return the text of a chat, and whether the template read the clock.

        Raises:
            TemplateError: the template fails, or has exceeded a limit for this chat or an earlier one.
        """
        if self._ahead and self._ahead[0] == (messages, arguments):
            self._ahead.popleft()
            return self._receive()
        self._drop_ahead()
        self._send([(messages, arguments)])
        return self._receive()

    def _send(self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
        if not self._reason:
            with contextlib.suppress(ConnectionError):  # `_receive` reports why the process has ended
                self._connection.send([*chats])

    def _drop_ahead(self) -> None:
        while self._ahead:
            self._ahead.popleft()
            with contextlib.suppress(TemplateError):
                self._receive()

    def _receive(self) -> tuple[str, bool]:
        if self._reason:
            raise TemplateError(self._reason)
        try:
            if not self._connection.poll(MAX_WAIT_SECONDS):
                self._end()
                self._reason = f"does not finish within {MAX_WAIT_SECONDS:g} s"
                raise TemplateError(self._reason)
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._reason = _describe_end(self._end())
            raise TemplateError(self._reason) from None
        if isinstance(answer, str):
            raise TemplateError(answer)
        text, reads_clock = answer
        return text, reads_clock


def _describe_end(status: int | None) -> str:
    """Return why a process ended that was still needed. status: as of `os.waitpid`."""
    if status is None or not os.WIFSIGNALED(status):
        return "ends the process that renders it"
    if os.WTERMSIG(status) == signal.SIGPROF:
        return f"takes more than {CPU_SECONDS:g} s of processor time, or {MEAN_CPU_SECONDS:g} s a prompt on average"
    return f"ends the process that renders it by signal {os.WTERMSIG(status)}"


def _end_process(parent_id: int, process_id: int, connection: Connection) -> int | None:
    """End and reap a process. Return its status. In a fork of its parent nothing is done."""
    if os.getpid() != parent_id:
        return None
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
    return os.waitpid(process_id, 0)[1]


def _serve(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str | None, connection: Connection, parents_end: Connection
) -> NoReturn:
    """Render requests until the parent closes the connection, or ends."""
    try:
        parents_end.close()
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        _limit_memory()
        while True:
            for messages, arguments in connection.recv():
                remaining, _ = signal.getitimer(signal.ITIMER_PROF)
                signal.setitimer(signal.ITIMER_PROF, min(remaining + MEAN_CPU_SECONDS, CPU_SECONDS))
                connection.send_bytes(
                    json.dumps(_render(tokenizer, messages, {"chat_template": chat_template, **arguments})).encode()
                )
    finally:
        os._exit(0)  # nothing of the parent's end, such as buffered output, belongs to this process


def _limit_memory() -> None:
    """Limit the memory of this process. Without /proc, as on macOS, there is no limit."""
    import resource  # not on every system

    statm = Path("/proc/self/statm")  # proc_pid_statm(5): the first number is the size in pages
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MAX_EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> tuple[str, bool] | str:
    """Return what `TemplateProcess.render` returns, or the message of its error."""
    readings = []

    def strftime_now(form: str) -> str:
        readings.append(form)
        return datetime.now().strftime(form)

    try:
        arguments = {"strftime_now": strftime_now, **arguments}
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    except MemoryError:
        return f"needs more than {MAX_EXTRA_BYTES >> 20} MiB of memory"
    except Exception as error:  # a template raises any exception
        return f"cannot be rendered: {summarize_exception(error)[:MAX_REASON_CHARS]}"
    most = MAX_CHARS + MAX_GROWTH * len(repr((messages, arguments)))
    if len(text) > most:
        return f"makes a prompt of {len(text)} characters, at most {most} are allowed"
    return text, bool(readings)
