"""Safetensors files that are written tensor by tensor, so that no more than one tensor must be in memory.

The format: an 8-byte little-endian length, a JSON header of that length, and the tensors without gaps. The order of the
tensors and the text of the header are those of the safetensors library, so the files are the same, byte for byte.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

CreateFile = Callable[[Path], BinaryIO]
"""Path → a new file there, open for writing."""

DTYPE_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8"),
    *("F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)
"""Names of dtypes, in the order in which a file stores its tensors: larger ones first, which keeps them aligned."""
ALIGNMENT_BYTES = 8  # of the first tensor


def create_on_disk(path: Path) -> BinaryIO:
    return path.open("wb")


class TensorEntry(NamedTuple):
    """A tensor of a file. dtype: one of DTYPE_ORDER."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def position_in_file(entry: TensorEntry) -> tuple[int, str]:
    """Return what the tensors of a file are sorted by."""
    return DTYPE_ORDER.index(entry.dtype), entry.name


class TensorFileWriter:
    """Writes a safetensors file piece by piece. A context manager, which closes the file."""

    def __init__(
        self,
        path: Path,
        entries: Iterable[TensorEntry],
        metadata: Mapping[str, str],
        create_file: CreateFile = create_on_disk,
    ):
        """entries: sorted by `position_in_file`. create_file: opens the path."""
        header, num_bytes = _header(entries, metadata)
        self._path, self._expected = path, len(header) + num_bytes
        self._file, self._size = create_file(path), 0
        self.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, piece: bytes | memoryview) -> None:
        """Append bytes of the tensors, which are in the order of the entries. A piece has any size."""
        self._size += self._file.write(piece)

    def finish(self) -> int:
        """Pass the file to the system, which has yet to flush it to disk, and return its size in bytes.

        Raises:
            ValueError: the pieces have another length than the entries.
        """
        if self._size != self._expected:
            raise ValueError(f"{self._path}: {self._size} bytes; its header describes {self._expected}")
        self._file.flush()
        return self._size


def _header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the bytes before the tensors, and the number of bytes of all tensors."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for entry in entries:
        end = start + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text, start
