"""The rows of a prompt source: files, folders, patterns, folders saved by `datasets`, and hub data sets."""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdctl.data.cells import read_cell
from opdctl.data.tables import TableRow, is_saved_dataset, load_from_disk, load_from_hub, read_table
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.recipe.conditions import parse_condition
from opdctl.recipe.data_names import TABLE_SUFFIXES, is_data_file, is_local, is_pattern
from opdctl.recipe.prompts import PromptSource

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that say to which split a file belongs, as in `datasets`."""


@dataclass(frozen=True)
class LocatedRow:
    """A row of a source. number: in the source, from 1. location: the file and the row in it, for errors."""

    number: int
    location: str
    row: TableRow


def read_source(source: PromptSource, key: str, *, has_arrays: bool = False) -> Iterator[LocatedRow]:
    """Yield the rows of a source that satisfy its conditions.

    key: of the source's section in the recipe, for errors. has_arrays: as of `read_table`.

    Raises:
        OpdctlError: a file is missing or invalid, a value cannot be compared, or the download fails.
    """
    numbers = _number_rows(source, key, has_arrays=has_arrays)
    tests = {column: parse_condition(condition) for column, condition in source.where.items()}
    for located in numbers:
        for column, is_satisfied in tests.items():
            name = f"{key}.where"
            try:
                if not is_satisfied(read_cell(located.row, column, name, located.location)):
                    break
            except ValueError as error:
                raise OpdctlError("invalid_data", f"{located.location}: `{column}` ({name}) {error}") from None
        else:
            yield located


def find_files(source: PromptSource, key: str) -> list[Path]:
    """Return the local files of a source in the order of their rows; those of a saved data set by name.

    Raises:
        OpdctlError: nothing is there, or it is of an unknown kind.
    """
    if not is_local(source.source):
        return []
    paths = [path for name in source.paths for path in _expand(name, f"{key}.source", source.split)]
    return [file for path in paths for file in list_data_files(path)]


def find_inputs(names: Sequence[str], option: str) -> list[Path]:
    """Return what an option of the command line names: files, also by pattern or folder, and folders saved by
    `datasets`. A folder is read whole, whatever splits the names of its files contain.

    Raises:
        OpdctlError: nothing is there, or it is of an unknown kind.
    """
    return [path for name in names for path in _expand(name, option, None)]


def list_data_files(path: Path) -> list[Path]:
    """Return a file, or the files of a folder saved by `datasets`."""
    return sorted(path.rglob("*.arrow")) if path.is_dir() else [path]


def _number_rows(source: PromptSource, key: str, *, has_arrays: bool) -> Iterator[LocatedRow]:
    number = 0
    for location, rows in _open_tables(source, key, has_arrays=has_arrays):
        for number_in_file, row in enumerate(rows, 1):
            number += 1
            yield LocatedRow(number, f"{location}: row {number_in_file}", row)


def _open_tables(source: PromptSource, key: str, *, has_arrays: bool) -> Iterator[tuple[str, Iterator[TableRow]]]:
    """Yield the name and the rows of each file of a source."""
    if not is_local(source.source):
        (name,) = source.paths
        rows = load_from_hub(
            name,
            source.split,
            source.revision,
            f"{key}.source",
            subset=source.subset,
            data_files=source.data_files,
        )
        yield source.location, rows
        return
    for name in source.paths:
        for path in _expand(name, f"{key}.source", source.split):
            if path.is_dir():
                yield str(path), load_from_disk(path, source.split, f"{key}.split")
            else:
                yield str(path), read_table(path, has_arrays=has_arrays)


def _expand(name: str, key: str, split: str | None) -> list[Path]:
    """Return the files of a name: a file, a pattern or a folder; and folders saved by `datasets`.

    key: where the name was given, for errors. split: of folders, None for all of their files.
    """
    path = Path(name).expanduser()
    if is_pattern(name) and not path.exists():
        found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise OpdctlError("missing_file", f"{key}: no file matches {name}")
        return [file for each in found for file in _expand(str(each), key, split)]
    if path.is_dir():
        return [path] if is_saved_dataset(path) else _files_of_folder(path, split, key)
    if is_data_file(name):
        return [path]
    if path.exists():
        suffixes = " or ".join(TABLE_SUFFIXES)
        raise OpdctlError("unsupported_setting", f"{key}: {path}: the name must end in {suffixes}")
    raise OpdctlError(
        "missing_file",
        f"{key}: {name} is no local file or folder",
        hint="correct the path"
        + "; a hub data set beside other sources is a section [prompts.sources.NAME]" * (split is not None),
    )


def _files_of_folder(folder: Path, split: str | None, key: str) -> list[Path]:
    """Return the data files of a folder, those of one split if their names contain splits."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if is_data_file(file.name) and file.is_file() and not _is_hidden(file.relative_to(folder))
    )
    if not files:
        raise OpdctlError("missing_file", f"{key}: {folder}: no file that ends in {' or '.join(TABLE_SUFFIXES)}")
    splits = {file: _find_split(file.relative_to(folder)) for file in files}
    if split is None or not any(splits.values()):
        return files
    if chosen := [file for file in files if splits[file] == split]:
        return chosen
    known = sorted({name for name in splits.values() if name})
    raise OpdctlError(
        "unsupported_setting",
        f"{key.removesuffix('source')}split: {folder}: no file of split `{split}`{did_you_mean(split, known)}",
        hint=f"use one of the splits {', '.join(f'`{name}`' for name in known)}, or name the files",
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _find_split(path: Path) -> str | None:
    """Return the split in the name of a file, or of a folder around it."""
    for part in reversed(path.parts):
        words = re.split(r"[^a-z0-9]+", part.lower())
        for split, names in SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return None
