"""A directory whose large files are in the memory of processes, for others of the same machine to read.

Each large file is a memory file (memfd_create) of the process that wrote it, and in the directory a link to it. The
system frees it when that process ends, however it ends.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from opdctl.artifacts.files import discard, translate_write_errors

COPIED_BYTES = 2**24  # at a time


class MemoryDirectory:
    """An existing directory, to which this process adds memory files. They last until `close`."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptors: list[int] = []

    def create_file(self, path: Path) -> BinaryIO:
        """Return a new file in memory, to which `path` in this directory leads."""
        descriptor = os.memfd_create(path.name)
        self._descriptors.append(descriptor)
        path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
        return open(descriptor, "wb", closefd=False)

    def copy_files(self, names: Iterable[str], target: Path) -> None:
        """Copy files of the directory to the same places in another one.

        Raises:
            OpdctlError: the disk is full.
        """
        for name in names:
            with translate_write_errors(target / name):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with (self.path / name).open("rb") as source, (target / name).open("wb") as copy:
                    # Not by shutil.copyfile: the system's calls for it write 64 KB at a time, and each may wait.
                    shutil.copyfileobj(source, copy, COPIED_BYTES)

    def names_on_disk(self) -> list[str]:
        """Return the relative names of the files that are not in memory."""
        files = (file for file in sorted(self.path.rglob("*")) if file.is_file() and not file.is_symlink())
        return [str(file.relative_to(self.path)) for file in files]

    def close(self) -> None:
        """Free the memory of this process's files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def make_temporary_directory(name: str) -> Path:
    """Create and return a directory of that name in the system's directory for temporary files."""
    path = Path(tempfile.mkdtemp(prefix="opdctl-student-"), name)
    path.mkdir()
    return path


def remove_temporary_directory(path: Path) -> None:
    """Remove a directory of `make_temporary_directory`."""
    discard(path.parent)
