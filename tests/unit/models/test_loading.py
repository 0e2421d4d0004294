"""Loading models and output heads: supported architectures, and models that are rejected."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import ARCHITECTURES, SMALL, TOY, UNTIED, VOCAB_SIZE, edit_tensors, make, save
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PhiForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_head, load_model
from opdctl.models.logprobs import output_head


def rejection(folder, dtype="float32", load=load_model):
    """Return the error of loading, which must name the directory."""
    with pytest.raises(OpdctlError) as error:
        load(ModelDir(folder, dtype), device="cpu")
    assert str(folder) in error.value.message
    return error.value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_heads_load_in_both_dtypes(architecture, dtype, tmp_path):
    loaded = load_model(ModelDir(save(make(architecture), tmp_path), "float32"), device="cpu", dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert output_head(loaded, VOCAB_SIZE).weight_VD.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "kind"), [("llama", LlamaForCausalLM), ("phi", PhiForCausalLM)])
def test_model_that_transforms_its_logits_further_is_rejected(architecture, kind, dtype, tmp_path, monkeypatch):
    folder = save(make(architecture), tmp_path)
    assert load_model(ModelDir(folder, dtype), device="cpu").lm_head.weight.abs().max() > 0
    forward = kind.forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(kind, "forward", doubled)
    error = rejection(folder, dtype)
    assert error.kind == "unsupported_model"
    assert "nats" in error.message


def test_bias_of_the_head_is_loaded(tmp_path):
    model = make("phi")
    loaded = load_model(ModelDir(save(model, tmp_path), "float32"), device="cpu")
    torch.testing.assert_close(loaded.lm_head.bias, model.lm_head.bias, rtol=0, atol=0)
    assert loaded.lm_head.bias.abs().max() > 0


def test_missing_tensor_is_rejected(tmp_path):
    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    error = rejection(folder)
    assert error.kind == "invalid_model"
    assert "model.layers.1.mlp.up_proj.weight" in error.message


def test_pickled_weights_are_rejected(tmp_path):
    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = rejection(folder)
    assert error.kind == "unsupported_model"
    assert "pickled" in error.message


def test_nan_weights_are_rejected(tmp_path):
    folder = Path(shutil.copytree(TOY, tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    error = rejection(folder)
    assert error.kind == "unsupported_model"
    assert "nan nats" in error.message


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_head_equals_the_head_of_the_loaded_model(architecture, shards, tmp_path):
    save(make(architecture), tmp_path, max_shard_size="50GB" if shards == 1 else "20KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shards == 1)
    for dtype in ("float32", "bfloat16"):
        directory = ModelDir(tmp_path, dtype)
        head = load_head(directory, device="cpu")
        expected = output_head(load_model(directory, device="cpu"), VOCAB_SIZE)
        assert (head.vocab_size, head.scale, head.softcap) == (VOCAB_SIZE, expected.scale, expected.softcap)
        assert not head.weight_VD.requires_grad
        torch.testing.assert_close(head.weight_VD, expected.weight_VD, rtol=0, atol=0)
        assert (head.bias_V is None) == (expected.bias_V is None) == (architecture != "phi")
        if head.bias_V is not None:
            torch.testing.assert_close(head.bias_V, expected.bias_V, rtol=0, atol=0)


RENAMED = {
    "gpt-neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**UNTIED)), "embed_out.weight"),
    "qwen2-vl": (lambda: Qwen2VLForConditionalGeneration(qwen2_vl_config(tied=False)), "lm_head.weight"),
    "qwen2-vl-tied": (lambda: Qwen2VLForConditionalGeneration(qwen2_vl_config(tied=True)), "model.embed_tokens.weight"),
}
"""Models whose head, or embedding, has another name in the files than in memory."""


def qwen2_vl_config(*, tied: bool) -> Qwen2VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = SMALL | {"rope_parameters": rope, "tie_word_embeddings": tied}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


@pytest.mark.parametrize(("build", "stored_name"), RENAMED.values(), ids=list(RENAMED))
def test_load_head_finds_a_tensor_of_another_name(build, stored_name, tmp_path):
    torch.manual_seed(0)
    directory = ModelDir(save(build(), tmp_path), "float32")
    assert stored_name in directory.weights.tensors
    head, expected = load_head(directory, device="cpu"), output_head(load_model(directory, device="cpu"), VOCAB_SIZE)
    torch.testing.assert_close(head.weight_VD, expected.weight_VD, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("architecture", "removed", "names"),
    [
        ("llama", "lm_head.weight", ["lm_head.weight"]),
        ("phi", "lm_head.bias", ["lm_head.bias"]),
        ("qwen3-tied", "model.embed_tokens.weight", ["lm_head.weight", "model.embed_tokens.weight"]),
    ],
)
def test_directory_without_the_head_is_rejected(architecture, removed, names, tmp_path):
    folder = save(make(architecture), tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop(removed))
    error = rejection(folder, load=load_head)
    assert error.kind == "invalid_model"
    assert all(name in error.message for name in names)
