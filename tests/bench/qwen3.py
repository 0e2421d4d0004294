"""Random Qwen3 models of any shape."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Qwen3Moe

from opdctl.recipe.schema import ModelShape

SMALL_SHAPE = ModelShape(
    num_hidden_layers=6,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=768,
    vocab_size=16_384,
    tie_word_embeddings=True,
)
"""4.7 million parameters in the layers."""


def build_model(shape: ModelShape) -> PreTrainedModel:
    """Return a dense model, or a mixture of experts if the shape has several experts."""
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "eos_token_id": 0,
    }
    if shape.num_experts == 1:
        return Qwen3ForCausalLM(Qwen3Config(**common))
    experts = {"num_experts": shape.num_experts, "num_experts_per_tok": shape.num_experts_per_tok}
    return Qwen3Moe(Qwen3MoeConfig(**common, **experts, moe_intermediate_size=shape.intermediate_size))


def save_model(shape: ModelShape, folder: Path) -> Path:
    """Write the model directory of a random model, with one word per token in its tokenizer, and return it."""
    torch.manual_seed(0)
    build_model(shape).save_pretrained(folder)
    words = {f"w{index}": index for index in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)
    return folder
