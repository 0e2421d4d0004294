"""An engine without a model, which fails in a chosen way at a chosen command, for tests of its process."""

import itertools
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from helpers.commands import small_recipe
from helpers.engines import directory

from opdctl import console
from opdctl.artifacts.records import Completion, TokenScores
from opdctl.engines.base import Engine, EngineContext, Handover, Request, ScoreRequest
from opdctl.engines.host import HostedEngine
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Score
from opdctl.registry import ENGINES

MIB = 2**20
HANG_SECONDS = 60  # of an engine's fault: more than any test's limit
READS = 9  # of a slow disk, one a second
COMMANDS = ("start", "load_weights", "generate", "score", "release", "close")


class LibraryError(Exception):
    """An exception that the parent must not need to import."""


def _raise(error: BaseException) -> None:
    raise error


def _exit() -> None:
    sys.stdout.write("the last words of the engine\n")
    sys.stdout.flush()
    os._exit(3)


def _spin() -> None:
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        pass


def _read_slowly() -> None:
    """Wait for a disk, and use nearly no CPU time: read a page of a mapped file that is not in memory now and then."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(READS * MIB)
        for page in range(READS):
            os.pwrite(file.fileno(), b"x", page * MIB)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0) as mapped:
            mapped.madvise(mmap.MADV_RANDOM)
            for page in range(READS):
                assert mapped[page * MIB] == ord("x")
                time.sleep(1)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "replace": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": _exit,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(HANG_SECONDS),
    "spin": _spin,
    "slow_read": _read_slowly,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "opdctl_error": lambda: _raise(OpdctlError("unsupported_setting", "score.entropy: not here", hint="unset it")),
    "library_error": lambda: _raise(LibraryError("CUDA out of memory")),
    "memory_error": lambda: _raise(MemoryError("8 GiB")),
    "system_exit": lambda: _raise(SystemExit(4)),
    "warning": lambda: console.warn("a warning of the engine"),
}


class FaultyEngine:
    """Its recipe's name is FAULT-COMMAND. It has a worker process, as vLLM does with several GPUs."""

    num_passes = 0
    _handover = None

    def __init__(self, model: ModelDir, context: EngineContext):
        self._fault, _, self._command = context.recipe.name.partition("-")
        self._model = model
        if context.recipe.seed:
            multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True).start()
        self._fail_at("start")

    @property
    def logprob_metadata(self) -> dict[str, str]:
        return {"engine": "faulty", "weights": self._model.path.name}

    def _fail_at(self, command: str) -> None:
        if command == self._command.replace("-", "_"):
            FAULTS[self._fault]()

    def stream_completions(self, requests: Iterable[Request], batch_size: int, **options: Any) -> Any:
        """Yield the last of `batch_size` requests first."""
        numbered = enumerate(requests)
        while batch := list(itertools.islice(numbered, batch_size)):
            for number, request in reversed(batch):
                length = len(request.prompt_ids)
                yield number, Completion(request.prompt_ids[::-1], np.full(length, -1, np.float32), "stop")
                self._fail_at("generate")

    def stream_scores(self, requests: Iterable[ScoreRequest], settings: Score) -> Any:
        for number, request in enumerate(requests):
            self._fail_at("score")
            yield number, TokenScores(-np.arange(len(request.response_ids), dtype=np.float32))

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def modules(self) -> list[str]:
        return sorted(sys.modules)

    def path(self) -> str:
        return str(self._model.path)

    def load_weights(self, model: ModelDir) -> Handover | None:
        self._fail_at("load_weights")
        if self._fault == "replace":
            return {"predecessor": os.getpid()}
        self._model = model
        return None

    def take_over(self, handover: Handover) -> None:
        self._handover = handover

    def handover(self) -> Handover | None:
        return self._handover

    def release(self, *, keep_weights: bool) -> None:
        self._fail_at("release")

    def close(self) -> None:
        self._fail_at("close")


def model(name: str = "model") -> ModelDir:
    return ModelDir(Path(name), "float32", eos_token_ids=(1,), shared_vocab_size=100)


def host(
    fault: str = "none",
    command: str = "start",
    *,
    worker: bool = False,
    device: str = "cpu",
    gpus: tuple[str, ...] = (),
) -> HostedEngine:
    """Return a hosted FaultyEngine, which uses no device."""
    recipe = small_recipe(f"name={fault}-{command.replace('_', '-')}", f"seed={int(worker)}")
    context = EngineContext(recipe, recipe.student, device, gpus)
    return HostedEngine(FaultyEngine, model(), context, can_sleep=True, batches_across_parts=True)


def open_vllm(name: str, *overrides: str) -> Engine:
    """Return vLLM in its process, with a toy model. This process does not import it."""
    recipe = small_recipe("vllm.enforce_eager=true", "prompts.max_tokens=60", "rollout.max_tokens=180", *overrides)
    return ENGINES.get("vllm")(directory(name), EngineContext(recipe, recipe.student, "cpu"))


def group(pid: int) -> list[int]:
    """Return the processes of a process group that have not ended."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, pgrp = fields.split()[:3]
        if int(pgrp) == pid and state != "Z":
            members.append(int(name.split()[0]))
    return members


def wait_until_empty(pid: int, seconds: float = 20) -> None:
    """Wait until no process of a group is left."""
    deadline = time.monotonic() + seconds
    while left := group(pid):
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.05)
