"""TODO."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opdctl.errors import ExitCode, OpdctlError, did_you_mean

Row = dict[str, Any]


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a `.jsonl`, `.parquet` or `.csv` file, whose cells are all text.

    Raises OpdctlError (code 3) with file and line.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise OpdctlError(f"{path}: no such file{did_you_mean(path.name, beside) if beside else ''}")
    yield from {".jsonl": _read_jsonl, ".csv": _read_csv}.get(path.suffix, _read_parquet)(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
                raise OpdctlError(f"{path}:{number}: {error}", code=ExitCode.BAD_DATA) from error
            if not isinstance(row, dict):
                raise OpdctlError(f"{path}:{number}: must be a JSON object, got {line[:40]!r}", code=ExitCode.BAD_DATA)
            yield row


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    why = f"has not {len(rows.fieldnames or ())} cells, as the first line has"
                    raise OpdctlError(f"{path}:{rows.line_num}: {why}", code=ExitCode.BAD_DATA)
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise OpdctlError(f"{path}:{rows.line_num + 1}: {error}", code=ExitCode.BAD_DATA) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OpdctlError(f"{path}: cannot be read as Parquet: {error}", code=ExitCode.BAD_DATA) from error


def load_from_hub(
    source: str,
    split: str,
    revision: str | None,
    key: str,
    *,
    subset: str | None = None,
    hint: str = "give a .jsonl, .parquet or .csv file, or fetch the data set where there is a network",
) -> Iterator[Row]:
    """Yield the rows of a hub data set; `key` names the setting in errors. Raises OpdctlError (code 5)."""
    import datasets

    try:
        yield from datasets.load_dataset(source, subset, split=split, revision=revision)
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OpdctlError(
            f"{key}: `{source}` is no local file, and the hub did not give it: {reason}",
            hint=hint,
            code=ExitCode.UNAVAILABLE,
        ) from error
