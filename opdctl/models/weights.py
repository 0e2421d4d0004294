"""The weight files of a model directory: which files are the model, their headers, and the digest of their content.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors without gaps. Only
headers are read, except by `digest_weights`. Imports no torch.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opdctl.artifacts import parsing
from opdctl.errors import OpdctlError
from opdctl.models.json_files import check_model_files, read_json_object

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
CHUNK_BYTES = 2**24
MAX_WEIGHT_FILE_BYTES = 5 * 10**9
"""Of tensors in an exported file. Ranks write, and readers hash, several files at a time."""
DTYPE_BITS = (
    dict.fromkeys(("F64", "I64", "U64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("BF16", "F16", "I16", "U16"), 16)
    | dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 8)
)
EXPONENT_BITS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "BF16": ("<u2", 0xFF << 7),
    "F16": ("<u2", 0x1F << 10),
}
"""For each floating-point dtype its unsigned type and the exponent's bits, which are all 1 in NaN and infinities."""


@dataclass(frozen=True)
class TensorHeader:
    """A stored tensor. dtype: as safetensors names it, such as "BF16". start, end: its bytes in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class StoredWeights:
    """The stored weights of a model.

    files: those that transformers loads. index: the file that names them, if there is one. unused: other weight files
    beside them. tensors: by name, in the order of the files.
    """

    files: tuple[Path, ...]
    index: Path | None
    unused: tuple[Path, ...]
    tensors: Mapping[str, TensorHeader] = field(repr=False)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def read_weights(directory: Path, named_file: str | None = None) -> StoredWeights:
    """Return the weights of a model directory, chosen as transformers does.

    That is the file that the config names (`transformers_weights`), else model.safetensors, else the files of
    model.safetensors.index.json. Without any of them there are no files.

    Raises:
        OpdctlError: a file is missing or cut, or its header is invalid.
    """
    check_model_files(directory)
    candidates = [name for name in (named_file, SINGLE_FILE, INDEX_FILE) if name and "/" not in name]
    first = next((name for name in candidates if (directory / name).is_file()), "")
    index = directory / first if first.endswith(".index.json") else None
    names = _names_in_index(index) if index else [first] * bool(first)
    files = tuple(directory / name for name in names)
    unused = sorted(
        path for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES and path not in files and path.is_file()
    )
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                detail = f"{file}: tensor {name} is also in {tensors[name].file.name}"
                raise OpdctlError("invalid_model", detail, hint="download or export the model again")
            tensors[name] = tensor
    return StoredWeights(files, index, tuple(unused), tensors)


def _names_in_index(index: Path) -> list[str]:
    """Return the names of the files in an index, sorted."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise OpdctlError("invalid_model", f"{index}: no weight_map of file names", hint="download this file again")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if "/" in name or not (index.parent / name).is_file()]
    if missing or not names:
        detail = f"{index}: {len(missing)} of its {len(names)} files are missing: {', '.join(missing[:3])}"
        raise OpdctlError("invalid_model", detail, hint="download the model again")
    return names


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file in the order of their bytes.

    Raises:
        OpdctlError: the header is invalid, or the file has another length than its header describes.
    """
    try:
        with parsing.open_regular(file, follow_links=True) as (opened, size):
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(parsing.MAX_HEADER_BYTES, size):
                raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
            header = parsing.parse_json(opened.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = [
            (
                name,
                TensorHeader(
                    file, str(entry["dtype"]), tuple(map(int, entry["shape"])), *_bytes_in_file(entry, length)
                ),
            )
            for name, entry in entries.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise _corrupt_file(file, f"invalid safetensors header: {error}") from None
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    end = 8 + length
    for name, tensor in tensors:
        if tensor.start != end or tensor.end < end:
            raise _corrupt_file(file, f"tensor {name} does not begin where the one before it ends")
        bits = DTYPE_BITS.get(tensor.dtype)
        if min(tensor.shape, default=0) < 0 or (bits and math.prod(tensor.shape) * bits != 8 * (tensor.end - end)):
            detail = f"tensor {name} of type {tensor.dtype} and shape {list(tensor.shape)} has {tensor.end - end} bytes"
            raise _corrupt_file(file, detail)
        end = tensor.end
    if size != end:
        raise _corrupt_file(file, f"{size} bytes; its header describes {end}")
    return dict(tensors)


def _bytes_in_file(entry: Mapping[str, Any], header_length: int) -> tuple[int, int]:
    start, end = (8 + header_length + int(offset) for offset in entry["data_offsets"])
    return start, end


def _corrupt_file(file: Path, reason: str) -> OpdctlError:
    return OpdctlError("invalid_model", f"{file}: {reason}", hint="download or copy this file again")


def digest_weights(weights: StoredWeights, file: Path) -> str:
    """Return the SHA-256 of a weight file, as hexadecimal digits. The same pass checks that every weight is finite.

    Raises:
        OpdctlError: a tensor contains NaN or an infinity.
    """
    digest = hashlib.sha256()
    tensors = [(name, tensor) for name, tensor in weights.tensors.items() if tensor.file == file]
    with file.open("rb") as opened:
        for name, tensor in tensors:
            digest.update(opened.read(tensor.start - opened.tell()))
            while chunk := opened.read(min(CHUNK_BYTES, tensor.end - opened.tell())):
                digest.update(chunk)
                if tensor.dtype in EXPONENT_BITS and not _is_finite(chunk, *EXPONENT_BITS[tensor.dtype]):
                    raise _corrupt_file(file, f"tensor {name} contains NaN or an infinity")
        digest.update(opened.read())
    return digest.hexdigest()


def _is_finite(chunk: bytes, unsigned_type: str, exponent: int) -> bool:
    bits = np.frombuffer(chunk, unsigned_type) & np.array(exponent, unsigned_type)
    return bool(bits.max(initial=0) != exponent)


def have_equal_content(first: TensorHeader, second: TensorHeader) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        remaining = first.end - first.start
        while remaining:
            size = min(CHUNK_BYTES, remaining)
            if one.read(size) != other.read(size):
                return False
            remaining -= size
    return True
