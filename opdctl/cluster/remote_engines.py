"""The engines of a cluster: workers on its nodes make the parts of a stage, each with separate engines.

The workers share the parts by leases, as the workers of a shared file system do. Ray restarts one that dies, on another
node if its own is lost. This process submits the work and waits for the parts.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from opdctl import distributed
from opdctl.artifacts import leases
from opdctl.artifacts.stage_dir import PartMakers, StageDir
from opdctl.cluster.worker_pool import SECTIONS, Calls, EngineSection, Worker, WorkerPool
from opdctl.engines.pool import EnginePool
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe
from opdctl.runs.run import Run


class RemoteEngines(EnginePool):
    """Engines in the workers of a cluster. Rank 0 has them; the other ranks wait for the parts."""

    def __init__(self, run: Run, device: str, recipe: Recipe, keep_idle: bool):
        super().__init__(recipe, device)
        self._run, self._keep_idle = run, keep_idle
        self._open_pool: WorkerPool | None = None

    def _pool(self) -> WorkerPool:
        self._open_pool = self._open_pool or WorkerPool(self._run, self._recipe)
        return self._open_pool

    @property
    def read_this_memory(self) -> bool:
        return False

    def owns(self, engine: str) -> bool:
        return distributed.is_main()

    def part_makers(self, section: EngineSection, role: str, make_parts: Callable[..., int]) -> PartMakers:
        if not distributed.is_main():
            return PartMakers(is_here=False)

        def call(worker: Worker) -> Any:
            return worker.actor.make_parts.remote(role, make_parts)

        def make_remotely(stage: StageDir, on_progress: Callable[[int], None]) -> int:
            return _make_parts(self._pool, section, call, stage, on_progress, keep_idle=self._keep_idle)

        return PartMakers(remotely=make_remotely)

    def start(self, models: Mapping[str, tuple[str, ModelDir]]) -> None:
        """Start the engines on all workers, and wait until one of each section is ready.

        Raises:
            OpdctlError: one cannot start.
        """
        if not distributed.is_main():
            return
        self._run.finish_update()  # workers read the student's record
        pool, calls, unready = self._pool(), Calls(), set()
        own = {
            section: {role: model for role, model in models.items() if (role == "student") == (section == "rollout")}
            for section in SECTIONS
        }

        def submit(worker: Worker) -> None:
            calls.add(worker, worker.actor.start_engines.remote(own[worker.section]))

        for section in SECTIONS:
            for worker in pool.start_workers(section) if own[section] else ():
                submit(worker)
                unready.add(section)
        while unready:
            for reference in pool.wait(calls):
                worker = calls.by_reference.pop(reference)
                if pool.result(worker, reference) is None:  # it died, and Ray starts it again
                    submit(worker)
                else:
                    unready.discard(worker.section)

    def release(self, keys: Collection[tuple[str, str]] | None = None) -> None:
        """Do nothing: the memory of other nodes is not the trainer's."""

    def close(self) -> None:
        if self._open_pool:
            self._open_pool.close()


def _make_parts(
    open_pool: Callable[[], WorkerPool],
    section: EngineSection,
    call: Callable[[Worker], Any],
    stage: StageDir,
    on_progress: Callable[[int], None],
    *,
    keep_idle: bool,
) -> int:
    """Let the workers make the missing parts of a stage, wait until all exist, and return how many they made.

    call: lets a worker make parts until each is made or leased; returns the reference to the result. keep_idle: keep
    workers that have nothing left to do; without them the autoscaler can remove their nodes.
    """
    if stage.is_finished():
        return 0
    pool = open_pool()
    workers, calls, made, pause = pool.start_workers(section), Calls(), 0, leases.backoff()
    try:
        for worker in workers:
            calls.add(worker, call(worker))
        while calls.started() or not stage.is_finished():
            if not calls.started() and (idle := calls.find_idle(workers)):
                # The remaining parts are leased by others, or a worker died between the last part and the manifest.
                time.sleep(next(pause))
                calls.add(idle, call(idle))
            for reference in pool.wait(calls, on_progress):
                worker = calls.by_reference.pop(reference)
                result = pool.result(worker, reference, stage)
                made += result or 0
                if result is None:
                    calls.add(worker, call(worker))
                elif not keep_idle and calls.started():  # all parts are made, or in work at others
                    pool.dismiss([worker, *calls.cancel_waiting()])
    except BaseException:
        pool.stop(calls)
        raise
    return made
