"""Complete directories, such as models and trainer states: written atomically, checked file by file."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from opdctl.artifacts.files import atomic_write, check_no_symlinks, corrupt_artifact, sha256_file

CARD_FILE = "README.md"
"""The model card of a student. It has no digest: people may edit it, and it lists settings that may change."""


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Write the directory `final` atomically; `fill` writes the content into the temporary directory that it gets."""
    with atomic_write(final) as temporary:
        temporary.mkdir()
        fill(temporary)


def write_directory_with_digests(final: Path, fill: Callable[[Path], None]) -> dict[str, str]:
    """Write a directory atomically and return the SHA-256 of its files by name."""
    digests = {}

    def fill_and_digest(directory: Path) -> None:
        fill(directory)
        digests.update(directory_digests(directory))

    write_directory(final, fill_and_digest)
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


def directory_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory by relative name, without the model card and hidden files."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(path)): sha256_file(file) for file in files if file != path / CARD_FILE}


def check_directory(
    path: Path, digests: Mapping[str, str], hint: str = "restore it from a copy, or start again in another --output"
) -> None:
    """Check that a directory holds exactly the files in `digests`, whatever its model card.

    Raises:
        OpdctlError: a file is missing, changed, or not in `digests`.
    """
    check_no_symlinks(path.parent, path, *path.rglob("*"))
    present = directory_digests(path)
    for name in sorted({*present, *digests} - {CARD_FILE}):
        if name not in present:
            raise corrupt_artifact(path / name, "is missing", hint)
        if name not in digests:
            raise corrupt_artifact(path / name, "was not written by this run", hint)
        if present[name] != digests[name]:
            raise corrupt_artifact(path / name, "checksum mismatch", hint)
