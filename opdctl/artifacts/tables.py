"""Rows as Parquet and scores as safetensors. The columns are those of the records; their types come from the
annotations."""

import contextlib
import json
import shlex
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opdctl.artifacts import manifests, parsing
from opdctl.artifacts.files import atomic_write, corrupt_artifact
from opdctl.artifacts.manifests import ScoresRecord
from opdctl.artifacts.parquet_footer import check_parquet_size
from opdctl.artifacts.records import (
    PER_TOKEN,
    STORED_IF_PRESENT,
    EvalPrompt,
    ExportedResponse,
    GradedResponse,
    HiddenStates,
    Ids,
    Logprobs,
    LossMask,
    Prompt,
    Response,
    RoutedExperts,
    TokenScores,
    cumulative_offsets,
)
from opdctl.errors import OpdctlError

Row = TypeVar("Row", Prompt, EvalPrompt, Response, GradedResponse, ExportedResponse)
COMPRESSION = "zstd"
ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float64(),
    bool: pa.bool_(),
    Ids: pa.list_(pa.int32()),
    Logprobs: pa.list_(pa.float32()),
    LossMask: pa.list_(pa.bool_()),
    RoutedExperts: pa.binary(),
}
"""The Arrow type of each annotation. Arrays of several dimensions are stored flat. Lists of bytes take ten times the
time of a binary value."""
TENSOR_TYPES: dict[Any, str] = {Ids: "I32", Logprobs: "F32", HiddenStates: "F32"}
OFFSETS, HIDDEN_STATES = "offsets", "hidden_states"


# ── Columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Column:
    """A field of a record: its annotation without `| None` and `Annotated`, and what these say."""

    def __init__(self, name: str, annotation: Any, default: Any):
        variants = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        (kind,) = (variant for variant in variants if variant is not type(None))
        self.name, self.default, self.is_nullable = name, default, type(None) in variants
        notes = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
        self.is_per_token, self.is_stored_if_present = PER_TOKEN in notes, STORED_IF_PRESENT in notes
        self.kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind


def columns_of(record: type) -> tuple[Column, ...]:
    """Return the columns of a record, in order."""
    hints = get_type_hints(record, include_extras=True)
    return tuple(Column(field.name, hints[field.name], field.default) for field in fields(record))


def arrow_schema(record: type, rows: Sequence[Any] | None = None) -> pa.Schema:
    """Return the Parquet schema of a record, or of the columns with which `rows` are stored."""
    columns = columns_of(record)
    if rows is not None:
        columns = tuple(
            each
            for each in columns
            if not each.is_stored_if_present or any(getattr(row, each.name) is not None for row in rows)
        )
    return pa.schema([pa.field(each.name, ARROW_TYPES[each.kind], nullable=each.is_nullable) for each in columns])


@cache
def tensor_specs() -> dict[str, tuple[str, int]]:
    """Return the type and the number of dimensions of each tensor of a score part."""
    scores = {
        each.name: (TENSOR_TYPES[each.kind], 2 if each.is_per_token or each.kind is HiddenStates else 1)
        for each in columns_of(TokenScores)
    }
    return {OFFSETS: ("I64", 1), **scores}


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_rows(path: Path, rows: Sequence[Row], record: type[Row], metadata: Mapping[str, str] | None = None) -> None:
    """Write rows as Parquet with page checksums: without them most bit flips go undetected."""
    schema = arrow_schema(record, rows).with_metadata(metadata and dict(metadata))
    columns = {name: [_flatten(getattr(row, name)) for row in rows] for name in schema.names}
    # A dictionary of binary values, which are long and unequal, would only take time.
    leaves = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema if f.type != pa.binary()]
    pq.write_table(
        pa.table(columns, schema=schema), path, compression=COMPRESSION, use_dictionary=leaves, write_page_checksum=True
    )


@contextlib.contextmanager
def open_row_writer(
    path: Path, record: type[Row], metadata: Mapping[str, str]
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yield a function that appends rows to a new Parquet file, which exists when the block has ended. Each call is a
    row group.

    Raises:
        OpdctlError: the file cannot be written.
    """
    schema = arrow_schema(record).with_metadata(dict(metadata))
    with (
        atomic_write(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression=COMPRESSION, write_page_checksum=True) as writer,
    ):

        def write(rows: Sequence[Row]) -> None:
            columns = {name: [_flatten(getattr(row, name)) for row in rows] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))

        yield write


def _flatten(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.tobytes() if value.dtype == np.uint8 else value.reshape(-1)


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> list[Path]:
    """Write columns of numbers or text as `path`.parquet and `path`.csv and return both paths; NaN is null."""
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    paths = [path.with_name(f"{path.name}.parquet"), path.with_name(f"{path.name}.csv")]
    for final, write in zip(paths, (pq.write_table, pa.csv.write_csv), strict=True):
        with atomic_write(final) as temporary:
            write(table, temporary)
    return paths


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write the run's prompts atomically."""
    with atomic_write(path) as temporary:
        write_rows(temporary, prompts, Prompt)


def read_rows(path: Path, record: type[Row], count: int | None = None) -> list[Row]:
    """Return the rows of one Parquet file. A column that the file lacks has its default.

    count: the recorded number of rows, if there is one.

    Raises:
        OpdctlError: the file is corrupt, lacks a required column or has an unknown one, has another number of rows, or
            would take much more memory than its size explains.
    """
    try:
        check_parquet_size(path, count)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = _stored_columns(file.schema_arrow, record)
            table = file.read()
        table.validate(full=True)
        values = {each.name: _read_column(each, table[each.name]) for each in columns}
        for each in columns:
            if each.is_per_token:
                values[each.name] = _reshape_top_k(values[each.name], [len(ids) for ids in values["response_ids"]])
    except _UnknownColumnsError as error:
        raise _unsupported_columns(path, error) from error
    except (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise corrupt_artifact(path, str(error)) from error
    return [record(**{name: column[i] for name, column in values.items()}) for i in range(table.num_rows)]


def read_columns(path: Path, record: type[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return some columns of a Parquet file, one dictionary a row, for a file that was checked before. Per-token top-k
    columns are flat."""
    with pq.ParquetFile(path) as file:
        table = file.read(columns=list(names))
    columns = {each.name: _read_column(each, table[each.name]) for each in columns_of(record) if each.name in names}
    return [{name: column[index] for name, column in columns.items()} for index in range(table.num_rows)]


def check_rows(path: Path, count: int | None) -> None:
    """Check the footer of a Parquet file against the recorded number of rows, before the file is hashed.

    Raises:
        OpdctlError: it is corrupt, has another number of rows, or would take too much memory.
    """
    try:
        check_parquet_size(path, count)
    except (OSError, ValueError) as error:
        raise corrupt_artifact(path, str(error)) from error


def _stored_columns(stored: pa.Schema, record: type) -> list[Column]:
    """Return the record's columns that a file has. Raises ValueError for a missing column or one of another type."""
    columns = {each.name: each for each in columns_of(record)}
    missing = [each.name for each in columns.values() if each.default is MISSING and each.name not in stored.names]
    if missing or len({*stored.names}) != len(stored.names):
        raise ValueError(f"has columns {stored.names}, expected {[*columns]}")
    _check_known(stored.names, columns)
    for field in stored:
        if field.type != ARROW_TYPES[columns[field.name].kind]:
            raise ValueError(
                f"column {field.name} has type {field.type}, expected {ARROW_TYPES[columns[field.name].kind]}"
            )
    return [columns[name] for name in stored.names]


class _UnknownColumnsError(Exception):
    """A file has columns that this opdctl does not know."""


def _check_known(names: Iterable[str], known: Container[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise _UnknownColumnsError(f"unknown columns {', '.join(unknown)}")


def _unsupported_columns(path: Path, error: _UnknownColumnsError) -> OpdctlError:
    return OpdctlError("unsupported_version", f"{path}: {error}", hint="use the opdctl that wrote it")


def _read_column(column: Column, values: pa.ChunkedArray) -> list[Any]:
    if values.null_count and not column.is_nullable:
        raise ValueError(f"column {column.name} has {values.null_count} nulls")
    if values.type == pa.binary():
        return [np.frombuffer(cell.as_buffer(), np.uint8) if cell.is_valid else None for cell in values]
    if not pa.types.is_list(values.type):
        return values.to_pylist()
    if any(chunk.flatten().null_count for chunk in values.chunks):
        raise ValueError(f"column {column.name} has nulls in its lists")
    # Ids and log-probs stay arrays; a column that was not requested is null.
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in values]


def _reshape_top_k(flat: list[np.ndarray | None], lengths: list[int]) -> list[np.ndarray | None]:
    """Reshape the flat values of each response to [T, K], with one K for all responses of a file."""
    width = max((len(cell) // n for cell, n in zip(flat, lengths, strict=True) if cell is not None and n), default=0)
    return [None if cell is None else cell.reshape(n, width) for cell, n in zip(flat, lengths, strict=True)]


# ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_scores(
    path: Path, ids: Sequence[str], scores: Sequence[TokenScores], logprob_metadata: Mapping[str, str]
) -> None:
    """Write the scores of one rollout part as safetensors: `offsets` [B + 1], and each column [tokens, …]."""
    tensors = {OFFSETS: cumulative_offsets([len(row.logprobs) for row in scores])}
    for column in columns_of(TokenScores):
        values = [value for row in scores if (value := getattr(row, column.name)) is not None]
        if values:
            tensors[column.name] = np.concatenate([value() if callable(value) else value for value in values])
    tensors.setdefault("logprobs", np.zeros(0, np.float32))
    # One entry: safetensors writes several in an order that changes from call to call, and so would the digest.
    save_file(tensors, path, metadata={"opdctl": json.dumps({**logprob_metadata, "sample_ids": list(ids)})})


def read_scores(path: Path, rollout_sha256: str) -> dict[str, TokenScores]:
    """Return the scores of one part by sample id. Hidden states stay on disk until they are read.

    Raises:
        OpdctlError: the file is corrupt, or scores another rollout part than the one of this digest.
    """
    try:
        parsing.check_regular(path)
        with safe_open(path, "np") as file:
            metadata = manifests.check_form(parsing.parse_json((file.metadata() or {})["opdctl"]), ScoresRecord)
            lengths = _check_tensors(file)
            names, offsets = set(file.keys()), file.get_tensor(OFFSETS)
            columns = {name: file.get_tensor(name) for name in names - {OFFSETS, HIDDEN_STATES}}
    except _UnknownColumnsError as error:
        raise _unsupported_columns(path, error) from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise corrupt_artifact(path, str(error)) from error
    if metadata["rollout"] != rollout_sha256:
        raise OpdctlError(
            "checksum_mismatch",
            f"{path}: scores a different rollout part",
            hint=f"remove {shlex.quote(str(path))} and run `opdctl score-teacher` again",
        )
    ids = metadata["sample_ids"]
    fits = len(offsets) == len(ids) + 1 and offsets[0] == 0 and "logprobs" in columns and lengths == {offsets[-1]}
    if not fits or (np.diff(offsets) < 0).any() or len(set(ids)) != len(ids):
        raise corrupt_artifact(path, "offsets, ids and log-probs do not fit together")
    read_hidden_states = partial(_read_span, path, HIDDEN_STATES) if HIDDEN_STATES in names else None
    return {
        sample: _slice_scores(columns, read_hidden_states, start, stop)
        for sample, start, stop in zip(ids, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    }


def _slice_scores(
    columns: Mapping[str, np.ndarray], read: Callable[[int, int], np.ndarray] | None, start: int, stop: int
) -> TokenScores:
    sliced = {name: column[start:stop] for name, column in columns.items()}
    return TokenScores(**sliced, hidden_states=partial(read, start, stop) if read else None)


def _check_tensors(file: safe_open) -> set[int]:
    """Return the numbers of tokens of the columns. Raises ValueError for a tensor of another type or rank."""
    _check_known(file.keys(), tensor_specs())
    lengths = set()
    for name in file.keys():  # noqa: SIM118 - not a dictionary
        tensor = file.get_slice(name)
        shape, spec = tensor.get_shape(), (tensor.get_dtype(), len(tensor.get_shape()))
        if tensor_specs().get(name) != spec:
            raise ValueError(f"unexpected tensor `{name}` of type {spec[0]} and shape {shape}")
        lengths |= {shape[0]} if name != OFFSETS else set()
    return lengths


def _read_span(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    with safe_open(path, "np") as file:
        return file.get_slice(name)[start:stop]
