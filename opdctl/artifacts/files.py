"""TODO."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opdctl.artifacts import manifests
from opdctl.artifacts.records import SCHEMA_VERSION
from opdctl.errors import DISK_FULL_ERRNOS, WRITE_ERRNOS, ExitCode, OpdctlError

# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot do it with folders, and need it not
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a folder, and those above it, and have their names on the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)


def temporary_path(final: Path, kind: str = "") -> Path:
    return final.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{kind}{final.name}")


def discard(path: Path) -> None:
    """Remove whatever is at `path`; not what a link there leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_temporary_files(folder: Path, *, everyones: bool = False) -> None:
    """Remove what dead processes of this machine left half-written in `folder`; `everyones`: what any process left, for
    whoever is alone at work there."""
    for left in folder.glob(".tmp-*" if everyones else f".tmp-{socket.gethostname()}-*"):
        pid = left.name.removeprefix(f".tmp-{socket.gethostname()}-").partition("-")[0]
        if everyones or (pid.isdigit() and pid != str(os.getpid()) and not Path("/proc", pid).exists()):
            discard(left)


@contextlib.contextmanager
def atomic_write(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; when the block ends well, flush it to disk and rename it to `final`."""
    temporary = temporary_path(final)
    with translate_write_errors(final):
        try:
            make_directory(final.parent)
            discard(temporary)  # of a dead process of our own number: in containers all have the same
            yield temporary
            for path in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
                fsync_path(path)
            if final.is_dir():
                remove_directory(final)  # a directory cannot be renamed over another one
            os.replace(temporary, final)
            fsync_path(final.parent)
        finally:
            discard(temporary)


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Say of `path` what the system says when it cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise _disk_full(path) from error
        if error.errno in WRITE_ERRNOS:
            raise OpdctlError(f"{path}: cannot be written: {error.strerror}", code=ExitCode.UNAVAILABLE) from error
        raise
    except SafetensorError as error:  # wraps the system's error in its text
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise _disk_full(path) from error


def _disk_full(path: Path) -> OpdctlError:
    return OpdctlError(
        f"{path}: the disk is full: it takes more than the {format_bytes(free_space(path))} that are free",
        hint="free some space and run the same command again: finished parts are kept. What a run takes in all is said "
        "by --dry-run",
        code=ExitCode.UNAVAILABLE,
    )


def free_space(path: Path) -> int:
    """Return the bytes that are free where `path` is, or will be."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise OpdctlError (code 5) unless `needed` bytes are free where `path` is."""
    if (free := free_space(path)) < needed:
        raise OpdctlError(
            f"{path}: {what} needs {format_bytes(needed)} of disk space, {format_bytes(free)} are free",
            hint="free some space and run the same command again, or use another --output",
            code=ExitCode.UNAVAILABLE,
        )


def format_bytes(count: int) -> str:
    """Return a number of bytes for a person, in powers of 1024."""
    name, size = byte_unit(count)
    return f"{count} B" if name == "B" else f"{count / size:.1f} {name}"


def byte_unit(count: int) -> tuple[str, int]:
    """Return the unit that leaves the fewest digits before the point, and the bytes that it stands for."""
    name, size = "B", 1
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count >= 1024 * size:
            name, size = larger, 1024 * size
    return name, size


def write_text(path: Path, text: str) -> None:
    """Write a whole small file, or leave the old one."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, with a digest of itself."""
    write_text(path, json.dumps({**value, "digest": digest_of(value)}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: Any = dict[str, Any], hint: str | None = None) -> Any:
    """Return the JSON object in `path`, of the form `kind`.

    Raises OpdctlError (code 3) when it is not what was written, or was by another version; `hint` is what to do then.
    """
    check_no_symlinks(path)
    try:
        value = manifests.parse(path.read_bytes())
        written = value.pop("digest", None)
        _check_version(path, value.get("schema_version", SCHEMA_VERSION))
        if written != digest_of(value):
            raise ValueError("its content is not that of its digest")
        return manifests.check(value, kind)
    except (OSError, ValueError) as error:
        hint = hint or "restore it from a copy, or start again in another --output"
        raise corrupt_artifact(path, str(error), hint) from error


def _check_version(path: Path, version: object) -> None:
    if version != SCHEMA_VERSION:
        raise OpdctlError(
            f"{path}: schema version {version!r}, this opdctl reads version {SCHEMA_VERSION}",
            hint="go on with the opdctl that wrote it, or start again in another --output",
            code=ExitCode.BAD_DATA,
        )


def check_no_symlinks(*paths: Path) -> None:
    """Raise OpdctlError (code 3) where one of the paths is a symbolic link: it may lead out of the run directory."""
    for path in paths:
        if path.is_symlink():
            raise corrupt_artifact(path, "a symbolic link, and none is followed", "put what it leads to in its place")


def corrupt_artifact(path: Path, why: str, hint: str | None = None) -> OpdctlError:
    """Return the error for an artifact that is not what was written."""
    hint = hint or f"remove {path} and run the command that made it again"
    return OpdctlError(f"{path}: damaged: {why}", hint=hint, code=ExitCode.BAD_DATA)


def copy_file(path: Path, folder: Path) -> None:
    """Put a copy of a file into a folder, in the place of one of its name."""
    shutil.copyfile(path, folder / path.name)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with translate_write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Make `path` hold one JSON line a value; a file that holds them already is left alone."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    if not path.exists() or read_text(path) != text:
        write_text(path, text)


def remove_directory(path: Path) -> None:
    """Remove a directory if it is there: renamed first, so that a kill cannot leave half of it under its name."""
    if path.exists():
        with translate_write_errors(path):
            grave = temporary_path(path, "old-")
            discard(grave)
            path.rename(grave)
            discard(grave)
