"""Loading models from safetensors, completely or only the output head."""

from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import Head, check_head, output_head

LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""How far log-probs from `Head` may be from those of the model's logits, in nats, by the dtype of the weights."""


def load_model(model: ModelDir, *, device: str, dtype: str | None = None) -> PreTrainedModel:
    """Load a causal language model from safetensors, in `dtype` (default: the recipe's), in evaluation mode.

    Raises:
        OpdctlError: there are no safetensors, a tensor is missing, or `Head` does not reproduce the model's logits.
    """
    logging.disable_progress_bar()  # opdctl shows its own

    if not list(model.path.glob("*.safetensors")):
        raise OpdctlError("unsupported_model", f"{model.path}: no *.safetensors; opdctl never loads pickled weights")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, dtype or model.dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise OpdctlError("invalid_model", f"{model.path}: {error}") from error
    check_missing_keys(model, info)
    loaded = loaded.to(device).eval()
    if loaded.base_model is loaded:
        detail = f"{model.path}: {type(loaded).__name__} has no separable LM head: its base_model is the entire model"
        raise OpdctlError("unsupported_model", detail)
    if not (difference := check_head(loaded)) <= LOGPROB_TOLERANCE[loaded.dtype]:  # not `>`, so that NaN fails too
        raise OpdctlError(
            "unsupported_model",
            f"{model.path}: its log-probs differ by {difference:.2g} nats from those computed from its hidden states",
            hint="use a model that applies no more than a bias, a scale and a soft cap to its logits",
        )
    return loaded


def check_missing_keys(model: ModelDir, loading_info: dict[str, Any]) -> None:
    """Raise OpdctlError if transformers found no stored tensor for a parameter."""
    if missing := sorted(loading_info["missing_keys"]):
        raise OpdctlError("invalid_model", f"{model.path}: missing weights: {', '.join(missing[:5])}")


def load_head(model: ModelDir, *, device: str) -> Head:
    """Load only what turns a model's hidden states into logits: the output matrix, bias, scale and soft cap.

    Raises:
        OpdctlError: a tensor of the head is missing.
    """
    config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    layer = empty.get_output_embeddings()
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    for layer_name, layer_parameter in list(layer.named_parameters()):
        names = {name for name, parameter in parameters.items() if parameter is layer_parameter}  # several if tied
        for name, tensor in model.weights.tensors.items():
            if name in names:
                with safe_open(tensor.file, "pt", device=device) as opened:
                    value = opened.get_tensor(name).to(getattr(torch, model.dtype))  # rounded as in load_model
                setattr(layer, layer_name, torch.nn.Parameter(value, requires_grad=False))
        if getattr(layer, layer_name).is_meta:
            raise OpdctlError("invalid_model", f"{model.path}: no tensor {' or '.join(sorted(names))}")
    return output_head(empty, model.vocab_size)
