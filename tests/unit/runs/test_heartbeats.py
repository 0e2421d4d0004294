import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opdctl.artifacts import leases
from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.heartbeats import heartbeats_path, read_heartbeats, send_heartbeats
from opdctl.runs.run import Run


@pytest.fixture
def run(finished_copy: Path, monkeypatch) -> Run:
    """A run whose stages wait 0.05 s at most."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    run = Run.load(finished_copy)
    pipeline = run.recipe.pipeline.model_copy(update={"follow_timeout_seconds": 0.05})
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"pipeline": pipeline}))


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_heartbeat_reports_what_the_stage_does(run):
    with send_heartbeats(run, "rollout") as heartbeat:
        assert read_heartbeats(run)[0].state == "starting"
        with pytest.raises(OpdctlError) as caught:
            heartbeat.wait_for(7, lambda: False, "student")
        assert (caught.value.kind, caught.value.code) == ("expired_wait", ExitCode.UNAVAILABLE)
        assert "step 7" in caught.value.message
        assert "student" in caught.value.message
        until(lambda: read_heartbeats(run)[0].state == "waiting for student")
        (beat,) = read_heartbeats(run)
        assert (beat.stage, beat.step, beat.pid, beat.is_alive) == ("rollout", 7, os.getpid(), True)
        heartbeat.wait_for(8, lambda: True, "student")
        until(lambda: read_heartbeats(run)[0].state == "running")
    assert not read_heartbeats(run)


def test_no_stage_gives_up_while_another_one_runs(run):
    with send_heartbeats(run, "train") as waiting:
        with send_heartbeats(run, "rollout") as running:
            running.wait_for(0, lambda: True, "student")
            until(lambda: any(beat.state == "running" for beat in read_heartbeats(run)))
            end = time.monotonic() + 0.3
            waiting.wait_for(0, lambda: time.monotonic() > end, "teacher scores")
        with pytest.raises(OpdctlError) as caught:
            waiting.wait_for(1, lambda: False, "teacher scores")
        assert caught.value.kind == "expired_wait"


def test_stale_heartbeat_is_removed_by_the_next_stage(run):
    with send_heartbeats(run, "train"):
        stale = heartbeats_path(run) / "rollout-elsewhere-1.json"
        (current,) = heartbeats_path(run).glob("train-*.json")
        stale.write_bytes(current.read_bytes())
        unfinished = stale.with_name(".tmp-1-rollout-elsewhere-1.json")  # as while it is rewritten
        unfinished.write_bytes(current.read_bytes())
        assert len(read_heartbeats(run)) == 2
        unfinished.unlink()
    os.utime(stale, (time.time() - 2 * leases.LEASE_SECONDS,) * 2)
    assert [beat.is_alive for beat in read_heartbeats(run)] == [False]
    with send_heartbeats(run, "train"):
        assert not stale.exists()


def test_heartbeat_stops_after_an_error(run):
    with pytest.raises(RuntimeError), send_heartbeats(run, "train"):
        raise RuntimeError
    assert not read_heartbeats(run)
