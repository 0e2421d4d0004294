"""Stages that stay: each waits for what the others make, and says that it lives. They know one another by the run
directory alone: a file in heartbeats/ for each, written every few seconds."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from opdctl import distributed
from opdctl.artifacts import files, leases
from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.run import Run

RUNNING = "works"


class StageHeartbeat:
    """One stage that stays, as the others see it."""

    def __init__(self, run: Run, stage: str):
        self._run, self._stage, self._step, self._state = run, stage, run.current_step(), "starts"
        self._path = heartbeats_path(run) / f"{stage}-{socket.gethostname()}-{os.getpid()}.json"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def wait_for(self, step: int, ready: Callable[[], bool], what: str) -> None:
        """Come back when `ready()`. Raises OpdctlError (code 5) when it was not for `pipeline.follow_timeout_seconds`, and no
        other follower is at work."""
        self._step, self._state = step, f"waits for {what}"
        limit, start, pause = self._run.recipe.pipeline.follow_timeout_seconds, time.monotonic(), leases.backoff()
        while not ready():
            if time.monotonic() - start > limit:
                if self._any_other_running():
                    start = time.monotonic()
                    continue
                raise OpdctlError(
                    f"{self._run.path}: step {step}: waited {limit:g} s for {what}; pipeline.follow_timeout_seconds",
                    hint=f"`opdctl status {self._run.path}` says who is at work; run the same command again to go on",
                    code=ExitCode.UNAVAILABLE,
                )
            time.sleep(next(pause))
        self._state = RUNNING

    def _any_other_running(self) -> bool:
        now = self._path.stat().st_mtime if self._path.exists() else time.time()
        return any(sign.state == RUNNING and sign.is_alive for sign in read_heartbeats(self._run, now))

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
            with contextlib.suppress(OpdctlError, OSError):  # the work itself will say what is wrong
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
    """Yield what lets a stage wait, and tells of it; of several ranks the first tells."""
    follower = StageHeartbeat(run, stage)
    if not distributed.is_main():
        yield follower
        return
    follower.start()
    try:
        yield follower
    finally:
        follower.stop()


def heartbeats_path(run: Run) -> Path:
    return run.path / "heartbeats"


def remove_stale_heartbeats(own: Path) -> None:
    """Remove what followers have left that showed no life for a whole lease when `own` was written, by the one clock
    that all share: the file system's."""
    now = own.stat().st_mtime
    for path in own.parent.glob("[!.]*.json"):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > leases.LEASE_SECONDS:
                path.unlink()


@dataclass(frozen=True)
class Heartbeat:
    """A follower's last sign of life. age: seconds."""

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
    """Return the last sign of life of every follower. now: the time of the file system, by a file just written, where
    its clock and this machine's may differ."""
    found, now = [], time.time() if now is None else now
    for path in sorted(heartbeats_path(run).glob("[!.]*.json")):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # it has just ended
            said = json.loads(files.read_text(path))
            names, age = ("stage", "step", "state", "host", "pid"), now - path.stat().st_mtime
            found.append(Heartbeat(**{name: said[name] for name in names}, age=max(age, 0)))
    return found
