"""Several ranks of one command as forked processes, with the variables that a launcher gives them. Groups use gloo."""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forks

from opdctl import distributed
from opdctl.cli.main import app
from opdctl.errors import OpdctlError

FORK = multiprocessing.get_context("fork")


def rank_variables(world_size: int, **variables: str) -> list[dict[str, str]]:
    """Return the variables of each rank, all on one machine."""
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), **variables}
        for rank in range(world_size)
    ]


def _meeting_place() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


# ── Functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Crash(str):
    """The traceback of a rank that ended with another exception than OpdctlError."""


def call_in_ranks(function: Callable[[], Any], environments: Sequence[Mapping[str, str]]) -> list[Any]:
    """Call a function in each rank. Return what each returns, or kind and detail of the OpdctlError that it raises.

    The crash of one rank ends the others, which may wait for it.
    """
    meeting, children, results = _meeting_place(), {}, {}
    distributed.destroy_process_group()  # of a trainer in this process, which its children would inherit
    for rank, environment in enumerate(environments):
        receiver, sender = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_call, args=(function, {**meeting, **environment}, sender))
        child.start()
        sender.close()
        children[receiver] = rank, child
    while len(results) < len(children):
        for receiver in wait([each for each, (rank, _) in children.items() if rank not in results]):
            results[children[receiver][0]] = result = receiver.recv()
            if isinstance(result, Crash):
                for _, child in children.values():
                    child.kill()
                pytest.fail(result)
    for _, child in children.values():
        child.join()
    return [results[rank] for rank in range(len(children))]


def in_ranks(world_size: int, function: Callable[[], Any]) -> list[Any]:
    """Call a function in each rank of a process group, with one thread each. Return as `call_in_ranks`."""

    def join() -> object:
        torch.set_num_threads(1)
        distributed.init_process_group(use_gpu=False, on_peer_failure=lambda failure: None)
        return function()

    return call_in_ranks(join, rank_variables(world_size))


def _call(function: Callable[[], Any], environment: Mapping[str, str], sender: Any) -> None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.update(environment)
    try:
        sender.send(function())
    except OpdctlError as error:
        sender.send((error.kind, error.detail))
    except BaseException:
        sender.send(Crash(traceback.format_exc()))
    finally:
        distributed.destroy_process_group()


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class RankProcess:
    """A rank that runs a command. log: its stdout and stderr."""

    pid: int
    log: Path
    code: int | None = None

    def wait(self) -> int:
        """Return the exit code, or minus the number of the signal that killed it. Fail if it does not end."""
        if self.code is None:
            self.code = forks.wait(self.pid)
        return self.code

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def start_ranks(
    folder: Path, world_size: int, *words: object, prepare: Callable[[int], None] = lambda rank: None
) -> list[RankProcess]:
    """Start a command in each rank, after `prepare(rank)`. Logs are in `folder`."""
    meeting, processes = _meeting_place(), []
    for rank, variables in enumerate(rank_variables(world_size)):
        environment, log = {**meeting, **variables}, folder / f"rank-{rank}.txt"
        command = partial(_run, environment, log, [str(word) for word in words], partial(prepare, rank))
        processes.append(RankProcess(forks.fork(command), log))
    return processes


def run_ranks(folder: Path, world_size: int, *words: object, **options: Any) -> list[RankProcess]:
    """Run a command in each rank to its end; all must succeed."""
    processes = start_ranks(folder, world_size, *words, **options)
    codes = [process.wait() for process in processes]
    assert codes == [0] * world_size, "".join(process.log.read_text() for process in processes)
    return processes


def _run(environment: Mapping[str, str], log: Path, words: list[str], prepare: Callable[[], None]) -> int:
    os.environ.update(environment)
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    try:
        prepare()
        app(words)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    return 99
