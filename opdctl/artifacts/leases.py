"""Who is at work on what: claims that processes lay to names in a folder of a file system that they share.

A claim is a lock file that its owner touches every few seconds for as long as it works (filelock's SoftFileLease). A
dead owner's claim is taken over: at once where it died on this machine, elsewhere when nobody has touched the file for
a whole lease. Whoever waits times that by a clock of its own, so clocks that differ or jump do no harm.

A lease is not a lock: an owner that was suspended for longer than one goes on, and does not know. So it writes
whole files, and asks `held` before it puts one in its place.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from opdctl.errors import ExitCode, OpdctlError

LEASE_SECONDS = 60.0  # seconds without a sign of life after which a claim is taken over
HEARTBEAT_SECONDS = 5.0  # seconds from one sign of life to the next
EMPTY_LOCK_TIMEOUT_SECONDS = 10.0  # seconds after which a claim without an owner's name is nobody's
MAX_BACKOFF_SECONDS = 1.0  # seconds


class LeaseLost(Exception):  # noqa: N818 - nobody's error
    """The claim went to another while its owner was suspended."""


class Lease:
    """One claim, to be taken and given back by one thread."""

    def __init__(self, folder: Path, name: str):
        self._path = folder / f".{name}.lock"
        self._lease = filelock.SoftFileLease(
            self._path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS
        )
        self._seen: tuple[int, int] | None = None
        self._since, self._changes = 0.0, 0

    def acquire(self) -> bool:
        """Return whether the claim is ours now. Never waits; a dead owner's is taken over when it has been asked for
        during a whole lease. Raises OpdctlError (code 5) where the folder cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lease.acquire(blocking=False)
        except filelock.Timeout:
            self._watch()
            return False
        except OSError as error:
            raise OpdctlError(
                f"{self._path}: cannot be written: {error.strerror}", code=ExitCode.UNAVAILABLE
            ) from error
        return True

    def release(self) -> None:
        self._lease.release()

    def is_held(self) -> bool:
        """Whether the claim is still ours."""
        owner = self._lease.owner
        return owner is not None and owner.token == self._lease.token

    def _watch(self) -> None:
        """Note a sign of life of another owner. A file that its owner died too soon to sign is removed: filelock would
        take it for a claim for ever."""
        with contextlib.suppress(FileNotFoundError):
            stat = self._path.stat()
            now = (stat.st_ino, stat.st_mtime_ns)
            if now != self._seen:
                self._seen, self._since, self._changes = now, time.monotonic(), self._changes + 1
            elif not stat.st_size and time.monotonic() - self._since > EMPTY_LOCK_TIMEOUT_SECONDS:
                self._path.unlink()

    def owner_is_alive(self) -> bool:
        """Whether another owner has touched the claim since it was first asked for."""
        return self._changes > 1

    def owner(self) -> str:
        owner = self._lease.owner
        return f"process {owner.pid} on {owner.hostname}" if owner else "another process"


@contextlib.contextmanager
def hold_lease(folder: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the claim `name`. Raises OpdctlError (code 5) when another process has it and lives, unless told to wait."""
    claim, pause = Lease(folder, name), backoff()
    while not claim.acquire():
        if not wait and claim.owner_is_alive():
            raise OpdctlError(
                f"{folder}: {claim.owner()} is working on `{name}` here",
                hint="wait for it, or use another --output",
                code=ExitCode.UNAVAILABLE,
            )
        time.sleep(next(pause))
    try:
        yield
    finally:
        claim.release()


def backoff() -> Iterator[float]:
    """Yield the seconds between one look and the next at what others do: more and more."""
    pause = 0.02
    while True:
        yield pause
        pause = min(1.5 * pause, MAX_BACKOFF_SECONDS)


def remove_stale_leases(folder: Path, name: str) -> None:
    """Remove the claims beginning with `name` that dead processes of this machine have left."""
    for path in folder.glob(f".{name}*.lock"):
        claim = Lease(folder, path.name.removeprefix(".").removesuffix(".lock"))
        if claim.acquire():
            claim.release()
