"""The numbers in the footer of a Parquet file, against a library's reading and against damage."""

import random
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdctl.artifacts.parquet_footer import check_parquet_size


def write(path, rows, groups=1, **columns):
    columns = columns or {"number": list(range(rows)), "text": ["some words"] * rows, "ids": [[1, 2, 3]] * rows}
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=max(1, -(-rows // groups)))
    return path


@pytest.mark.parametrize(("rows", "groups"), [(0, 1), (1, 1), (1000, 7)])
def test_rows_are_those_that_pyarrow_reads(tmp_path, rows, groups):
    path = write(tmp_path / "t.parquet", rows, groups)
    check_parquet_size(path, pq.read_metadata(path).num_rows)
    with pytest.raises(ValueError, match=f"has {rows} rows, expected {rows + 1}"):
        check_parquet_size(path, rows + 1)


def test_real_token_ids_are_read(tmp_path):
    chance = random.Random(0)
    ids = [[chance.choice((5, 6)) for _ in range(400)] for _ in range(2000)]
    check_parquet_size(write(tmp_path / "t.parquet", 2000, ids=ids, teacher=["teacher"] * 2000), 2000)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": pa.array(["x"]).take(pa.array([0] * 2_000_000))},
        {"ids": pa.array([[7] * 12_000_000], pa.list_(pa.int32()))},
    ],
    ids=["rows", "one long list"],
)
def test_file_that_inflates_is_refused(tmp_path, columns):
    path = write(tmp_path / "t.parquet", 2_000_000, **columns)
    assert path.stat().st_size < 400_000
    with pytest.raises(ValueError, match="bytes of memory"):
        check_parquet_size(path)


def test_corrupt_footer_is_a_value_error(tmp_path):
    """Every fault of the footer: pyarrow would end the process on some of them."""
    path, chance = write(tmp_path / "t.parquet", 50), random.Random(1)
    whole = path.read_bytes()
    length = struct.unpack("<I", whole[-8:-4])[0]
    refused = 0
    for _ in range(400):
        at, byte = chance.randrange(len(whole) - 8 - length, len(whole)), chance.randrange(256)
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            check_parquet_size(path, 50)
        except ValueError:
            refused += 1
    assert refused > 20
    for data in (b"", b"PAR1", whole[:-1], whole[4:], b"PAR1" + b"\x1c" * 200 + struct.pack("<I", 200) + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"footer|Parquet"):
            check_parquet_size(path)
