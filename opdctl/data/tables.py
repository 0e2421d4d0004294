"""Rows of the user's data: JSON lines, CSV and Parquet files, and data sets of the Hugging Face hub."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

import pyarrow as pa
import pyarrow.parquet as pq

from opdctl.artifacts import parsing
from opdctl.artifacts.parquet_footer import check_parquet_size
from opdctl.errors import OpdctlError, did_you_mean, summarize_exception

TableRow = dict[str, Any]
BATCH_ROWS = 128
"""Rows of a Parquet file that are Python objects at the same time: a row of a code data set has 64 KB of test cases."""


def read_table(path: Path) -> Iterator[TableRow]:
    """Yield the rows of a `.jsonl`, `.parquet` or `.csv` file. All cells of a `.csv` file are text.

    Raises:
        OpdctlError: the file is missing, or a line is invalid.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise OpdctlError("missing_file", f"{path}{did_you_mean(path.name, siblings, path.parent)}")
    read = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix, _read_parquet)
    yield from read(path)


def _read_jsonl(path: Path) -> Iterator[TableRow]:
    with path.open("rb") as file:
        for number, line in enumerate(_read_lines(file, path), 1):
            if not line.strip():
                continue
            try:
                row = parsing.parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # not UTF-8, not JSON, or beyond a bound
                raise OpdctlError("invalid_data", f"{path}:{number}: {error}") from error
            if not isinstance(row, dict):
                raise OpdctlError("invalid_data", f"{path}:{number}: not a JSON object: {line[:40]!r}")
            yield row


def _read_lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """Yield the lines of a file. Raises OpdctlError if one is longer than a row can be: it is no text."""
    for number in itertools.count(1):
        line = file.readline(parsing.MAX_LINE_BYTES + 1)
        if len(line) > parsing.MAX_LINE_BYTES:
            raise OpdctlError("invalid_data", f"{path}:{number}: a line of more than {parsing.MAX_LINE_BYTES} bytes")
        if not line:
            return
        yield line


def _read_csv(path: Path) -> Iterator[TableRow]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(_read_lines(file, path), strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    reason = f"the number of cells is not {len(rows.fieldnames or ())}, that of the header"
                    raise OpdctlError("invalid_data", f"{path}:{rows.line_num}: {reason}")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise OpdctlError("invalid_data", f"{path}:{rows.line_num + 1}: {error}") from error


def _read_parquet(path: Path) -> Iterator[TableRow]:
    try:
        check_parquet_size(path, follow_links=True)
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OpdctlError("invalid_data", f"{path}: not readable as Parquet: {error}") from error


def load_from_hub(
    source: str,
    split: str,
    revision: str | None,
    key: str,
    *,
    subset: str | None = None,
    data_files: str | None = None,
    hint: str = "give a .jsonl, .parquet or .csv file; without a network, download the data set elsewhere",
) -> Iterator[TableRow]:
    """Yield the rows of a hub data set, of the file `data_files` in it if one is given. `key` names the setting in
    errors.

    Raises:
        OpdctlError: the download fails.
    """
    import datasets

    try:
        yield from datasets.load_dataset(source, subset, data_files=data_files, split=split, revision=revision)
    except Exception as error:  # datasets raises its own errors, and those of huggingface_hub, httpx and the OS
        reason = f"`{source}` is not a local file, and the hub request failed: {summarize_exception(error)}"
        raise OpdctlError("failed_download", f"{key}: {reason}", hint=hint) from error


def read_cell(row: TableRow, column: str, key: str, location: str) -> Any:
    """Return the value of a column, or of a field of it: `reward_model.ground_truth`. A column of that very name comes
    first; a field of null is null.

    key: the setting that names the column. location: of the row, for errors.

    Raises:
        OpdctlError: there is no such column, or a value on the path has no fields.
    """
    if column in row:
        return row[column]
    value: Any = row
    prefix = ""
    for name in column.split("."):
        if value is None:
            return None
        fields = value if isinstance(value, dict) else {}
        if name not in fields:
            known = [f"{prefix}{field}" for field in fields]
            raise OpdctlError(
                "invalid_data",
                f"{location}: no column `{column}` ({key}){did_you_mean(f'{prefix}{name}', known)}",
                hint=f"use one of the columns {', '.join(f'`{field}`' for field in known) or '(none)'}",
            )
        value, prefix = fields[name], f"{prefix}{name}."
    return value


def check_unicode(text: str, location: str) -> str:
    """Return the text.

    Raises:
        OpdctlError: it has a lone surrogate, which is possible in JSON and not in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OpdctlError("invalid_data", f"{location}: invalid Unicode at character {error.start}") from error
    return text
