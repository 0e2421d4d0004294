"""Reading the user's data files, valid and invalid."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdctl.data.tables import read_table
from opdctl.errors import OpdctlError


def rejection(path: Path, kind: str = "invalid_data") -> OpdctlError:
    """Return the error of reading, which must name the file."""
    with pytest.raises(OpdctlError) as caught:
        list(read_table(path))
    assert caught.value.kind == kind
    assert str(path) in caught.value.message
    return caught.value


def rows(path: Path) -> list[dict[str, Any]]:
    return list(read_table(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_missing_file_suggests_the_nearest(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"prompts{suffix}").touch()
    assert (
        f"did you mean `{tmp_path}/prompts{suffix}`?" in rejection(tmp_path / f"promts{suffix}", "missing_file").message
    )


def test_missing_directory_is_a_missing_file(tmp_path: Path) -> None:
    rejection(tmp_path / "none" / "prompts.jsonl", "missing_file")


@pytest.mark.parametrize(
    "bad", [b'{"prompt": "\xff"}', b"{'prompt': 1}", b'"a"', b"[1]", b'{"prompt": "a"', b"[" * 10**5]
)
def test_invalid_line_is_rejected_with_its_number(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + bad + b"\n")
    assert f"{path}:3:" in rejection(path).message


def test_empty_file_is_not_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    path.touch()
    rejection(path)


def test_truncated_parquet_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-9])
    rejection(path)


def test_parquet_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    offsets = pa.py_buffer(np.array([0, 3], np.int32).tobytes())
    pq.write_table(pa.table({"prompt": pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"a\xffb"))}), path)
    rejection(path)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa4"}\n')
    assert rows(path) == [{"prompt": "ä"}]


def test_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert rows(path) == [{"prompt": "a"}, {"prompt": "b"}]


def test_csv_cells_are_text(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,answer\n"a, b",1\nc,2\n')
    assert rows(path) == [{"prompt": "a, b", "answer": "1"}, {"prompt": "c", "answer": "2"}]


@pytest.mark.parametrize("line", ["c", "c,2,3"])
def test_csv_row_with_another_number_of_cells_is_rejected(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"prompt,answer\na,1\n{line}\n")
    assert f"{path}:3:" in rejection(path).message
