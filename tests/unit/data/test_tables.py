"""Reading the user's data files, valid and invalid."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdctl.data.tables import read_table
from opdctl.errors import OpdctlError
from opdctl.recipe.data_names import data_file_stem, is_data_file


def rejection(path: Path, kind: str = "invalid_data") -> OpdctlError:
    """Return the error of reading, which must name the file."""
    with pytest.raises(OpdctlError) as caught:
        list(read_table(path))
    assert caught.value.kind == kind
    assert str(path) in caught.value.message
    return caught.value


def rows(path: Path) -> list[dict[str, Any]]:
    return list(read_table(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".CSV", ".json.gz"])
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


# ── Forms ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [{"prompt": "a, b;\tc", "answer": "1"}, {"prompt": "zwölf", "answer": "2"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def separated(separator: str) -> bytes:
    cells = [[*ROWS[0]], *([*row.values()] for row in ROWS)]
    return "".join(f'"{prompt}"{separator}{answer}\n' for prompt, answer in cells).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", JSON_LINES),
        ("P.JSONL", JSON_LINES),
        ("p.json", JSON_LINES),
        ("p.json", json.dumps(ROWS).encode()),
        ("p.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()),
        ("p.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("p.jsonl.gz", gzip.compress(JSON_LINES, mtime=0)),
        ("p.JSONL.GZ", gzip.compress(JSON_LINES, mtime=0)),
        ("p.jsonl.zst", pa.compress(JSON_LINES, "zstd", asbytes=True)),
        ("p.json.zst", pa.compress(json.dumps(ROWS, indent=2).encode(), "zstd", asbytes=True)),
        ("p.csv", separated(",")),
        ("p.csv", separated(";")),
        ("p.csv", separated("\t")),
        ("p.tsv", separated("\t")),
        ("p.csv.gz", gzip.compress(separated(";"), mtime=0)),
    ],
)
def test_forms_of_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert is_data_file(name)
    assert data_file_stem(str(path)).lower() == "p"
    assert rows(path) == ROWS


@pytest.mark.parametrize("name", ["p.txt", "p.gz", "p.parquet.gz", "json", "org/name"])
def test_other_names_are_no_data_files(name: str) -> None:
    assert not is_data_file(name)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_cut_compression_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p.jsonl.{suffix}"
    content = JSON_LINES * 1000
    packed = gzip.compress(content) if suffix == "gz" else pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(packed[:-20])
    rejection(path)


@pytest.mark.parametrize("content", [b"not compressed", gzip.compress(JSON_LINES, mtime=0)[:8] + b"\xff" * 40])
def test_corrupt_compression_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(content)
    rejection(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_repeated_column_is_rejected(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    else:
        path.write_text("prompt,prompt\na,b\n" if "csv" in name else '{"prompt": "a", "prompt": "b"}\n')
    assert "prompt" in rejection(path).message


def test_object_over_several_lines_is_rejected_with_the_right_form(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert "one list of objects" in str(rejection(path).hint)


def test_short_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    short, nested = pa.array([0.1, None, 3.0], pa.float32()), pa.array([0.7, 2.5, None], pa.float32())
    lists = pa.ListArray.from_arrays([0, 1, 3, 3], nested)
    third, letters = pa.array([1 / 3] * 3), pa.array(["a", "b", "c"])
    tree = pa.StructArray.from_arrays([short, lists, letters, third], names=["x", "list", "text", "third"])
    half = pa.array(np.array([0.1, 0.2, 0.3], np.float16))
    pq.write_table(pa.table({"short": short, "half": half, "tree": tree, "double": [0.1, 0.2, 0.3]}), path)
    assert rows(path) == [
        {"short": 0.1, "half": 0.1, "tree": {"x": 0.1, "list": [0.7], "text": "a", "third": 1 / 3}, "double": 0.1},
        {
            "short": None,
            "half": 0.2,
            "tree": {"x": None, "list": [2.5, None], "text": "b", "third": 1 / 3},
            "double": 0.2,
        },
        {"short": 3.0, "half": 0.3, "tree": {"x": 3.0, "list": [], "text": "c", "third": 1 / 3}, "double": 0.3},
    ]


def test_lists_of_numbers_as_arrays(tmp_path: Path) -> None:
    """The arrays have the values of the lists; other columns are the same."""
    table = pa.table({
        "ids": pa.array([[1, 2], [], None, [3]], pa.list_(pa.int32())),
        "logprobs": pa.array([[-0.1, None], [], None, [-2.5]], pa.large_list(pa.float32())),
        "mask": pa.array([[True], [False, True], None, []], pa.list_(pa.bool_())),
        "texts": pa.array([["a"], [], None, ["b"]], pa.list_(pa.string())),
        "name": ["a", "b", None, "d"],
    })  # fmt: skip
    pq.write_table(table.slice(0, 4), tmp_path / "a.parquet", row_group_size=3)
    lists, arrays = (list(read_table(tmp_path / "a.parquet", has_arrays=each)) for each in (False, True))
    for one, other in zip(lists, arrays, strict=True):
        for name in ("ids", "logprobs", "mask"):
            if one[name] is None:
                assert other[name] is None
                continue
            assert isinstance(other[name], np.ndarray)
            numbers = [np.nan if value is None else value for value in one[name]]
            np.testing.assert_array_equal(other[name], np.array(numbers, other[name].dtype))
        assert [one["texts"], one["name"]] == [other["texts"], other["name"]]
