"""A worker of a stage on a node of the cluster: an actor with its own engines.

It runs the same functions as `opdctl rollout` on another machine would, in the main thread of its process.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from opdctl import console, signals
from opdctl.artifacts import leases
from opdctl.cluster.connection import check_code, enter_directory
from opdctl.cluster.mailbox import Reporter
from opdctl.engines.pool import EnginePool
from opdctl.environment import resolve_device
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe
from opdctl.registry import load_plugins
from opdctl.runs.open import locate_models
from opdctl.runs.run import Run


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker receives at its start. recipe: of its engines. code: of the driver. level: of messages.

    device: as in the recipe; "cuda" for an engine that spans nodes, whose GPUs are hidden from the worker.
    """

    run: Run
    recipe: Recipe
    directory: Path
    code: str
    level: int
    device: str


class WorkerProcess(NamedTuple):
    """The process of a worker, as its leases name it, and its node."""

    host: str
    pid: int
    node: str


class StageWorker:
    """The actor. Ray creates it anew, with the same arguments, if its process or its node dies."""

    def __init__(self, setup: WorkerSetup, mailbox: str, name: str):
        self._setup = setup
        self._engines: EnginePool | None = None
        self._run, self._located = setup.run, set[str]()
        self._is_busy = False
        self._reporter = Reporter(mailbox, name, self._stop)
        leases.observe_leases(self._report_lease)
        console.forward_to(partial(self._reporter.send, "print"), setup.level, self._reporter.count_items)

    def make_parts(self, role: str, make_parts: Callable[..., int]) -> int | OpdctlError:
        """Make the missing parts of a stage that no other worker has leased, and return their number, or the error."""
        return self._call(lambda: make_parts(run=self._locate(role), engines=self._open_engines()))

    def start_engines(self, models: Mapping[str, tuple[str, ModelDir]]) -> int | OpdctlError:
        """Start engines, of (engine, model) by role, and return 0, or the error."""

        def start() -> int:
            self._open_engines().start(models)
            return 0

        return self._call(start)

    def _call(self, function: Callable[[], int]) -> int | OpdctlError:
        with self._session():
            try:
                return 0 if self._reporter.is_stopping else function()
            except OpdctlError as error:
                self._close_engines()  # one of them may have failed
                return error
            except signals.StopRequested:
                self._close_engines()
                return 0

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Report the process, and handle signals, which the driver's request to stop becomes."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        self._reporter.send("process", WorkerProcess(socket.gethostname(), os.getpid(), node))
        self._reporter.flush()
        handlers = {number: signal.getsignal(number) for number in signals.SIGNAL_CODES}
        signals.install_handlers()
        try:
            with signals.raise_signals():
                self._is_busy = True
                yield
        finally:
            self._is_busy = False
            for number, handler in handlers.items():  # of Ray
                signal.signal(number, handler)
            self._reporter.flush()

    def _report_lease(self, name: str) -> None:
        """Report a lease at once: this process may die of the part."""
        if "-part-" in name:
            self._reporter.send("lease", name)
            self._reporter.flush()

    def _stop(self) -> None:
        if self._is_busy:
            os.kill(os.getpid(), signal.SIGTERM)

    def _open_engines(self) -> EnginePool:
        if self._engines is None:
            check_code(self._setup.code)
            enter_directory(self._setup.directory)
            load_plugins(self._setup.recipe.plugins)
            pipeline = self._setup.recipe.pipeline
            if pipeline.threads:
                import torch

                torch.set_num_threads(pipeline.threads)
            device = self._setup.device
            self._engines = EnginePool(self._setup.recipe, device if device == "cuda" else resolve_device(device))
        return self._engines

    def _close_engines(self) -> None:
        if self._engines is not None:
            self._engines.close()
            self._engines = None

    def _locate(self, role: str) -> Run:
        """Return the run with the path that the model has on this node. The run keeps the prompts that it has read."""
        self._open_engines()
        if role in self._run.models and role not in self._located:
            self._run = locate_models(self._run, [role])
            self._located.add(role)
        return self._run
