"""Students of many kinds, trained by a random change, and their export."""

from collections.abc import Callable
from pathlib import Path

import torch
from helpers.commands import small_recipe
from helpers.models import SMALL
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opdctl.models.directory import ModelDir
from opdctl.training.export import StudentExporter
from opdctl.training.policy import check_trainable, load_policy

IDS_1T = torch.arange(2, 14)[None]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"n_groups": 1, "chunk_size": 8, "head_dim": 16}
KINDS: dict[str, dict] = {
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 16},
    "qwen3_next": {**EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 24},
    "nemotron_h": {
        **MAMBA,
        "hybrid_override_pattern": "M-*-",
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
    },
    "mamba2": {**MAMBA, "num_heads": 4, "state_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8},
    "laguna": {**EXPERTS, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 24},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "is_decoder": True,
    },
    "bert-generation": {"is_decoder": True},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_key_value_heads": 2,
    },
}
"""Settings beside SMALL by the model type."""


def make(kind: str, *, tied: bool = False, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**SMALL, "initializer_range": 0.3, "tie_word_embeddings": tied, **KINDS[kind], **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).float()


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the stored tensors by `edit(tensors)`."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def train_and_export(
    folder: Path, *overrides: str, dtype: str = "float32", exported: Path | None = None
) -> tuple[PreTrainedModel, Path]:
    """Change every trained parameter at random. Return the policy and the exported directory."""
    student, exported = ModelDir(folder, dtype), exported or folder.with_name("exported")
    recipe = small_recipe(*overrides, f"student.dtype={dtype}")
    check_trainable(student, recipe)
    policy = load_policy(student, recipe, "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # of the only process
                local += 0.05 * torch.randn(local.shape)
    StudentExporter(policy, student, dtype).export(exported)
    return policy, exported


def check_export(
    folder: Path, policy: PreTrainedModel, exported: Path, auto_class: type = AutoModelForCausalLM
) -> None:
    """Check that transformers loads the trained policy, from tensors of the same names, shapes and files."""
    stored, written = (ModelDir(path, "float32").weights for path in (folder, exported))
    layouts = [
        {name: (header.shape, header.file.name) for name, header in weights.tensors.items()}
        for weights in (stored, written)
    ]
    assert layouts[0] == layouts[1]
    assert not written.unused
    model, info = auto_class.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    initial = auto_class.from_pretrained(folder, dtype=torch.float32)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with torch.no_grad():
        expected, found, before = (m(input_ids=IDS_1T).logits for m in (policy, model, initial))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > 0.1
