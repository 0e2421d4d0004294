"""Files written tensor by tensor are those of the safetensors library."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from opdctl.artifacts.tensor_files import DTYPE_ORDER, TensorEntry, TensorFileWriter, position_in_file

OF_TORCH = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def bits(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write(path: Path, entries: list[TensorEntry], pieces: list[bytes] | list[memoryview]) -> int:
    with TensorFileWriter(path, entries, {"format": "pt"}) as file:
        for piece in pieces:
            file.write(piece)
        return file.finish()


def test_file_has_the_bytes_of_the_library(tmp_path):
    shapes = {"b": (2, 3), 'a"\n\u00e9\x1f': (), "c": (0, 4), "a.10.w": (5,), "a.9.w": (1,)}
    tensors = {
        f"{name}{index}": torch.arange(math.prod(shape) * dtype.itemsize).to(torch.uint8).view(dtype).reshape(shape)
        for index, dtype in enumerate(OF_TORCH.values())
        for name, shape in shapes.items()
    }
    names = {dtype: name for name, dtype in OF_TORCH.items()}
    entries = [TensorEntry(name, names[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    entries.sort(key=position_in_file)
    chunks = [bits(tensors[entry.name]) for entry in entries]
    pieces = [chunk[i : i + 3] for chunk in chunks for i in range(0, len(chunk), 3)]
    size = write(tmp_path / "file", entries, pieces)
    written = (tmp_path / "file").read_bytes()
    assert written == save(tensors, {"format": "pt"})
    assert size == len(written)
    assert set(DTYPE_ORDER) - set(OF_TORCH) == {"F6_E3M2", "F6_E2M3", "F4"}  # which torch has not, or only packed
    assert load_file(tmp_path / "file").keys() == tensors.keys()


@pytest.mark.parametrize("chunks", [[b"1234567"], [b"1234", b"56789"], []])
def test_other_bytes_than_the_header_describes_are_an_error(chunks, tmp_path):
    with pytest.raises(ValueError, match="file"):
        write(tmp_path / "file", [TensorEntry("a", "F32", (2,), 8)], chunks)
