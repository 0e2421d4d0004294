"""The workers of a command on the nodes of a cluster: their start, their calls, what they report, and their losses."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opdctl import console, signals
from opdctl.artifacts.stage_dir import StageDir
from opdctl.cluster.connection import code_identity, describe_failure
from opdctl.cluster.mailbox import start_mailbox, take_events
from opdctl.cluster.stage_worker import StageWorker, WorkerProcess, WorkerSetup
from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Recipe
from opdctl.runs.heartbeats import StageHeartbeat, send_heartbeats
from opdctl.runs.run import Run

MAX_LOSSES = 3
"""Engines that may die while a part is in work, or on a worker that makes nothing, until the stage stops."""
CALL_POLL_SECONDS = 0.1
START_NOTICE_SECONDS = 30.0
"""Until a message reports what the workers wait for."""
STOP_SECONDS = 30.0
"""For workers to release their leases after a request to stop. Then they are killed."""
EngineSection = Literal["rollout", "score"]
SECTIONS: tuple[EngineSection, ...] = ("rollout", "score")
RESOURCES = ("CPU", "GPU")
LOGS_HINT = "look for the cause in the logs of the nodes, then run the same command again"
INSTALL_HINT = "install the same opdctl on every node; the logs of the nodes have more"


@dataclass(frozen=True)
class Loss:
    """A process of a worker that has ended, with the parts that it had in work."""

    process: WorkerProcess
    parts: list[Path]


@dataclass
class Worker:
    """The handle of a worker. process: where it runs, None until it has reported itself.

    leases: that its call has acquired. loss: of the process before, until Ray has started another. failures: engines
    that died since it has made a part. is_dismissed: whether it was ended, since there was nothing left to do.
    """

    section: EngineSection
    actor: Any
    process: WorkerProcess | None = None
    leases: set[str] = field(default_factory=set)
    loss: Loss | None = None
    restarts: int = 0
    failures: int = 0
    is_dismissed: bool = False


@dataclass
class Calls:
    """The calls of workers that are in progress, by the reference to their results."""

    by_reference: dict[Any, Worker] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def add(self, worker: Worker, reference: Any) -> None:
        self.by_reference[reference] = worker

    def started(self) -> list[Any]:
        """Return those of workers that have a process. The others wait for a node."""
        return [reference for reference, worker in self.by_reference.items() if worker.process]

    def cancel_waiting(self) -> list[Worker]:
        """Forget the calls of workers that wait for a node, and return these workers."""
        waiting = {reference: worker for reference, worker in self.by_reference.items() if not worker.process}
        return [self.by_reference.pop(reference) for reference in waiting]

    def find_idle(self, workers: Sequence[Worker]) -> Worker | None:
        """Return a worker without a call."""
        busy = [id(worker) for worker in self.by_reference.values()]
        return next((worker for worker in workers if id(worker) not in busy and not worker.is_dismissed), None)


class WorkerPool:
    """The workers of each section of the recipe, which start when they are first needed and stay until the end."""

    def __init__(self, run: Run, recipe: Recipe):
        self._run, self._recipe = run, recipe
        self._workers: dict[EngineSection, list[Worker]] = {}
        self._losses: Counter[Path] = Counter()
        self._mailbox_name, self._mailbox = start_mailbox()
        self._stack = contextlib.ExitStack()
        self._heartbeat: StageHeartbeat | None = None
        if (run.path / "run.json").exists():
            self._heartbeat = self._stack.enter_context(send_heartbeats(run, "cluster"))

    def start_workers(self, section: EngineSection) -> list[Worker]:
        """Return the workers of a section. Ray starts each as soon as there is room for it on a node."""

        if section not in self._workers:
            # Without the tokenizers and prompts that they have read: Ray keeps large arguments on one node.
            run = replace(self._run, models={name: replace(model) for name, model in self._run.models.items()})
            size = pool_size(self._recipe, section)
            device = "cuda" if size.bundles else self._recipe.pipeline.device
            setup = WorkerSetup(run, self._recipe, Path.cwd(), code_identity(), console.get_level(), device)
            arguments = [(setup, self._mailbox_name, f"{section}-{number}") for number in range(size.workers)]
            self._workers[section] = [Worker(section, _start_worker(size, each)) for each in arguments]
        return [worker for worker in self._workers[section] if not worker.is_dismissed]

    def dismiss(self, workers: Sequence[Worker]) -> None:
        """End workers that have nothing left to do, or that still wait for a node."""
        import ray

        for worker in workers:
            worker.is_dismissed, worker.process = True, None
            ray.kill(worker.actor)

    def close(self) -> None:
        """End the workers. Those at work leave stale leases, unless `stop` was called before."""
        import ray

        for worker in [worker for workers in self._workers.values() for worker in workers]:
            ray.kill(worker.actor)
        ray.kill(self._mailbox)
        self._stack.close()

    def stop(self, calls: Calls) -> None:
        """Let workers that are at work release their leases, within STOP_SECONDS."""
        import ray

        deadline, remaining = time.monotonic() + STOP_SECONDS, calls.started()
        while remaining and time.monotonic() < deadline:
            self._read_mailbox(lambda items: None, stop=True)
            _, remaining = ray.wait(remaining, num_returns=len(remaining), timeout=CALL_POLL_SECONDS)

    # ── Calls ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def wait(self, calls: Calls, on_progress: Callable[[int], None] = lambda items: None) -> list[Any]:
        """Wait for a moment; return the calls that have ended, after what their workers have reported.

        Raises:
            OpdctlError: too many engines have died.
        """
        import ray

        signals.check()
        ended, _ = ray.wait(list(calls.by_reference), timeout=CALL_POLL_SECONDS) if calls.by_reference else ([], [])
        self._read_mailbox(on_progress)
        if not calls.started() and calls.by_reference and time.monotonic() - calls.since > START_NOTICE_SECONDS:
            calls.since = time.monotonic()
            self._explain_wait(next(iter(calls.by_reference.values())).section)
        return list(ended)

    def result(self, worker: Worker, reference: Any, stage: StageDir | None = None) -> int | None:
        """Return what a call has returned; None if its engine or its worker died, so that it must be repeated.

        Raises:
            OpdctlError: that of the worker; too many engines have died.
        """
        import ray

        try:
            result = ray.get(reference)
        except ray.exceptions.ActorDiedError as error:  # for ever: Ray cannot create it
            detail = f"{worker.section}: a worker cannot start: {describe_failure(error)}"
            raise OpdctlError("failed_engine", detail, hint=INSTALL_HINT) from error
        except ray.exceptions.RayActorError:  # until Ray has started it again
            if worker.process:
                self._note_loss(worker, worker.process, stage)
            return None
        if not isinstance(result, OpdctlError):
            worker.leases.clear()
            worker.failures = 0 if result else worker.failures
            return int(result)
        if result.kind != "failed_engine" or stage is None:
            raise result
        console.warn(f"{result.message}\nIts parts are regenerated.")
        self._count_failure(worker, self._take_parts(worker, stage), result)
        return None

    def _take_parts(self, worker: Worker, stage: StageDir | None) -> list[Path]:
        """Return the parts that a worker had in work, and forget its leases."""
        paths = [stage.path / stage.names[index] for index in stage.unmade_parts(worker.leases)] if stage else []
        worker.leases.clear()
        return paths

    def _note_loss(self, worker: Worker, process: WorkerProcess, stage: StageDir | None) -> None:
        """Count the parts that a lost process had in work. If its node turns out to be lost, they do not count."""
        paths = self._take_parts(worker, stage)
        worker.process, worker.loss = None, Loss(process, paths)
        error = OpdctlError("failed_engine", f"worker process {process.pid} on {process.host} died", hint=LOGS_HINT)
        self._count_failure(worker, paths, error)

    def _note_process(self, worker: Worker, process: WorkerProcess) -> None:
        """Note that a worker runs. If it ran before, its process has died, or its node was lost: no fault of a part."""
        import ray

        loss, worker.process, worker.loss = worker.loss, process, None
        if loss is None:
            return
        worker.restarts += 1
        lost = f"worker process {loss.process.pid} on {loss.process.host}"
        if any(node["NodeID"] == loss.process.node and node["Alive"] for node in ray.nodes()):
            console.warn(f"{lost} died; its parts are regenerated")
            return
        console.warn(f"the node of {lost} was lost; its parts are regenerated")
        self._losses.subtract(loss.parts)
        worker.failures -= 1

    def _count_failure(self, worker: Worker, parts: Sequence[Path], error: OpdctlError) -> None:
        """Count the death of an engine.

        Raises:
            OpdctlError: it was the third with the same part in work, or the third of a worker that makes nothing.
        """
        self._losses.update(parts)
        worker.failures += 1
        if fatal := [part for part in parts if self._losses[part] >= MAX_LOSSES]:
            names = ", ".join(map(str, fatal))
            why = f"{names}: {MAX_LOSSES} engines died while this was in work; the last one: {error.detail}"
            raise OpdctlError("failed_engine", why, hint=LOGS_HINT)
        if worker.failures >= MAX_LOSSES:
            raise error

    # ── Reports ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_mailbox(self, on_progress: Callable[[int], None], *, stop: bool = False) -> None:
        """Print and note what the workers have reported. stop: request that they stop."""
        events = take_events(self._mailbox, stop=stop)
        for sender, kind, value in events:
            if kind == "print":
                console.print_forwarded(value)
            elif kind == "items":
                on_progress(value)
            elif kind == "lease":
                self._find(sender).leases.add(value)
            elif kind == "process":
                self._note_process(self._find(sender), value)
        if events and self._heartbeat:
            self._heartbeat.report(self._run.current_step(), self._describe())

    def _find(self, name: str) -> Worker:
        section, _, number = name.rpartition("-")
        return self._workers["rollout" if section == "rollout" else "score"][int(number)]

    def _describe(self) -> str:
        """Return how many workers of each section run, and on which hosts."""
        parts = []
        for section, workers in self._workers.items():
            hosts = Counter(worker.process.host for worker in workers if worker.process)
            on = ", ".join(f"{count} on {host}" for host, count in sorted(hosts.items()))
            restarts = sum(worker.restarts for worker in workers)
            counts = [f"{hosts.total()} of {len(workers)} workers run", on, f"{restarts} restarts" * bool(restarts)]
            parts.append(f"{section}: {', '.join(filter(None, counts))}")
        return "; ".join(parts)

    def _explain_wait(self, section: EngineSection) -> None:
        import ray

        size = pool_size(self._recipe, section)
        counts = {"CPU": size.cpus, "GPU": size.gpus + len(size.bundles)}
        needed = " and ".join(f"{counts[name]} {name}" for name in RESOURCES)
        free = ray.available_resources()
        has = " and ".join(f"{free.get(name, 0):g} {name}" for name in RESOURCES)
        console.info(f"{section}: no worker has started yet; each needs {needed}; {has} are free in all")


class PoolSize(NamedTuple):
    """The number of workers of a section, and the CPUs and GPUs of each on its node.

    bundles: of the placement group of an engine that spans nodes; vLLM takes one of them for each of its processes.
    """

    workers: int
    cpus: int
    gpus: int
    bundles: tuple[Mapping[str, float], ...] = ()


def pool_size(recipe: Recipe, section: EngineSection) -> PoolSize:
    """Return the size that the hardware of the recipe gives to a section."""
    engine = getattr(recipe, section).engine
    gpus = recipe.hardware.rollout_gpus if section == "rollout" else recipe.hardware.score_gpus
    per_engine = recipe.gpus_per_engine(engine)
    workers, cpus = max(1, gpus // per_engine), max(1, recipe.pipeline.threads)
    if engine == "server" or not has_gpus(recipe.pipeline.device):
        return PoolSize(workers, cpus, 0)
    if recipe.spans_nodes(engine):
        first, others = {"CPU": cpus, "GPU": 1}, [{"GPU": 1}] * (per_engine - 1)
        return PoolSize(workers, cpus, 0, (first, *others))
    return PoolSize(workers, cpus, per_engine)


def _start_worker(size: PoolSize, arguments: tuple[Any, ...]) -> Any:
    """Let Ray start a worker as soon as there is room for it, and return its handle."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = {"max_restarts": -1, "num_cpus": size.cpus, "num_gpus": size.gpus}
    if size.bundles:  # as few nodes as possible; the worker is in the first bundle
        group = ray.util.placement_group([dict(bundle) for bundle in size.bundles], strategy="PACK")
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    return ray.remote(StageWorker).options(**options).remote(*arguments)


def has_gpus(device: str) -> bool:
    """Whether the models are on GPUs: of the cluster, if the recipe leaves the device open."""
    import ray

    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
