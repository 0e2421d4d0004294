"""The calls of the workers of a stage, with workers that only return what the test says."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from opdctl.artifacts.stage_dir import Fingerprint, StageDir
from opdctl.cluster import remote_engines
from opdctl.cluster.stage_worker import WorkerProcess
from opdctl.cluster.worker_pool import Worker

MADE = {"first": 2, "second": 1}


class ScriptedPool:
    """Three workers: the first ends its call, then the second; the third waits for a node."""

    def __init__(self, stage):
        self.workers = [Worker("rollout", "first"), Worker("rollout", "second"), Worker("rollout", "third")]
        for number, worker in enumerate(self.workers[:2]):
            worker.process = WorkerProcess("node", number, "node")
        self.order, self.dismissed, self._stage = ["first", "second"], [], stage

    def start_workers(self, section):
        return self.workers

    def wait(self, calls, on_progress):
        ended = self.order.pop(0)
        if not self.order:
            self._stage.is_complete = True
        return [ended]

    def result(self, worker, reference, stage):
        return MADE[reference]

    def dismiss(self, workers):
        self.dismissed += [worker.actor for worker in workers]
        for worker in workers:
            worker.is_dismissed = True


class Stage(StageDir):
    is_complete = False

    def is_finished(self):
        return self.is_complete


@pytest.mark.parametrize(("keep_idle", "expected"), [(True, []), (False, ["first", "third"])])
def test_workers_without_a_part_end_unless_another_stage_follows(keep_idle, expected):
    fingerprint = Fingerprint({})
    stage = Stage(
        Path("x"), stage="rollout", num_parts=3, suffix=".parquet", fingerprint=fingerprint, rerun_command="opdctl"
    )
    pool = ScriptedPool(stage)
    made = remote_engines._make_parts(
        lambda: pool, "rollout", lambda worker: worker.actor, stage, lambda items: None, keep_idle=keep_idle
    )
    assert made == 3
    assert pool.dismissed == expected


class StartingPool:
    """One worker, which dies `deaths` times while its engines start."""

    def __init__(self, deaths):
        self.deaths, self.calls = deaths, []
        self.worker = Worker("score", self)
        self.start_engines = self

    def remote(self, models):
        self.calls.append(models)
        return len(self.calls)

    def start_workers(self, section):
        return [self.worker]

    def wait(self, calls):
        return list(calls.by_reference)

    def result(self, worker, reference):
        return None if reference <= self.deaths else 0


def test_a_worker_that_dies_while_its_engines_start_starts_them_again():
    """No worker starts before the update that made the student is recorded: it reads the record."""
    pool, recorded = StartingPool(2), []
    run = SimpleNamespace(finish_update=lambda: recorded.append(len(pool.calls)))
    engines = remote_engines.RemoteEngines(run, "cpu", None, keep_idle=True)
    engines._open_pool = pool
    engines.start({"teacher": ("transformers", None)})
    assert pool.calls == [{"teacher": ("transformers", None)}] * 3
    assert recorded == [0]
