"""Leases: lock files with a heartbeat, in a directory of a shared file system.

The owner of a lease touches its lock file every few seconds (filelock's SoftFileLease). A lease is stale, and another
process acquires it, as soon as its owner is dead on this host, or if nobody touches the file for LEASE_SECONDS. A
waiting process measures that by its own clock, so clocks that differ or jump do no harm.

A lease is not a lock: an owner that was suspended for longer than LEASE_SECONDS continues without knowing. So it writes
complete files, and asks for its lease again right before it renames one to its place (`check_held`).
"""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import filelock

from opdctl import signals
from opdctl.errors import OpdctlError

LEASE_SECONDS = 60.0  # without a heartbeat, after which a lease is stale
HEARTBEAT_SECONDS = 5.0  # of leases and of long-running stages
EMPTY_LOCK_TIMEOUT_SECONDS = 10.0  # after which a lock file without an owner record is stale
MAX_BACKOFF_SECONDS = 1.0


class LeaseLost(Exception):  # noqa: N818 - control flow, not an error
    """Another process acquired the lease while its owner was suspended."""


class Lease:
    """One lease. One thread acquires and releases it."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.name = directory, name
        self._path = directory / f".{name}.lock"
        self._lease = filelock.SoftFileLease(
            self._path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS
        )
        self._seen: tuple[int, int] | None = None
        self._since, self._changes = 0.0, 0
        self._token: str | None = None  # filelock hides it from other threads

    def acquire(self) -> bool:
        """Return whether this process has acquired the lease. Never waits.

        Raises:
            OpdctlError: the directory cannot be written, or the lock file is that of another program.
        """
        try:
            self._lease.acquire(blocking=False)  # creates the directory
        except filelock.Timeout:
            self._observe_owner()
            return False
        except filelock.LeaseSettingsMismatch as error:
            hint = "remove it, unless another program uses this directory"
            raise OpdctlError("corrupt_artifact", f"{self._path}: not a lease of opdctl", hint=hint) from error
        except OSError as error:
            raise OpdctlError("failed_write", f"{self._path}: {error.strerror}") from error
        self._token = self._lease.token
        for observer in _observers:
            observer(self.name)
        return True

    def release(self) -> None:
        self._token = None
        self._lease.release()

    def is_held(self) -> bool:
        """Whether this process still holds the lease. Any thread may ask."""
        owner = self._lease.owner
        return owner is not None and owner.token == self._token

    def _observe_owner(self) -> None:
        """Record a heartbeat of the owner. An empty lock file, whose owner crashed before it wrote its record, is
        removed: filelock would treat it as held for ever."""
        with contextlib.suppress(FileNotFoundError):
            stat = self._path.stat()
            now = (stat.st_ino, stat.st_mtime_ns)
            if now != self._seen:
                self._seen, self._since, self._changes = now, time.monotonic(), self._changes + 1
            elif not stat.st_size and time.monotonic() - self._since > EMPTY_LOCK_TIMEOUT_SECONDS:
                self._path.unlink()

    def owner_is_alive(self) -> bool:
        """Whether the owner has touched the lock file since the first attempt to acquire it."""
        return self._changes > 1

    def owner(self) -> str:
        """Return process and host of the owner, as text."""
        owner = self._lease.owner
        return f"process {owner.pid} on {owner.hostname}" if owner else "another process"


@contextlib.contextmanager
def hold_lease(directory: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lease `name` for the block. wait: until it is free.

    Meanwhile every file that this process publishes below `directory` is checked by `check_held`.

    Raises:
        OpdctlError: a live process holds it, and `wait` is off.
    """
    lease, pause = Lease(directory, name), backoff()
    while not lease.acquire():
        if not wait and lease.owner_is_alive():
            raise OpdctlError(
                "lease_held",
                f"{directory}: {lease.owner()} holds the lease `{name}`",
                hint="wait for it, or use another --output",
            )
        time.sleep(next(pause))
    _held.append(lease)
    try:
        yield
    finally:
        _held.remove(lease)
        lease.release()


_observers: list[Callable[[str], None]] = []


def observe_leases(observer: Callable[[str], None]) -> None:
    """Call a function with the name of each lease that this process acquires from now on."""
    _observers.append(observer)


_held: list[Lease] = []  # of this process, by `hold_lease`


def check_held(path: Path) -> None:
    """Check that this process still holds the leases that it has acquired on directories above `path`.

    A process that was suspended for longer than LEASE_SECONDS may have lost them: what it would publish is stale.

    Raises:
        OpdctlError: another process has acquired one.
    """
    for lease in list(_held):
        if path.is_relative_to(lease.directory) and not lease.is_held():
            raise OpdctlError(
                "lost_lease",
                f"{path}: not written: this process was suspended for longer than {LEASE_SECONDS:g} s, and "
                f"{lease.owner()} has acquired its lease `{lease.name}` on {lease.directory}",
                hint="run the same command again to resume",
            )


def list_leases(directory: Path) -> list[str]:
    """Return the names of the leases in a directory that have a lock file, held or stale, by one listing."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name[1:].removesuffix(".lock") for name in names if name.startswith(".") and name.endswith(".lock")]


def live_leases(directory: Path, now: float) -> Iterator[tuple[Path, str]]:
    """Yield each lock file below `directory` that was touched within LEASE_SECONDS, with its owner. Writes nothing.

    now: the time of the file system, in seconds. A lease of a process that was killed lives until then, too.
    """
    for path in sorted(directory.rglob(".*.lock")):
        with contextlib.suppress(FileNotFoundError):  # just released
            if now - path.stat().st_mtime < LEASE_SECONDS:
                yield path, Lease(path.parent, path.name.removeprefix(".").removesuffix(".lock")).owner()


@cache
def _worker_token(process_id: int) -> str:
    return secrets.token_hex(8)


def worker_token() -> str:
    """Return random hexadecimal digits that tell this process from any other.

    Host name and process number do not: the containers of two pods may share both.
    """
    return _worker_token(os.getpid())


def backoff() -> Iterator[float]:
    """Yield exponentially growing poll intervals, in seconds."""
    pause = 0.02
    while True:
        signals.check()
        yield pause
        pause = min(1.5 * pause, MAX_BACKOFF_SECONDS)


def remove_stale_leases(directory: Path, name: str) -> None:
    """Remove stale lock files whose name begins with `name`."""
    for path in directory.glob(f".{name}*.lock"):
        lease = Lease(directory, path.name.removeprefix(".").removesuffix(".lock"))
        if lease.acquire():
            lease.release()
