"""TODO."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from opdctl.artifacts.files import atomic_write, check_no_symlinks, corrupt_artifact, sha256_file

# ── Model directories ────────────────────────────────────────────────────────────────────────────────────────────────


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Make the directory `final` by `fill(temporary directory)`, whole or not at all."""
    with atomic_write(final) as temporary:
        temporary.mkdir()
        fill(temporary)


def write_directory_with_digests(final: Path, fill: Callable[[Path], None]) -> dict[str, str]:
    """Make a directory as `publish` does, and return its files' digests."""
    digests = {}

    def fill_and_digest(folder: Path) -> None:
        fill(folder)
        digests.update(directory_digests(folder))

    write_directory(final, fill_and_digest)
    return digests


def link_or_copy(paths: Iterable[Path], old: Path, new: Path) -> int:
    """Let the folder `new` have files and folders of `old`, and return how many files: the same ones where the file
    system can link them, else copies. Every artifact is replaced when it changes, never written into; but
    the lines of metrics.jsonl are appended, so that it is copied."""
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    for file in files:
        target = new / file.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix == ".jsonl":
                shutil.copyfile(file, target)
            else:
                os.link(file, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, target)
    return len(files)


def directory_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory by its relative name; hidden ones are a file manager's."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(path)): sha256_file(p) for p in files}


def check_directory(
    path: Path, digests: Mapping[str, str], hint: str = "restore it, or start again in another --output"
) -> None:
    """Raise OpdctlError (code 3) unless the files of `path` are those in `digests`; none are where it is not there."""
    check_no_symlinks(path.parent, path, *path.rglob("*"))
    found = directory_digests(path)
    for name in sorted({*found, *digests}):
        if found.get(name) != digests.get(name):
            what = (
                "is missing"
                if name not in found
                else "was not written by this run"
                if name not in digests
                else "was changed"
            )
            raise corrupt_artifact(path / name, what, hint)


def matches_digest(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this digest."""
    return path.is_file() and not path.is_symlink() and sha256_file(path) == sha256
