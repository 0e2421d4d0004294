"""Complete directories, such as models and trainer states: written atomically, checked file by file."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from opdctl.artifacts import parsing
from opdctl.artifacts.files import (
    atomic_write,
    check_no_symlinks,
    corrupt_artifact,
    flush_path,
    fsync_path,
    sha256_files,
    translate_write_errors,
)

CARD_FILE = "README.md"
"""The model card of a student. It has no digest: people may edit it, and it lists settings that may change."""
DIGESTS_FILE = "digests.json"
"""The digests of a trainer state, in its directory. It contains its own digest."""
OTHER_WRITER = "another process has changed or removed it"


class FileDigest(NamedTuple):
    """The SHA-256 of a file, as hexadecimal digits, and its size in bytes."""

    sha256: str
    size: int


def write_directory(final: Path, fill: Callable[[Path], None], *, flush: bool = True) -> None:
    """Write the directory `final` atomically; `fill` writes the content into the temporary directory that it gets.

    flush: as of `atomic_write`.
    """
    with atomic_write(final, flush=flush) as temporary:
        temporary.mkdir()
        fill(temporary)


def flush_and_hash(directory: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Flush files of a directory to disk, and return their digests by name.

    Raises:
        OpdctlError: the disk is full, or a file is missing.
    """
    files = {name: directory / name for name in names}
    for file in files.values():
        if not file.is_file():
            raise corrupt_artifact(file, OTHER_WRITER)
        with translate_write_errors(file):
            fsync_path(file)
    digests = sha256_files([*files.values()])
    return {name: FileDigest(digests[file], file.stat().st_size) for name, file in files.items()}


def complete_directory(path: Path, known: Mapping[str, FileDigest]) -> dict[str, str]:
    """Flush a directory that was written without it, and return the SHA-256 of its files by name.

    known: the digests of files that other processes have flushed and read. The others are read.

    Raises:
        OpdctlError: the disk is full; a file in `known` is missing or has another size.
    """
    for name, (_, size) in known.items():
        if not has_size(path / name, size):
            raise corrupt_artifact(path / name, OTHER_WRITER)
    digests = directory_digests(path, known)
    flush_path(path)
    return digests


def link_or_copy(paths: Iterable[Path], old: Path, new: Path) -> int:
    """Put files and directories of `old` into `new` under the same names, and return the number of files.

    Files are hard-linked where the file system can: artifacts are replaced, never changed in place.
    """
    expanded = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files = [file for file in expanded if file.is_file() and not file.name.startswith(".")]
    count = 0
    for file in files:
        target = new / file.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except FileNotFoundError:
            continue  # removed in the meantime by a worker: of no use any more
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(file, target)
        count += 1
    return count


def has_size(path: Path, size: int) -> bool:
    """Whether there is a file of this size in bytes."""
    return path.is_file() and path.stat().st_size == size


def directory_digests(path: Path, known: Mapping[str, FileDigest] = MappingProxyType({})) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory by relative name.

    Hidden files, the model card and DIGESTS_FILE have none. known: digests of files that need not be read.
    """
    names = [str(file.relative_to(path)) for file in _files_with_digests(path)]
    read = sha256_files([path / name for name in names if name not in known])
    return {name: known[name].sha256 if name in known else read[path / name] for name in names}


def _files_with_digests(path: Path) -> list[Path]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file not in (path / CARD_FILE, path / DIGESTS_FILE)]


def file_states(path: Path) -> list[tuple[Path, int, int]]:
    """Return the size in bytes and the modification time in nanoseconds of every file in a directory.

    Those of a symbolic link are its own, since a file that was replaced by a link has changed.
    """
    states = [(file, file.lstat()) for file in sorted(path.rglob("*")) if file.is_file()]
    return [(file, state.st_size, state.st_mtime_ns) for file, state in states]


def check_directory(
    path: Path, digests: Mapping[str, str], hint: str = "restore it from a copy, or start again in another --output"
) -> None:
    """Check that a directory holds exactly the files in `digests`, whatever its model card.

    Raises:
        OpdctlError: a file is missing, changed, or not in `digests`.
    """
    check_no_symlinks(path.parent, path, *path.rglob("*"))
    names = {str(file.relative_to(path)) for file in _files_with_digests(path)}
    for name in sorted({*names, *digests} - {CARD_FILE}):
        if name not in names:
            raise corrupt_artifact(path / name, "is missing", hint)
        if name not in digests:
            raise corrupt_artifact(path / name, "was not written by this run", hint)
        try:
            parsing.check_size(path / name)
        except (OSError, ValueError) as error:
            raise corrupt_artifact(path / name, str(error), hint) from None
    for file, sha256 in sha256_files([path / name for name in sorted(names)]).items():
        if sha256 != digests[str(file.relative_to(path))]:
            raise corrupt_artifact(file, "checksum mismatch", hint)
