"""How an architecture is loaded and batched: its class in transformers, its body, and its rotary embedding."""

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from opdctl.errors import OpdctlError


def auto_class(config: PreTrainedConfig, path: Path) -> Any:
    """Return the auto class of transformers that loads a model directory completely.

    A multimodal model keeps its vision and audio towers, which text prompts do not use, so that it can be exported as
    it was.

    Raises:
        OpdctlError: the model does not predict the next token from the tokens before.
    """
    hint = "use a decoder that predicts the next token"
    if config.is_encoder_decoder:
        raise OpdctlError("unsupported_model", f"{path}: `{config.model_type}` is an encoder-decoder", hint=hint)
    if config.model_type == "reformer":
        reason = "its reversible layers have gradients in training mode only, with dropout"
        raise OpdctlError("unsupported_model", f"{path}: `reformer` cannot be trained: {reason}", hint=hint)
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        multimodal = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
        if multimodal.__name__ in (config.architectures or []) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForMultimodalLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    raise OpdctlError("unsupported_model", f"{path}: `{config.model_type}` is not a causal language model", hint=hint)


def separate_body(model: PreTrainedModel, path: Path) -> None:
    """Make `base_model` the part of the model before its output matrix, which it is not in a few classes.

    Raises:
        OpdctlError: there is no such part.
    """
    if model.base_model is not model:
        return
    parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise OpdctlError(
            "unsupported_model",
            f"{path}: {type(model).__name__} has no separable LM head: its base_model is the entire model",
        )
    model.base_model_prefix = parts[0]


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Return the length in tokens from which a model's rotary frequencies depend on the longest sequence in its batch.

    None if they never do. Beyond it, each new token changes the keys of all tokens before, which a cache keeps as they
    were. Such a model can score longer sequences, together with others of the same length, but not sample them.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    limits = []
    for settings in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # or one per type of layer
        kind = str(settings.get("rope_type"))
        if "dynamic" in kind:
            limits.append(text.max_position_embeddings)
        elif kind == "longrope":
            original = settings.get("original_max_position_embeddings")
            limits.append(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return min(limits, default=None)


def check_rope(config: PreTrainedConfig, path: Path, prompt_tokens: int, max_tokens: int) -> None:
    """Check that a model can sample responses of up to `max_tokens` tokens: they stay below its `rope_limit`.

    Raises:
        OpdctlError: they do not.
    """
    limit = rope_limit(config)
    if limit is not None and prompt_tokens + max_tokens > limit:
        raise OpdctlError(
            "unsupported_setting",
            f"{path}: its rotary frequencies depend on the length beyond {limit} tokens, so it can score but not "
            f"sample prompts of {prompt_tokens} with responses of {max_tokens} tokens",
            hint="lower max_tokens of the rollout or of the evaluation, or use shorter prompts",
        )
