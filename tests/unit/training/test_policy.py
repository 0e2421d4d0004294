"""The forward pass of training: that of the sampled policy, without dropout and whatever the memory settings."""

import pytest
import torch
from helpers.commands import small_recipe
from helpers.models import SMALL, save
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.self_check import scoring_difference
from opdctl.training import policy

CHECKPOINTING = "train.gradient_checkpointing=true"


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    config = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3, dropout=0.5)
    return ModelDir(save(OPTForCausalLM(config), tmp_path), "float32")


def test_checkpointed_layers_apply_no_dropout(student):
    """OPT applies it in the layers, which transformers checkpoints only in training mode."""
    model = policy.load_policy(student, small_recipe(CHECKPOINTING), "cpu")
    assert sum(module.training for module in model.modules()) == 2  # the two layers
    assert scoring_difference(model) < 1e-5


def test_settings_that_change_the_log_probs_are_rejected(student, monkeypatch):
    enable = policy._enable_gradient_checkpointing

    def with_dropout(model, every_n_layers):
        enable(model, every_n_layers)
        for layer in [module for module in model.modules() if isinstance(module, OPTDecoderLayer)]:
            layer.dropout = 0.5

    monkeypatch.setattr(policy, "_enable_gradient_checkpointing", with_dropout)
    with pytest.raises(OpdctlError) as error:
        policy.load_policy(student, small_recipe(CHECKPOINTING), "cpu")
    assert error.value.kind == "unsupported_setting"
    assert "train.gradient_checkpointing" in error.value.message


@pytest.mark.parametrize(
    ("dtype", "device", "warns"), [("float32", "cuda", True), ("bfloat16", "cuda", False), ("float32", "cpu", False)]
)
def test_attention_without_a_fused_kernel_is_a_warning(dtype, device, warns, tmp_path, capsys):
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    student = ModelDir(save(model, tmp_path), dtype)
    policy._warn_of_slow_attention(student, small_recipe(f"student.dtype={dtype}"), device)
    assert ("no fused kernel" in capsys.readouterr().err) == warns
