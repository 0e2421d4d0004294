"""The process of a hosted engine: `python -m opdctl.engines.host_process DESCRIPTOR PARENT`.

It serves one engine over a socket to the process that started it (`engines/host.py`), and ends with it, however that
process ends. On Linux the kernel kills it. Elsewhere the end of the socket's stream does.

vLLM's workers are spawned by this process. multiprocessing imports this module in each of them before anything else,
as `__mp_main__`; so they end with this process by the same means.

Messages are pickles. The socket is a pair without a name between two processes of one program, and nothing else can
write to it, so no data from outside is unpickled.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
REPORT_SECONDS = 2.0  # between two heartbeats
STREAMS = ("stream_completions", "stream_scores")
"""The commands that take requests and yield results."""
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def die_with_parent(is_alive: Callable[[], bool]) -> None:
    """Let the kernel kill this process at the end of the thread that started it.

    is_alive: whether that has not happened already, which the kernel does not report.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not is_alive():
        os._exit(1)


class Host:
    """One engine and its connection.

    The engine runs in the main thread, which ends last: the kernel would kill vLLM's workers at the end of the thread
    that started them. Other threads receive, send and report, so that the engine waits neither for the socket nor for
    a parent that is writing files.
    """

    def __init__(self, connection: Connection):
        self._connection, self._engine = connection, None
        self._inbox: SimpleQueue[tuple[str, tuple[Any, ...], dict[str, Any]]] = SimpleQueue()
        self._outbox: SimpleQueue[tuple[str, Any] | None] = SimpleQueue()
        self._in_work = 0  # requests that the engine has
        self._busy = threading.Event()
        self._busy.set()  # with the imports that the first message needs
        self._sender = threading.Thread(target=self._send_all, daemon=True)

    def run(self) -> None:
        """Serve until the parent closes the engine."""
        for number in FORWARDED_SIGNALS:  # the parent decides what a signal means
            signal.signal(number, lambda number, frame: self._outbox.put(("signal", number)))
        self._sender.start()
        for target in (self._receive_all, self._send_heartbeats):
            threading.Thread(target=target, daemon=True).start()
        is_open = True
        while is_open:
            command, arguments, options = self._inbox.get()
            if command == "requests":  # of a command that failed
                continue
            self._busy.set()
            try:
                self._outbox.put(("done", self._execute(command, *arguments, **options)))
            except BaseException as error:
                self._outbox.put(("error", _portable(error)))
            self._busy.clear()
            is_open = command != "close"
        self._outbox.put(None)
        self._sender.join()
        os._exit(0)  # the engine is closed; the interpreter's own end takes seconds with its libraries

    def _execute(self, command: str, *arguments: Any, **options: Any) -> Any:
        if command == "start":
            return self._start(*arguments)
        function = getattr(self._engine, command)
        if command not in STREAMS:
            return function(*arguments, **options) if callable(function) else function
        self._in_work = 0
        for result in function(self._take_requests(), **options):
            self._in_work -= 1
            self._outbox.put(("result", result))
        return None

    def _take_requests(self) -> Iterator[Any]:
        """Yield the requests that arrive, and None while there is none and the engine has others."""
        is_last = False
        while not is_last:
            if self._in_work and self._inbox.empty():
                yield None
                continue
            _, (requests, is_last), _ = self._inbox.get()
            for request in requests:
                self._in_work += 1
                yield request

    def _start(self, make: Any, model: Any, context: Any, level: int, handover: Any) -> dict[str, str]:
        from opdctl import console

        console.forward_to(lambda text: self._outbox.put(("print", text)), level)
        if threads := context.recipe.pipeline.threads:
            import torch

            torch.set_num_threads(threads)
        engine = self._engine = make(model, context)
        if handover is not None:
            engine.take_over(handover)
        metadata: dict[str, str] = engine.logprob_metadata
        return metadata

    def _receive_all(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):  # the parent has ended
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:  # the parent has ended
                return
            except Exception as error:  # the message cannot be pickled
                self._connection.send(("error", _portable(error)))

    def _send_heartbeats(self) -> None:
        while True:
            self._busy.wait()
            cpu_seconds, disk_faults = _measure_work()
            num_passes = getattr(self._engine, "num_passes", 0)
            self._outbox.put(("alive", (cpu_seconds - time.thread_time(), disk_faults, num_passes)))
            time.sleep(REPORT_SECONDS)


def _measure_work() -> tuple[float, int]:
    """Return the CPU time in seconds, and the number of page faults that read a disk, of this process and descendants.

    Descendants and not the process group: ninja, which compiles kernels, gives each compiler another group.
    """
    if sys.platform != "linux":
        return time.process_time(), 0
    fields, own = {}, str(os.getpid())  # proc_pid_stat(5), from the state on
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            fields[path.parent.name] = path.read_text().rpartition(")")[2].split()
    ticks = faults = 0
    for pid, values in fields.items():
        while pid != own and pid in fields:
            pid = fields[pid][1]  # the parent
        if pid == own:
            faults += sum(map(int, values[9:11]))  # majflt, cmajflt
            ticks += sum(map(int, values[11:15]))  # utime, stime, cutime, cstime
    return ticks / os.sysconf("SC_CLK_TCK"), faults


def _portable(error: BaseException) -> BaseException:
    """Return an error that the parent can unpickle without the engine's libraries. Its note is the traceback here."""
    from opdctl.errors import OpdctlError

    text = "".join(traceback.format_exception(error))
    is_plain = isinstance(error, Exception | KeyboardInterrupt) and type(error).__module__ == "builtins"
    if not (isinstance(error, OpdctlError) or (is_plain and all(isinstance(value, str | int) for value in error.args))):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    else:
        error.__traceback__ = error.__cause__ = error.__context__ = None
    error.add_note(f"In the engine's process:\n{text}")
    return error


if __name__ == "__mp_main__":  # a worker, in the group of the host; the parent of an orphan is in another one
    die_with_parent(lambda: os.getpgid(os.getppid()) == os.getpgrp())

if __name__ == "__main__":
    die_with_parent(lambda: os.getppid() == int(sys.argv[2]))
    os.set_inheritable(int(sys.argv[1]), False)
    Host(Connection(int(sys.argv[1]))).run()
