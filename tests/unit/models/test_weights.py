"""Stored weights: which files are the model, damaged files, and weights that are not finite."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from opdctl.artifacts.files import sha256_file
from opdctl.errors import OpdctlError
from opdctl.models.weights import digest_weights, have_equal_content, read_header, read_weights

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 2)}


def rejection(call, *arguments):
    with pytest.raises(OpdctlError) as error:
        call(*arguments)
    assert error.value.kind == "invalid_model"
    return error.value.message


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ── The choice of files ──────────────────────────────────────────────────────────────────────────────────────────────


def test_single_file_wins_over_index_and_other_files(tmp_path):
    for name in ("model", "model-old", "shard"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    write_index(tmp_path, {"a": "shard.safetensors"})
    weights = read_weights(tmp_path)
    assert [file.name for file in weights.files] == ["model.safetensors"]
    assert [file.name for file in weights.unused] == ["model-old.safetensors", "pytorch_model.bin", "shard.safetensors"]
    assert weights.num_parameters == 10


def test_files_of_the_index_and_no_others(tmp_path):
    save_file({"b": TENSORS["b"]}, tmp_path / "2.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "1.safetensors")
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"})
    weights = read_weights(tmp_path)
    assert [file.name for file in weights.files] == ["1.safetensors", "2.safetensors"]
    assert [file.name for file in weights.unused] == ["consolidated.safetensors"]
    assert {name: tensor.file.name for name, tensor in weights.tensors.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }


def test_file_that_the_config_names_wins(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file(TENSORS, tmp_path / "other.safetensors")
    assert [file.name for file in read_weights(tmp_path, "other.safetensors").files] == ["other.safetensors"]


def test_directory_without_weights(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    weights = read_weights(tmp_path)
    assert (weights.files, [file.name for file in weights.unused]) == ((), ["model.gguf"])


@pytest.mark.parametrize(
    "weight_map", [{}, {"a": "lost.safetensors"}, {"a": "../model.safetensors"}, {"a": 1}, [], None]
)
def test_index_without_its_files_is_rejected(weight_map, tmp_path):
    write_index(tmp_path, weight_map)
    assert "model.safetensors.index.json" in rejection(read_weights, tmp_path)


def test_tensor_in_two_files_is_rejected(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file(TENSORS, tmp_path / name)
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert "tensor a" in rejection(read_weights, tmp_path)


# ── Headers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_header_of_each_tensor(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    headers = read_header(tmp_path / "model.safetensors")
    assert {name: (header.dtype, header.shape) for name, header in headers.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "empty": ("F32", (0, 2)),
    }
    content = (tmp_path / "model.safetensors").read_bytes()
    assert content[headers["a"].start : headers["a"].end] == TENSORS["a"].numpy().tobytes()


def test_file_cut_at_any_byte_is_rejected(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert str(path) in rejection(read_header, path)
    path.write_bytes(content + b"0")
    assert str(len(content)) in rejection(read_header, path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": None},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 4]}},
        {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        },
        {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 6]},
            "b": {"dtype": "U8", "shape": [0], "data_offsets": [6, 4]},
        },
    ],
)
def test_invalid_header_is_rejected(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"0000")
    rejection(read_header, tmp_path / "model.safetensors")


# ── Content ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_digest_rejects_weights_that_are_not_finite(dtype, value, tmp_path):
    path = tmp_path / "model.safetensors"
    largest = torch.finfo(getattr(torch, dtype)).max
    tensors = {
        "first": torch.tensor([0.0, 1.0]),
        "second": torch.tensor([largest, -largest, 0], dtype=getattr(torch, dtype)),
    }
    save_file(tensors, path)
    assert digest_weights(read_weights(tmp_path), path) == sha256_file(path)
    tensors["second"][2] = float(value)
    save_file(tensors, path)
    assert "second" in rejection(digest_weights, read_weights(tmp_path), path)


def test_digest_covers_tensors_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("opdctl.models.weights.CHUNK_BYTES", 8)
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(9.0), "ids": torch.full((5,), -1)}  # all bits of an integer may be 1
    save_file(tensors, path)
    assert digest_weights(read_weights(tmp_path), path) == sha256_file(path)
    tensors["a"][8] = torch.inf
    save_file(tensors, path)
    assert "tensor a" in rejection(digest_weights, read_weights(tmp_path), path)


def test_equal_content(tmp_path, monkeypatch):
    monkeypatch.setattr("opdctl.models.weights.CHUNK_BYTES", 8)
    tensors = {"a": torch.arange(9.0), "same": torch.arange(9.0), "other": torch.arange(9.0) * (torch.arange(9) < 8)}
    save_file({**tensors, "half": tensors["a"].half()}, tmp_path / "model.safetensors")
    stored = read_weights(tmp_path).tensors
    assert have_equal_content(stored["a"], stored["same"])
    assert not have_equal_content(stored["a"], stored["other"])
    assert not have_equal_content(stored["a"], stored["half"])
