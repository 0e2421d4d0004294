"""Small random models of many architectures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model

TOY = find_or_download(Model(model="toy:student"), "student.model")
VOCAB_SIZE = 56  # ids of the embedded tokenizer; the matrices have eight rows more
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": [1, 5],
    "bos_token_id": None,
}
UNTIED, TIED = SMALL | {"tie_word_embeddings": False}, SMALL | {"tie_word_embeddings": True}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**UNTIED)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**UNTIED, head_dim=16)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**TIED, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TIED, head_dim=16, final_logit_softcapping=5.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**UNTIED, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**TIED, logit_scale=0.25)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**UNTIED, "num_key_value_heads": 2})),
}
"""Every kind of output head: tied or not, with a scale, a soft cap or a bias."""


def make(architecture: str) -> PreTrainedModel:
    """Return a random model whose logits differ enough for bias, scale and soft cap to have an effect."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]().eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)
    return model


def save(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    """Write a model with the embedded tokenizer."""
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOY / name, folder)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the stored tensors of a model in one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    """Change keys of a model's config.json."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
