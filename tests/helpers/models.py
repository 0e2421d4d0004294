"""Small models of many architectures."""

import shutil
from pathlib import Path

import torch

from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model

TOY = find_or_download(Model(model="toy:student"), "student.model")
SMALL = {
    "vocab_size": 64,  # eight rows more than the tokenizer knows
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


def save(model: torch.nn.Module, folder: Path) -> Path:
    """Write a random model with the embedded tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOY / name, folder)
    return folder
