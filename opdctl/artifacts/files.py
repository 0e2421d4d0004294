"""Durable files: atomic writes, checksums, JSON that checks itself, disk space. Imports no torch.

A file is written under a temporary name in its own directory, flushed to disk, and renamed. Every JSON file holds a
digest of itself and is checked against it and against its form when it is read. No symbolic link is followed, and
nothing but regular files is opened.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opdctl import signals
from opdctl.artifacts import leases, manifests, parsing
from opdctl.artifacts.versions import OLDEST_VERSION, VERSIONS
from opdctl.errors import DISK_FULL_ERRNOS, WRITE_ERRNOS, OpdctlError

HASH_THREADS = 8
"""Files that are hashed at a time. SHA-256 leaves the interpreter to other threads."""
MIN_HASHED_IN_THREADS_BYTES = 2**20
"""Of the files together: threads take as long to start as the hash of fewer."""
FLUSH_THREADS = 8  # files of a directory that are flushed at a time

# ── Checksums ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits.

    Raises:
        OpdctlError: it is not a regular file.
    """
    try:
        with parsing.open_regular(path, follow_links=True) as (file, _):  # a hub's cache consists of links
            return hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise corrupt_artifact(path, str(error)) from None


def sha256_files(paths: Sequence[Path], sha256: Callable[[Path], str] = sha256_file) -> dict[Path, str]:
    """Return the SHA-256 of each file, by `sha256`. Several are read at a time: one thread is slower than storage.

    Raises:
        OpdctlError: one is not a regular file.
    """
    if len(paths) <= HASH_THREADS and sum(path.stat().st_size for path in paths) < MIN_HASHED_IN_THREADS_BYTES:
        return {path: sha256(path) for path in paths}
    with ThreadPoolExecutor(HASH_THREADS) as hashing:
        return dict(zip(paths, hashing.map(sha256, paths), strict=True))


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ── Atomic writes ────────────────────────────────────────────────────────────────────────────────────────────────────


def fsync_path(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot fsync directories and do not need it
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably: the parent of each is flushed."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def temporary_path(final: Path, kind: str = "") -> Path:
    """Return the hidden name beside `final` that this process writes to first."""
    return final.with_name(f".tmp-{machine_id()}-{os.getpid()}-{leases.worker_token()}-{kind}{final.name}")


@cache
def machine_id() -> str:
    """Return 12 hexadecimal digits that are equal for two processes only if a process number means the same to both.

    On Linux that needs the same boot and the same namespace of process numbers: containers often share a host name.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        identity = f"{boot_id} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        identity = str(uuid.getnode())
    return hashlib.sha256(f"{socket.gethostname()} {identity}".encode()).hexdigest()[:12]


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def discard(path: Path) -> None:
    """Remove a file or a directory if it exists; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_temporary_files(directory: Path, *, include_running: bool = False) -> None:
    """Remove temporary files of processes of this machine that have ended from `directory`.

    include_running: remove those of every process on every machine, for the holder of an exclusive lease.

    Raises:
        OpdctlError: the lease was lost.
    """
    for path in directory.glob(".tmp-*" if include_running else f".tmp-{machine_id()}-*"):
        process_id = path.name.removeprefix(f".tmp-{machine_id()}-").partition("-")[0]
        if include_running:
            leases.check_held(path)
        if include_running or (process_id.isdigit() and not _is_running(int(process_id))):
            discard(path)


@contextlib.contextmanager
def atomic_write(final: Path, check: Callable[[], None] | None = None, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `final`; if the block succeeds, flush it to disk and rename it to `final`.

    check: is called right before the rename, and prevents it by an exception. flush: otherwise the caller calls
    `flush_path` before it records that `final` is complete.

    Raises:
        OpdctlError: the disk is full, the directory cannot be written, or a lease on it was lost.
    """
    temporary = temporary_path(final)
    with translate_write_errors(final):
        try:
            make_directory(final.parent)
            yield temporary
            if flush:
                _flush_content(temporary)
            if final.is_dir():
                remove_directory(final, check)  # a directory cannot be renamed over another one
            _check_before_rename(final, check)
            os.replace(temporary, final)
            if flush:
                fsync_path(final.parent)
        except Exception:
            _check_before_rename(final, check)  # a new owner of the lease has removed the temporary file
            raise
        finally:
            discard(temporary)


def flush_path(path: Path) -> None:
    """Flush a file or a directory, with all in it, and its name.

    Raises:
        OpdctlError: the disk is full.
    """
    with translate_write_errors(path):
        _flush_content(path)
        fsync_path(path.parent)


def _flush_content(path: Path) -> None:
    """Flush a file, or a directory with all in it: together, so that a file system may write its journal once."""
    content = [*path.rglob("*")] if path.is_dir() else []
    if content:
        with ThreadPoolExecutor(min(len(content), FLUSH_THREADS)) as threads:
            list(threads.map(fsync_path, content))
    fsync_path(path)


def _check_before_rename(final: Path, check: Callable[[], None] | None) -> None:
    signals.check()
    leases.check_held(final)
    if check is not None:
        check()


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors for a full or read-only disk into an OpdctlError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise _disk_full(path) from error
        if error.errno in WRITE_ERRNOS:
            raise OpdctlError("failed_write", f"{path}: {error.strerror}") from error
        raise
    except SafetensorError as error:  # has the system's error in its text only
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise _disk_full(path) from error


def remove_directory(path: Path, check: Callable[[], None] | None = None) -> None:
    """Remove a directory if it exists. It is renamed first, so a kill leaves no half of it under its name.

    check: as of `atomic_write`.

    Raises:
        OpdctlError: it cannot be removed, or a lease on it was lost.
    """
    if path.exists():
        with translate_write_errors(path):
            trash = temporary_path(path, "old-")
            discard(trash)
            _check_before_rename(path, check)
            path.rename(trash)
            discard(trash)


# ── Disk space ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _disk_full(path: Path) -> OpdctlError:
    return OpdctlError(
        "disk_full",
        f"{path}: no space left on the device, {format_bytes(free_space(path))} free",
        hint="free some space and run the same command again: finished parts are kept; --dry-run estimates the disk "
        "space of a run",
    )


def free_space(path: Path) -> int:
    """Return the free bytes of the file system that `path` is on, or will be on."""
    return shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())).free


def require_space(path: Path, required_bytes: int, purpose: str) -> None:
    """Check that `required_bytes` are free on the file system of `path`.

    Raises:
        OpdctlError: less is free.
    """
    if (free := free_space(path)) < required_bytes:
        raise OpdctlError(
            "disk_full",
            f"{path}: {purpose} needs {format_bytes(required_bytes)}, {format_bytes(free)} free",
            hint="free some space and run the same command again, or use another --output",
        )


def format_bytes(count: int) -> str:
    """Return a number of bytes as text, in powers of 1024: format_bytes(1536) is "1.5 KiB"."""
    name, size = byte_unit(count)
    return f"{count} B" if name == "B" else f"{count / size:.1f} {name}"


def byte_unit(count: int) -> tuple[str, int]:
    """Return the largest unit that is not above `count`, and its size in bytes."""
    name, size = "B", 1
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count >= 1024 * size:
            name, size = larger, 1024 * size
    return name, size


# ── Text and JSON ────────────────────────────────────────────────────────────────────────────────────────────────────


def write_text(path: Path, text: str, check: Callable[[], None] | None = None) -> None:
    """Write a small file atomically. check: as of `atomic_write`."""
    with atomic_write(path, check) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_text(path: Path) -> str:
    """Return the text of a file of a run.

    Raises:
        OpdctlError: it is missing, not UTF-8, or not a regular file.
    """
    try:
        return parsing.read_bytes(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise corrupt_artifact(path, str(error)) from error


def write_json(path: Path, value: Mapping[str, Any], check: Callable[[], None] | None = None) -> None:
    """Write a JSON object with a digest of itself. check: as of `atomic_write`."""
    write_text(path, json.dumps({**value, "digest": digest_of(value)}, indent=1, ensure_ascii=False) + "\n", check)


def read_json(path: Path, form: Any = dict[str, Any], hint: str | None = None) -> Any:
    """Return the JSON object in `path`. The object is shared between callers: do not change it.

    form: the TypedDict that the object must match. hint: what to do if the file is corrupt.

    Raises:
        OpdctlError: the file is missing or corrupt, or has a version that this opdctl does not read.
    """
    with _translate_json_errors(path, hint):
        stat = parsing.check_regular(path)
        return _read_json_once(path, form, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


def parse_json_file(name: str, data: bytes, form: Any, hint: str) -> Any:
    """Return the JSON object in `data`, the content of a file that is elsewhere. form, hint: as of `read_json`.

    Raises:
        OpdctlError: as `read_json` does.
    """
    with _translate_json_errors(name, hint):
        return _check_json(name, data, form)


@contextlib.contextmanager
def _translate_json_errors(path: Path | str, hint: str | None) -> Iterator[None]:
    hint = hint or "restore it from a copy, or start again in another --output"
    try:
        yield
    except _ChecksumError as error:
        raise OpdctlError("checksum_mismatch", f"{path}: the content does not match its digest", hint=hint) from error
    except (OSError, ValueError) as error:
        raise corrupt_artifact(path, str(error), hint) from error


FOREIGN_DIRECTORIES = ("wandb",)
"""Directories of other programs, which link to their newest files. Nothing in them is read."""


class _ChecksumError(Exception):
    """The digest in a JSON file is not that of its content."""


@lru_cache(maxsize=4096)
def _read_json_once(path: Path, form: Any, identity: tuple[int, int, int]) -> Any:
    """Read and check a file once for each (inode, modification time, size): a replaced file has another one."""
    return _check_json(path, parsing.read_bytes(path), form)


def _check_json(path: Path | str, data: bytes, form: Any) -> Any:
    value = manifests.parse_object(data)
    digest = value.pop("digest", None)
    _check_version(path, value)
    if digest != digest_of(value):
        raise _ChecksumError
    return manifests.check_form(value, form)


def _check_version(path: Path | str, value: Mapping[str, Any]) -> None:
    kind, version = value.get("artifact"), value.get("version", value.get("schema_version"))
    newest = VERSIONS.get(kind, OLDEST_VERSION) if isinstance(kind, str) else OLDEST_VERSION
    if version is not None and not (isinstance(version, int) and OLDEST_VERSION <= version <= newest):
        raise OpdctlError(
            "unsupported_version",
            f"{path}: version {version!r}; this opdctl reads versions {OLDEST_VERSION} to {newest}",
            hint="use the opdctl that wrote it, or start again in another --output",
        )


def check_no_symlinks(*paths: Path) -> None:
    """Check that no path is a symbolic link, which may lead out of the run directory, or a device, socket or FIFO.

    Raises:
        OpdctlError: one is.
    """
    for path in paths:
        if path.is_symlink():
            raise corrupt_artifact(path, "is a symbolic link", "replace it with the file that it points to")
        if path.exists() and not path.is_dir() and not path.is_file():
            raise corrupt_artifact(path, "is not a regular file", "remove it")


def check_tree(directory: Path, *, directories_only: bool = False) -> None:
    """Check that a run directory contains only regular files and directories, at any depth. It may be a link itself.

    Everything that is read or written below it afterwards is within it. directories_only: links and special files are
    allowed where nothing is below them: `run repair` moves them away.

    Raises:
        OpdctlError: an entry is a symbolic link, a device, a socket or a FIFO.
    """
    pending = [str(directory)]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:
            continue  # removed in the meantime, or unreadable: then nothing in it can be opened
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in FOREIGN_DIRECTORIES:
                    pending.append(entry.path)
            elif not entry.is_file(follow_symlinks=False) and not (
                directories_only and not os.path.isdir(entry.path)  # entry.is_dir() fails on a link to itself
            ):
                check_no_symlinks(Path(entry.path))


def corrupt_artifact(path: Path | str, why: str, hint: str | None = None) -> OpdctlError:
    """Return the error for an artifact that differs from what was written."""
    hint = hint or f"remove {path} and run the command that writes it"
    return OpdctlError("corrupt_artifact", f"{path}: {why}", hint=hint)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    leases.check_held(path)
    with translate_write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON line for each value, unless the file holds exactly these lines already."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    try:
        is_written = parsing.read_bytes(path) == text.encode()  # a line that was cut need not be UTF-8
    except (OSError, ValueError):  # missing, or too large for what it was
        is_written = False
    if not is_written:
        write_text(path, text)
