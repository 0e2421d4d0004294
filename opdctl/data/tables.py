"""Rows of the user's data: JSON, CSV and Parquet files, and data sets of the Hugging Face hub."""

import csv
import gzip
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from opdctl.artifacts import parsing
from opdctl.artifacts.parquet_footer import check_parquet_size
from opdctl.errors import OpdctlError, did_you_mean, summarize_exception
from opdctl.recipe.data_names import is_data_file

TableRow = dict[str, Any]
BATCH_ROWS = 128
BATCH_BYTES = 2**26
"""Rows of a Parquet file that are Python objects at the same time: a row of a code data set has 64 KB of test cases, of
LiveCodeBench megabytes."""
SEPARATORS = ",;\t|"


def read_table(path: Path, *, has_arrays: bool = False) -> Iterator[TableRow]:
    """Yield the rows of a JSON, CSV or Parquet file, by its ending. All cells of a CSV file are text.

    has_arrays: lists of numbers in a Parquet file are numpy arrays, which take less time and memory.

    Raises:
        OpdctlError: the file is missing, a line is invalid, or two columns have one name.
    """
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*") if is_data_file(file.name)]
        raise OpdctlError("missing_file", f"{path}{did_you_mean(path.name, siblings, path.parent)}")
    *_, kind = [suffix for suffix in path.name.lower().split(".") if suffix not in COMPRESSIONS]
    yield from _read_parquet(path, has_arrays=has_arrays) if kind == "parquet" else READERS[kind](path)


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open_gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path))


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(path, compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {"gz": _open_gzip, "zst": _open_zstd}


def _open(path: Path) -> IO[bytes]:
    """Open a file, which may be compressed, for reading."""
    return COMPRESSIONS.get(path.suffix.lower()[1:], lambda plain: plain.open("rb"))(path)


def _read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, without a byte order mark.

    Raises:
        OpdctlError: a line is not UTF-8, or longer than a row can be: it is no text; the compression is corrupt.
    """
    with _open(path) as file:
        for number in itertools.count(1):
            try:
                line = file.readline(parsing.MAX_LINE_BYTES + 1)
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except (EOFError, OSError, zlib.error, pa.ArrowException, UnicodeDecodeError) as error:
                raise OpdctlError("invalid_data", f"{path}:{number}: {error}") from error
            if len(line) > parsing.MAX_LINE_BYTES:
                reason = f"a line of more than {parsing.MAX_LINE_BYTES} bytes"
                raise OpdctlError("invalid_data", f"{path}:{number}: {reason}")
            if not line:
                return
            yield text


def _read_json(path: Path) -> Iterator[TableRow]:
    """Yield the rows of a file with one object a line, or with one list of objects."""
    lines = ((number, line) for number, line in enumerate(_read_lines(path), 1) if line.strip())
    for number, line in lines:
        if number == 1 and line.lstrip().startswith("["):
            yield from _read_json_list(path, itertools.chain([line], (line for _, line in lines)))
            return
        yield _as_row(_parse_json(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json_list(path: Path, lines: Iterator[str]) -> Iterator[TableRow]:
    content = io.StringIO()
    for line in lines:
        content.write(line)
        if content.tell() > parsing.MAX_JSON_BYTES:
            reason = f"a list of more than {parsing.MAX_JSON_BYTES} characters"
            raise OpdctlError("invalid_data", f"{path}: {reason}", hint="write one object a line")
    for number, value in enumerate(_parse_json(content.getvalue(), str(path)), 1):
        yield _as_row(value, f"{path}: row {number}")


def _parse_json(text: str, location: str) -> Any:
    try:
        return parsing.parse_json(text, unique_keys=True)
    except ValueError as error:  # no JSON, or beyond a bound
        hint = "write one JSON object a line, or one list of objects"
        raise OpdctlError("invalid_data", f"{location}: {error}", hint=hint) from error


def _as_row(value: Any, location: str) -> TableRow:
    if not isinstance(value, dict):
        raise OpdctlError("invalid_data", f"{location}: not a JSON object: {str(value)[:40]!r}")
    return value


def _read_csv(path: Path) -> Iterator[TableRow]:
    csv.field_size_limit(2**31 - 1)
    lines = _read_lines(path)
    header = next(lines, "")
    separator = max(SEPARATORS, key=lambda each: len(next(csv.reader([header], delimiter=each), [])))
    rows = csv.DictReader(itertools.chain([header], lines), strict=True, delimiter=separator)
    try:
        _check_unique(rows.fieldnames or (), path)
        for row in rows:
            if None in row or None in row.values():
                reason = f"the number of cells is not {len(rows.fieldnames or ())}, that of the header"
                raise OpdctlError("invalid_data", f"{path}:{rows.line_num}: {reason}")
            yield row
    except csv.Error as error:
        raise OpdctlError("invalid_data", f"{path}:{rows.line_num + 1}: {error}") from error


def _check_unique(names: Sequence[str], path: Path) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise OpdctlError(
            "invalid_data", f"{path}: two columns have the name `{repeated[0]}`", hint="rename one of them"
        )


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_parquet(path: Path, *, has_arrays: bool) -> Iterator[TableRow]:
    try:
        check_parquet_size(path, follow_links=True)
        file = pq.ParquetFile(path)
        _check_unique(file.schema_arrow.names, path)
        for batch in file.iter_batches(_rows_per_batch(file.metadata)):
            yield from _rows_of(batch, has_arrays=has_arrays)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OpdctlError("invalid_data", f"{path}: not readable as Parquet: {error}") from error


def _rows_per_batch(metadata: pq.FileMetaData) -> int:
    num_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(num_bytes, 1)))


def _rows_of(batch: pa.RecordBatch | pa.Table, *, has_arrays: bool = False) -> Iterator[TableRow]:
    columns = {
        field.name: _to_arrays(column) if has_arrays and _is_numbers(field.type) else _to_python(column, field.type)
        for field, column in zip(batch.schema, batch, strict=True)
    }
    yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _is_numbers(kind: pa.DataType) -> bool:
    """Whether a type is a list of numbers, of any length."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and (pa.types.is_primitive(kind.value_type) and not pa.types.is_temporal(kind.value_type))


def _to_arrays(column: pa.Array) -> list[npt.NDArray[Any] | None]:
    """Return the lists of numbers of a column; a number that is null is NaN."""
    numbers, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_pylist()
    spans = zip(offsets[:-1], offsets[1:], column.is_valid().to_pylist(), strict=True)
    return [numbers[start:end] if is_valid else None for start, end, is_valid in spans]


def _to_python(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return [_convert(value, kind) for value in values] if _is_converted(kind) else values


def _is_converted(kind: pa.DataType) -> bool:
    """Whether a type contains numbers of 16 or 32 bits, or JSON."""
    is_own = pa.types.is_float32(kind) or pa.types.is_float16(kind) or _is_json(kind)
    return is_own or any(_is_converted(kind.field(i).type) for i in range(kind.num_fields))


def _is_json(kind: pa.DataType) -> bool:
    """Whether a type is the text of JSON values, by which `datasets` stores those of mixed types."""
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def _convert(value: Any, kind: pa.DataType) -> Any:
    """Return a value with its short numbers as they were written, 0.1 and not 0.10000000149 for the float32 next to it,
    and with its JSON read."""
    if value is None:
        return None
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return float(str((np.float16 if pa.types.is_float16(kind) else np.float32)(value)))
    if _is_json(kind):
        return parsing.parse_json(value)
    if isinstance(value, dict):
        return {field.name: _convert(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_convert(item, kind.value_type) for item in value]
    return value


READERS: dict[str, Callable[[Path], Iterator[TableRow]]] = {
    "jsonl": _read_json,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
}


# ── Data sets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_from_hub(
    source: str,
    split: str,
    revision: str | None,
    key: str,
    *,
    subset: str | None = None,
    data_files: str | None = None,
    hint: str = "give a .jsonl, .json, .csv or .parquet file; without a network, download the data set elsewhere",
) -> Iterator[TableRow]:
    """Yield the rows of a hub data set, of the file `data_files` in it if one is given. `key` names the setting in
    errors.

    Raises:
        OpdctlError: the download fails.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(source, subset, data_files=data_files, split=split, revision=revision)
        yield from _read_dataset(loaded)
    except Exception as error:  # datasets raises its own errors, and those of huggingface_hub, httpx and the OS
        reason = f"`{source}` is not a local file, and the hub request failed: {summarize_exception(error)}"
        raise OpdctlError("failed_download", f"{key}: {reason}", hint=hint) from error


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_from_disk(path: Path, split: str, key: str) -> Iterator[TableRow]:
    """Yield the rows of a folder that `datasets` saved. `key` names the setting of the split in errors.

    Raises:
        OpdctlError: it is corrupt, or has no such split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # the errors of datasets, pyarrow, fsspec and the OS
        raise OpdctlError("invalid_data", f"{path}: not readable by datasets: {summarize_exception(error)}") from error
    if not isinstance(saved, datasets.DatasetDict):
        yield from _read_dataset(saved)
        return
    if split not in saved:
        raise OpdctlError(
            "unsupported_setting",
            f"{key}: {path}: no split `{split}`{did_you_mean(split, saved)}",
            hint=f"use one of the splits {', '.join(f'`{name}`' for name in saved)}",
        )
    yield from _read_dataset(saved[split])


def _read_dataset(dataset: Any) -> Iterator[TableRow]:
    """Yield the rows of a `datasets.Dataset`. In its Arrow format no image or sound is decoded."""
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from _rows_of(table)
