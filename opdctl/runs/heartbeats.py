"""Heartbeats of long-running stages (`--follow`): each waits for its inputs and reports what it does.

The stages communicate through the run directory alone: a file in heartbeats/ for each, written every few seconds.
"""

import contextlib
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from opdctl import distributed
from opdctl.artifacts import files, leases
from opdctl.artifacts.manifests import HeartbeatRecord
from opdctl.errors import OpdctlError
from opdctl.runs.run import Run

RUNNING = "running"


class StageHeartbeat:
    """The heartbeat of one stage of this process."""

    def __init__(self, run: Run, stage: str):
        self._run, self._stage, self._step, self._state = run, stage, run.current_step(), "starting"
        self._path = heartbeats_path(run) / f"{stage}-{leases.worker_token()}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def wait_for(self, step: int, ready: Callable[[], bool], what: str) -> None:
        """Return as soon as `ready()`.

        Raises:
            OpdctlError: it was not ready for pipeline.follow_timeout_seconds, and no other stage is running.
        """
        self._step, self._state = step, f"waiting for {what}"
        limit, start, pause = self._run.recipe.pipeline.follow_timeout_seconds, time.monotonic(), leases.backoff()
        while not ready():
            if time.monotonic() - start > limit:
                if self._any_other_running():
                    start = time.monotonic()
                    continue
                path = shlex.quote(str(self._run.path))
                raise OpdctlError(
                    "expired_wait",
                    f"{self._run.path}: step {step}: no {what} for {limit:g} s (pipeline.follow_timeout_seconds)",
                    hint=f"`opdctl status {path}` lists the active stages; run the same command again to resume",
                )
            time.sleep(next(pause))
        self._state = RUNNING

    def report(self, step: int, state: str) -> None:
        """Set what the next heartbeat has."""
        self._step, self._state = step, state

    def _any_other_running(self) -> bool:
        now = self._path.stat().st_mtime if self._path.exists() else time.time()
        return any(beat.state == RUNNING and beat.is_alive for beat in read_heartbeats(self._run, now))

    def start(self) -> None:
        self._write()
        remove_stale_heartbeats(self._path)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(leases.HEARTBEAT_SECONDS):
            with contextlib.suppress(OpdctlError, OSError):  # the stage itself will report the failure
                self._write()

    def _write(self) -> None:
        files.write_json(
            self._path,
            {
                "stage": self._stage,
                "step": self._step,
                "state": self._state,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )


@contextlib.contextmanager
def send_heartbeats(run: Run, stage: str) -> Iterator[StageHeartbeat]:
    """Yield the stage's heartbeat, which also waits for inputs. Only rank 0 writes it."""
    heartbeat = StageHeartbeat(run, stage)
    if not distributed.is_main():
        yield heartbeat
        return
    heartbeat.start()
    try:
        yield heartbeat
    finally:
        heartbeat.stop()


def heartbeats_path(run: Run) -> Path:
    return run.path / "heartbeats"


def remove_stale_heartbeats(latest: Path) -> None:
    """Remove heartbeats older than one lease, by the clock of the file system, on which `latest` was just written."""
    now = latest.stat().st_mtime
    for path in latest.parent.glob("[!.]*.json"):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > leases.LEASE_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of a stage. age: seconds."""

    stage: str
    step: int
    state: str
    host: str
    pid: int
    age: float

    @property
    def is_alive(self) -> bool:
        return self.age < leases.LEASE_SECONDS


def read_heartbeats(run: Run, now: float | None = None) -> list[Heartbeat]:
    """Return the last heartbeat of every stage. now: the time of the file system, in seconds, if its clock may differ
    from this host's."""
    beats, now = [], time.time() if now is None else now
    for path in sorted(heartbeats_path(run).glob("[!.]*.json")):
        with contextlib.suppress(FileNotFoundError):  # the stage has just ended
            age = now - path.stat().st_mtime
            try:
                record: HeartbeatRecord = files.read_json(path, HeartbeatRecord, f"remove {path}")
            except OpdctlError:
                if path.exists():
                    raise
                continue
            stage, step, state = record["stage"], record["step"], record["state"]
            beats.append(Heartbeat(stage, step, state, record["host"], record["pid"], max(age, 0)))
    return beats
