"""The numbers in the footer of a Parquet file, read before any library opens it. Imports no torch.

pyarrow ends the process on some corrupt footers, and allocates what a footer claims. A file of constants inflates
ten-thousandfold. A footer is a struct in Thrift's compact protocol: fields of (type, id, value), and lists.
"""

import struct
from io import BufferedReader
from pathlib import Path
from typing import Any

from opdctl.artifacts import parsing

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 64 * 2**20
MAX_FOOTER_DEPTH = 16
MAX_INFLATION = 500
"""How many bytes of memory one byte of a file may become; MIN_INFLATED_BYTES are always allowed."""
MIN_INFLATED_BYTES = 64 * 2**20
VALUE_BYTES, ROW_BYTES = 8, 200
"""Of memory, for each value of a column and for each row as a Python object."""
# Field ids of parquet.thrift: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData.
NUM_ROWS, ROW_GROUPS = 3, 4
COLUMNS = 1
CHUNK_METADATA = 3
NUM_VALUES, UNCOMPRESSED_BYTES = 5, 6
# Type codes of the compact protocol.
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)


def check_parquet_size(path: Path, rows: int | None = None, *, follow_links: bool = False) -> None:
    """Check the numbers of rows and values in the footer of a Parquet file against its size and the record.

    rows: as recorded for the file, if they are.

    Raises:
        ValueError: it is no Parquet file, has another number of rows, or would take too much memory for its size.
    """
    with parsing.open_regular(path, follow_links=follow_links) as (file, size):
        footer = _Reader(_read_footer(file, size)).struct()
    num_rows = _count(footer, NUM_ROWS)
    if rows is not None and num_rows != rows:
        raise ValueError(f"has {num_rows} rows, expected {rows}")
    inflated = ROW_BYTES * num_rows
    for group in _structs(footer.get(ROW_GROUPS)):
        for chunk in _structs(group.get(COLUMNS)):
            (metadata,) = _structs([chunk.get(CHUNK_METADATA)])
            inflated += max(VALUE_BYTES * _count(metadata, NUM_VALUES), _count(metadata, UNCOMPRESSED_BYTES))
    if inflated > (limit := MIN_INFLATED_BYTES + MAX_INFLATION * size):
        raise ValueError(f"its {size} bytes would take {inflated} bytes of memory, at most {limit} are read")


def _read_footer(file: BufferedReader, size: int) -> bytes:
    if size < 12 or file.read(4) != MAGIC:
        raise ValueError("is not a Parquet file")
    file.seek(size - 8)
    length, magic = struct.unpack("<I4s", file.read(8))
    if magic != MAGIC or length > min(size - 12, MAX_FOOTER_BYTES):
        raise ValueError(f"a footer of {length} bytes in a file of {size} bytes")
    file.seek(size - 8 - length)
    return file.read(length)


def _structs(value: Any) -> list[dict[int, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("the footer lacks the numbers of a column")
    return value


def _count(values: dict[int, Any], field: int) -> int:
    value = values.get(field)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"the footer has the invalid number {value!r}")
    return value


class _Reader:
    """A reader of Thrift's compact protocol. Every fault is a ValueError."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a struct by id."""
        if depth > MAX_FOOTER_DEPTH:
            raise ValueError("the footer is nested too deeply")
        values, field = {}, 0
        while (header := self._byte()) != STOP:
            field = field + (header >> 4) if header >> 4 else self._zigzag()
            values[field] = self._value(header & 15, depth)
        return values

    def _value(self, kind: int, depth: int) -> Any:
        match kind:
            case 1 | 2:  # of a field, where the type is the value
                return kind == TRUE
            case 3 | 7:
                return self._bytes(1 if kind == BYTE else 8)
            case 8:
                return self._bytes(self._varint())
            case 9 | 10:
                return self._list(depth)
            case 12:
                return self.struct(depth + 1)
        if kind not in INTEGERS:
            raise ValueError(f"the footer has a value of unknown type {kind}")
        return self._zigzag()

    def _list(self, depth: int) -> list[Any]:
        header = self._byte()
        count, kind = header >> 4, header & 15
        count = self._varint() if count == 15 else count
        if count > len(self._data) - self._at:
            raise ValueError("the footer is cut")
        if kind in (TRUE, FALSE):  # of a list, where each takes a byte
            return list(self._bytes(count))
        return [self._value(kind, depth) for _ in range(count)]

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise ValueError("the footer is cut")
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError("the footer is cut")
        return self._data[start : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("the footer has a number that is too long")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
