"""An engine in a separate process, the host.

The process that trains imports no vLLM and shares neither GPU memory nor a process group with an engine. An engine has
its own visible devices. It gives its memory back by sleeping or by ending. It starts while others do, and a crash of
its libraries is an error message here.

`engines/host_process.py` is the other side.
"""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple

from opdctl import console, signals
from opdctl.artifacts.records import Completion, TokenScores
from opdctl.engines import host_process
from opdctl.engines.base import (
    RESUME_HINT,
    SCORED_AT_ONCE,
    Engine,
    EngineContext,
    Handover,
    InOrder,
    Request,
    ScoreRequest,
)
from opdctl.environment import join_python_path
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.startup import measure_startup
from opdctl.recipe.schema import RolloutColumns, Sampling, Score

MakeEngine = Callable[[ModelDir, EngineContext], Engine]
"""A function of a module: the host's process imports it."""

LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
)
"""An engine must not join the process group of the ranks."""
HANG_SECONDS = 50.0
"""Without a heartbeat, or without use of the CPU or a disk, after which a working host counts as hung."""
MIN_CPU_SECONDS = 0.05
"""Less CPU time in `HANG_SECONDS` is none. Reading 10 MB/s takes more, and so does polling another's lock."""
PASS_SECONDS = 300.0
"""Without the end of a forward pass, after which a GPU counts as hung. vLLM has the same limit for its workers."""
POLL_SECONDS = 1.0
CLOSE_SECONDS = 10.0
"""For an engine that is not in use to end by itself."""
WORKERS_SECONDS = 2.0
"""For the workers of a host that was killed to end by themselves, and for multiprocessing to remove their memory."""
MAX_LAST_LINES = 20
ACTIVITIES = {
    "start": "its start",
    "load_weights": "loading weights",
    "logprob_metadata": "reading the digest of its weights",
    "stream_completions": "sampling",
    "stream_scores": "scoring",
    "release": "falling asleep",
}
_END = object()
ARRIVAL_SECONDS = 0.005
"""Between two looks for new requests, when there was none."""
WAITING_REQUESTS = 16
"""For an engine that has room for another request while this process is writing files."""


class HostedEngine(InOrder):
    """An engine that runs in a child process. The process starts at once; the first call waits until it is ready.

    The kernel kills the process at the end of the thread that started it, so that thread must outlive the engine.
    """

    def __init__(
        self,
        make: MakeEngine,
        model: ModelDir,
        context: EngineContext,
        *,
        can_sleep: bool = False,
        batches_across_parts: bool = False,
    ):
        self._make, self._model, self._context, self._can_sleep = make, model, context, can_sleep
        self.batches_across_parts = batches_across_parts
        self._process: subprocess.Popen[bytes] | None = None
        self._running: str | None = None  # the command that the host has not answered yet
        self._metadata: dict[str, str] | None = None  # None until an engine with these weights has started
        self._start()

    @property
    def logprob_metadata(self) -> dict[str, str]:
        if self._metadata is None:  # otherwise known: an engine that has given its memory back must not start for it
            with measure_startup():
                self._await_start()
                self._metadata = self._metadata or self._call("logprob_metadata")
        return self._metadata

    def stream_completions(
        self,
        requests: Iterable[Request | None],
        sampling: Sampling,
        batch_size: int,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> Generator[tuple[int, Completion]]:
        options = {"sampling": sampling, "batch_size": batch_size, "columns": columns}
        return self._stream("stream_completions", requests, batch_size, options)

    def stream_scores(self, requests: Iterable[ScoreRequest], settings: Score) -> Generator[tuple[int, TokenScores]]:
        return self._stream("stream_scores", requests, SCORED_AT_ONCE, {"settings": settings})

    def load_weights(self, model: ModelDir) -> None:
        before, self._model, self._metadata = self._model, model, None
        if self._process is None:  # the next start loads them
            return
        try:
            handover = self._call("load_weights", model=_without_tokenizer(model))
            self._metadata = None  # those of the start, if the call had to wait for it
            if handover is not None:
                self.close()
                self._start(handover)
                self._await_start()
        except BaseException:
            self._model = before
            self.close()  # it may have some of the weights
            raise

    def release(self, *, keep_weights: bool) -> None:
        """Give the memory back until the next call: the engine sleeps if it can, otherwise the process ends."""
        if self._process is None:
            return
        self._await_start()  # which may fail
        if self._can_sleep:
            self._call("release", keep_weights=keep_weights)
        else:
            self.close()

    def close(self) -> None:
        """End the process. If it is working, the caller was interrupted, and it is killed."""
        if self._process is None:
            return
        try:
            if self._running is None:
                self._send("close")
                self._process.wait(CLOSE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):  # it has ended, or does not end
            pass
        finally:
            self._kill()

    # ── Messages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, handover: Handover | None = None) -> None:
        log = console.debug if self._context.device == "cpu" else console.info  # vLLM takes minutes on a GPU
        log(f"starting an engine for {self._model.path}")
        self._spawn()
        model = _without_tokenizer(self._model)
        self._send("start", self._make, model, self._context, console.get_level(), handover)

    def _await_start(self) -> None:
        with measure_startup():
            if self._process is None:
                self._start()
            if self._running == "start":
                self._metadata = _last(self._results())

    def _call(self, command: str, **options: Any) -> Any:
        """Let the host run a command, and return its result."""
        self._await_start()
        self._send(command, **options)
        return _last(self._results())

    def _stream(
        self, command: str, requests: Iterable[Any], at_once: int, options: Mapping[str, Any]
    ) -> Generator[tuple[int, Any]]:
        """Let the host process requests, and yield the results. The host has a few more than it processes at once."""
        self._await_start()
        self._send(command, **options)
        feed = _Feed(requests, at_once + WAITING_REQUESTS if self.batches_across_parts else None)

        def send_requests() -> float:
            """Pass requests to the host, and return for how many seconds to wait for a message."""
            if (taken := feed.take()) is not None:
                with contextlib.suppress(OSError):  # the host has ended, which `_messages` reports
                    self._connection.send(("requests", (taken, feed.is_exhausted), {}))
            return ARRIVAL_SECONDS if feed.has_paused else POLL_SECONDS

        try:
            for result in self._results(send_requests):
                feed.in_work -= 1
                yield result
        finally:
            if self._running is not None:
                self._kill()

    def _send(self, command: str, *arguments: Any, **options: Any) -> None:
        self._running = command
        with contextlib.suppress(OSError):
            self._connection.send((command, arguments, options))

    def _results(self, before_wait: Callable[[], float] | None = None) -> Generator[tuple[int, Any], None, Any]:
        """Yield the results of the running command, and return its value. before_wait: as in `_messages`.

        Raises:
            OpdctlError: the host has ended or hangs. Any error of the command itself is raised as it is.
        """
        try:
            for kind, value in self._messages(before_wait or (lambda: POLL_SECONDS)):
                if kind == "result":
                    yield value
                elif kind == "print":
                    console.print_forwarded(value)
                elif kind == "signal":
                    signal.raise_signal(value)
                elif kind == "done":
                    self._running = None
                    return value
                elif kind == "error":
                    if self._running != "start":
                        self._running = None
                    raise value
        finally:
            if self._running is not None:
                self._kill()

    def _messages(self, before_wait: Callable[[], float]) -> Iterator[tuple[str, Any]]:
        """Yield the host's messages until it ends or hangs, which raises OpdctlError.

        before_wait: called before each wait for a message; returns its maximum length in seconds.
        """
        hang = _HangDetection(self._context.device != "cpu" and self._running in host_process.STREAMS)
        while True:
            signals.check()
            seconds = before_wait()
            try:
                if self._connection.poll(seconds):
                    kind, value = self._connection.recv()
                    if kind == "alive":
                        hang.note(Progress(*value))
                    else:
                        yield kind, value
                        hang.restart()  # the caller may have taken its time
                    continue
            except (EOFError, OSError):
                raise self._failure(self._end_of_process()) from None
            if what := hang.describe():
                raise self._failure(what)

    # ── The process ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _spawn(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
        environment["PYTHONPATH"] = join_python_path()
        if self._context.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._context.gpus)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: the working directory is not searched for modules
                [sys.executable, "-P", "-m", host_process.__name__, str(theirs.fileno()), str(os.getpid())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in a terminal reaches this process only; workers are found by their group
            )
        self._connection = Connection(ours.detach())
        self._last_lines: deque[str] = deque(maxlen=MAX_LAST_LINES)
        self._reader = threading.Thread(target=_read_lines, args=(self._process.stdout, self._last_lines), daemon=True)
        self._reader.start()

    def _kill(self) -> None:
        """End the process and its workers, and read its last lines."""
        process, self._process, self._running = self._process, None, None
        assert process is not None
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
            process.wait(CLOSE_SECONDS)
        deadline = time.monotonic() + WORKERS_SECONDS
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left, or only zombies
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        self._connection.close()
        self._reader.join(POLL_SECONDS)

    def _end_of_process(self) -> str:
        """Return how the process ended, which has closed its connection."""
        assert self._process is not None
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _failure(self, what: str) -> OpdctlError:
        command = self._running
        self._kill()
        lines = "".join(f"\n  {line}" for line in self._last_lines)
        return OpdctlError(
            "failed_engine",
            f"{self._model.path}: the process of its engine {what} during {ACTIVITIES[command or '']}{lines}",
            hint=RESUME_HINT,
        )


class _Feed:
    """The requests of a command. limit: that the host may have; None: all at once. has_paused: whether there was none
    at the moment."""

    def __init__(self, requests: Iterable[Any], limit: int | None):
        self._remaining, self._limit = iter(requests), limit
        self.in_work = 0
        self.is_exhausted = self.has_paused = False

    def take(self) -> list[Any] | None:
        """Return the next requests up to the limit, None if there are none to send. After the last, `is_exhausted`."""
        if self.is_exhausted:
            return None
        requests: list[Any] = []
        self.has_paused = False
        while not (self.is_exhausted or self.has_paused or self.in_work == self._limit):
            request = next(self._remaining, _END)
            self.is_exhausted, self.has_paused = request is _END, request is None
            if request is not None and request is not _END:
                requests.append(request)
                self.in_work += 1
        return requests if requests or self.is_exhausted else None


class Progress(NamedTuple):
    """What a host and its workers have done since their start."""

    cpu_seconds: float
    disk_faults: int
    """Accesses to mapped files, such as weights, that waited for a disk."""
    num_passes: int
    """Forward passes that the engine has finished."""


class _HangDetection:
    """For how long a host has been silent, or has done nothing.

    A host at work uses the CPU, if only to wait for a GPU, or waits for a disk. One that computes without end is found
    only if its passes must be short, as on a GPU. It looks like a long pass on a CPU, and while it starts like the
    compilation of kernels.
    """

    def __init__(self, has_short_passes: bool):
        self._has_short_passes = has_short_passes
        self._progress = Progress(-math.inf, 0, 0)
        self.restart()

    def restart(self) -> None:
        self._heard = self._worked = self._passed = time.monotonic()

    def note(self, progress: Progress) -> None:
        before, self._heard = self._progress, time.monotonic()
        if progress.num_passes != before.num_passes:
            self._passed = self._heard
        is_busy = abs(progress.cpu_seconds - before.cpu_seconds) > MIN_CPU_SECONDS  # of ended workers it is lost
        if is_busy or progress[1:] != before[1:]:
            self._worked, self._progress = self._heard, progress

    def describe(self) -> str | None:
        """Return what the host has not done for too long, if anything."""
        now = time.monotonic()
        if now - self._heard > HANG_SECONDS:
            return f"has not responded for {HANG_SECONDS:g} seconds"
        if now - self._worked > HANG_SECONDS:
            return f"has used neither the CPU nor a disk for {HANG_SECONDS:g} seconds"
        if self._has_short_passes and now - self._passed > PASS_SECONDS:
            return f"has finished no forward pass for {PASS_SECONDS:g} seconds"
        return None


def _read_lines(stream: IO[bytes], lines: deque[str]) -> None:
    """Read the output of a host until its end, and keep the last lines."""
    with stream:
        for line in stream:
            text = line.decode(errors="replace").rstrip()
            lines.append(text)
            console.debug(text)


def _last(results: Generator[Any, None, Any]) -> Any:
    """Return the value of a generator that yields nothing."""
    try:
        next(results)
    except StopIteration as end:
        return end.value
    raise AssertionError("a result that nobody expects")


def _without_tokenizer(model: ModelDir) -> ModelDir:
    """Return the model directory with all that an engine needs of the tokenizer, which is then not read again."""
    base = _without_tokenizer(model.base) if model.base else None
    return replace(model, eos_token_ids=model.named_eos_ids, shared_vocab_size=model.vocab_size, base=base)
