"""TODO."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opdctl.artifacts import manifests
from opdctl.artifacts.files import atomic_write, corrupt_artifact, sha256_file
from opdctl.artifacts.manifests import ScoresRecord
from opdctl.artifacts.records import (
    GRADED,
    PROMPTS,
    RESPONSES,
    GradedResponse,
    Prompt,
    Response,
    TokenScores,
    cumulative_offsets,
)

HIDDEN = "hidden_states"
SCORE_COLUMNS = tuple(column.name for column in fields(TokenScores))
SCORE_TENSOR_SPECS = {"offsets": ("I64", 1), "top_ids": ("I32", 2), "logprobs": ("F32", 1), "entropies": ("F32", 1)}


SCORE_TENSOR_SPECS |= dict.fromkeys(("top_logprobs", "student_top_logprobs", HIDDEN), ("F32", 2))


"""Type and number of dimensions of each tensor of a score part."""
Row = TypeVar("Row", Prompt, Response, GradedResponse)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_SCHEMAS: dict[type, pa.Schema] = {Prompt: PROMPTS, Response: RESPONSES, GradedResponse: GRADED}
NULLABLE_COLUMNS = ("answer", "teacher_prompt_ids", "entropies", "top_ids", "top_logprobs", "extracted", "vote")


def write_rows(path: Path, rows: Sequence[Row], kind: type[Row]) -> None:
    """Write rows as Parquet with page checksums: without them a flipped byte is mostly read in silence."""
    columns = {name: [_flat(getattr(row, name)) for row in rows] for name in _SCHEMAS[kind].names}
    pq.write_table(pa.table(columns, schema=_SCHEMAS[kind]), path, compression="zstd", write_page_checksum=True)


def _flat(value: Any) -> Any:
    """Return what a cell holds: arrays of several dimensions row by row."""
    return value.reshape(-1) if isinstance(value, np.ndarray) else value


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> list[Path]:
    """Write columns of numbers or text as `path`.parquet and `path`.csv and return both paths; NaN is null."""
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    paths = [path.with_name(f"{path.name}.parquet"), path.with_name(f"{path.name}.csv")]
    for final, write in zip(paths, (pq.write_table, pa.csv.write_csv), strict=True):
        with atomic_write(final) as temporary:
            write(table, temporary)
    return paths


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> str:
    """Write the run's prompts, whole or not at all, and return the file's SHA-256."""
    with atomic_write(path) as temporary:
        write_rows(temporary, prompts, Prompt)
    return sha256_file(path)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows of one Parquet file. Raises OpdctlError (code 3) when it is damaged or of another schema."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(_SCHEMAS[kind]):
                raise ValueError(f"has columns {file.schema_arrow.names}, wanted {_SCHEMAS[kind].names}")
            table = file.read()
        table.validate(full=True)
        columns = {name: _column(name, table[name]) for name in table.schema.names}
        if kind is Response:
            lengths = [len(ids) for ids in columns["response_ids"]]
            columns |= {name: _reshape_top_k(columns[name], lengths) for name in ("top_ids", "top_logprobs")}
    except (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise corrupt_artifact(path, str(error)) from error
    return [kind(**{name: values[i] for name, values in columns.items()}) for i in range(table.num_rows)]


def _column(name: str, column: pa.ChunkedArray) -> list[Any]:
    if column.null_count and name not in NULLABLE_COLUMNS:
        raise ValueError(f"column {name} has {column.null_count} nulls")
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    if any(chunk.flatten().null_count for chunk in column.chunks):
        raise ValueError(f"column {name} has nulls within")
    # Ids and log-probs stay arrays; a column that was not asked for is null.
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in column]


def _reshape_top_k(flat: list[np.ndarray | None], lengths: list[int]) -> list[np.ndarray | None]:
    """Bring the most probable tokens of each response back to one row a token, all of the same width."""
    width = max((len(cell) // n for cell, n in zip(flat, lengths, strict=True) if cell is not None and n), default=0)
    return [None if cell is None else cell.reshape(n, width) for cell, n in zip(flat, lengths, strict=True)]


def write_scores(
    path: Path, ids: Sequence[str], scores: Sequence[TokenScores], logprob_metadata: Mapping[str, str]
) -> None:
    """Write what a model says of one rollout part as safetensors: `offsets` [R + 1], and each column [tokens, …]."""
    tensors = {"offsets": cumulative_offsets([len(row.logprobs) for row in scores])}
    for name in SCORE_COLUMNS:
        values = [value for row in scores if (value := getattr(row, name)) is not None]
        if values:
            tensors[name] = np.concatenate([value() if callable(value) else value for value in values])
    tensors.setdefault("logprobs", np.zeros(0, np.float32))
    # One entry: safetensors writes several in an order that changes from call to call, and so would the digest.
    save_file(tensors, path, metadata={"opdctl": json.dumps({**logprob_metadata, "sample_ids": list(ids)})})


def read_scores(path: Path, rollout_sha256: str) -> dict[str, TokenScores]:
    """Return what a model says of one part, by sample id; hidden states are left on disk until they are asked for.

    Raises OpdctlError (code 3) when it is damaged, or when it scores another rollout part than the one of this digest.
    """
    try:
        with safe_open(path, "np") as file:
            logprob_metadata = manifests.check(json.loads((file.metadata() or {})["opdctl"]), ScoresRecord)
            ids, scored = logprob_metadata["sample_ids"], logprob_metadata["rollout"]
            lengths = _check_shapes(file)
            names, offsets = set(file.keys()), file.get_tensor("offsets")
            columns = {name: file.get_tensor(name) for name in names - {"offsets", HIDDEN}}
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise corrupt_artifact(path, str(error)) from error
    if scored != rollout_sha256:
        raise corrupt_artifact(path, "it scores other responses than those beside it")
    fits = len(offsets) == len(ids) + 1 and offsets[0] == 0 and "logprobs" in columns and lengths == {offsets[-1]}
    if not fits or (np.diff(offsets) < 0).any() or len(set(ids)) != len(ids):
        raise corrupt_artifact(path, "its offsets, ids and log-probs do not fit together")
    spans = zip(ids, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return {
        sample: TokenScores(
            **{name: column[a:b] for name, column in columns.items()},
            hidden_states=partial(_read_span, path, HIDDEN, a, b) if HIDDEN in names else None,
        )
        for sample, a, b in spans
    }


def _check_shapes(file: safe_open) -> set[int]:
    """Return the numbers of tokens that the columns have. Raises ValueError for a column of another kind."""
    lengths = set()
    for name in file.keys():  # noqa: SIM118 - it is no dictionary
        column = file.get_slice(name)
        shape, kind = column.get_shape(), (column.get_dtype(), len(column.get_shape()))
        if name not in SCORE_TENSOR_SPECS or kind != SCORE_TENSOR_SPECS[name]:
            raise ValueError(f"a tensor `{name}` of type {kind[0]} and shape {shape}")
        lengths |= {shape[0]} if name != "offsets" else set()
    return lengths


def _read_span(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    with safe_open(path, "np") as file:
        return file.get_slice(name)[start:stop]
