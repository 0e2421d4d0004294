"""The shape of a decoder, and how many parameters follow from it. Imports no torch."""

from typing import TYPE_CHECKING, Any

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_shape(model: ModelDir) -> ModelShape | None:
    """Return the shape of a model by its config; None if there is no config here, or it lacks a size.

    Of a size that differs between layers, it is the largest.
    """
    try:
        config = model.text_config
    except OpdctlError:
        return None

    def first(*names: str) -> Any:
        return next((value for name in names if (value := _largest_of_layers(config, name))), None)

    layers, hidden, heads = (first(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if not (layers and hidden and heads and first("vocab_size")):
        return None
    experts = first("num_experts", "num_local_experts", "n_routed_experts") or 1
    inner = ("moe_intermediate_size", "intermediate_size") if experts > 1 else ("intermediate_size",)
    return ModelShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim") or hidden // heads,
        intermediate_size=first(*inner) or 4 * hidden,
        vocab_size=first("vocab_size"),
        num_experts=experts,
        num_experts_per_tok=first("num_experts_per_tok") or 1,
        tie_word_embeddings=bool(first("tie_word_embeddings")),
    )


def _largest_of_layers(config: "PreTrainedConfig", name: str) -> Any:
    """Return a value of a config; the largest one if the config has one for each layer."""
    if name in (config.per_layer_attributes or ()):
        return max(getattr(layer, name, None) or 0 for layer in config.per_layer_config)
    value = getattr(config, name, None)
    return max(value, default=None) if isinstance(value, list) else value


def attention_parameters(shape: ModelShape) -> int:
    return shape.hidden_size * shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)


def feed_forward_parameters(shape: ModelShape, experts: int) -> int:
    router = shape.hidden_size * shape.num_experts if shape.num_experts > 1 else 0
    return 3 * shape.hidden_size * shape.intermediate_size * experts + router


def block_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of one layer, norms included."""
    norms = 2 * shape.hidden_size + 2 * shape.head_dim
    return attention_parameters(shape) + feed_forward_parameters(shape, shape.num_experts) + norms


def head_parameters(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def count_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of a decoder with gated feed-forward layers and query and key norms."""
    matrices = 1 if shape.tie_word_embeddings else 2
    return shape.num_hidden_layers * block_parameters(shape) + matrices * head_parameters(shape) + shape.hidden_size


def active_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of the layers' matrices that process one token."""
    return shape.num_hidden_layers * (
        attention_parameters(shape) + feed_forward_parameters(shape, shape.num_experts_per_tok)
    )


def attention_span(shape: ModelShape) -> float:
    """Return the length in tokens at which causal attention costs as many FLOPs as all matrices of the model."""
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    return (active_parameters(shape) + head_parameters(shape)) / heads  # 2 a parameter; 4 a head and half the length


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Return the number of parameters of LoRA adapters on every linear layer except the output matrix."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    attention = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys)
    return (
        shape.num_hidden_layers
        * rank
        * (attention + 3 * shape.num_experts * (shape.hidden_size + shape.intermediate_size))
    )
