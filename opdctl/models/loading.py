"""Loading models from safetensors, completely or only the output head."""

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from opdctl.errors import OpdctlError
from opdctl.models.architectures import auto_class, separate_body
from opdctl.models.directory import ModelDir, translate_loading_errors
from opdctl.models.inspection import (
    captured_report,
    check_files,
    check_loaded_tensors,
    load_on_meta_device,
    loaded_names,
)
from opdctl.models.logprobs import Head, output_head
from opdctl.models.self_check import check_scoring
from opdctl.models.shards import WeightReader


def load_model(model: ModelDir, *, device: str, dtype: str | None = None) -> PreTrainedModel:
    """Load a causal language model from safetensors, in `dtype` (default: the recipe's), in evaluation mode.

    Raises:
        OpdctlError: the weights do not match the config, a library does not support the model, or its batches do not
            give the log-probs of a plain forward pass.
    """
    logging.disable_progress_bar()  # opdctl shows its own
    check_files(model)
    with captured_report(), translate_loading_errors(model.path, "the model", "invalid_model"):
        loaded, info = auto_class(model.full_config, model.path).from_pretrained(
            model.path,
            dtype=getattr(torch, dtype or model.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **model.loading_arguments(),
        )
    check_loaded_tensors(model, loaded, info)
    if model.is_quantized and not getattr(loaded, "is_quantized", False) and (dtype or model.dtype) == "float32":
        loaded = loaded.float()  # the quantizer dequantized, and leaves some weights in bfloat16
    loaded = loaded.to(device).eval()
    separate_body(loaded, model.path)
    check_scoring(loaded, model.path)
    return loaded


def reload_weights(loaded: PreTrainedModel, before: ModelDir, model: ModelDir) -> bool:
    """Read the weights of another directory into a loaded model, in place, and return whether all of them were read.

    Then `loaded` is what `load_model` would return: its checks concern the architecture, which is the same. Otherwise
    the model may have weights of both. before: the directory that the model was loaded from.

    Raises:
        OpdctlError: as `load_model`.
    """

    def form(directory: ModelDir) -> tuple[object, ...]:
        tensors = {name: tensor.shape for name, tensor in directory.weights.tensors.items()}
        return directory.dtype, directory.config, tensors

    if model.is_quantized or form(before) != form(model):
        return False
    check_files(model)
    tensors = loaded.state_dict(keep_vars=True)
    with captured_report(), translate_loading_errors(model.path, "the model", "invalid_model"):
        read = WeightReader(loaded, model.weights).read({name: [tensor] for name, tensor in tensors.items()})
    held = {tensors[name].data_ptr() for name in read}  # tied tensors have one memory
    return all(tensor.data_ptr() in held for tensor in tensors.values())


def load_head(model: ModelDir, *, device: str) -> Head:
    """Load only what turns a model's hidden states into logits: the output matrix, bias, scale and soft cap.

    Raises:
        OpdctlError: a tensor of the head is missing.
    """
    empty, _ = load_on_meta_device(model)
    layer = empty.get_output_embeddings()
    parameters = dict(empty.named_parameters(remove_duplicate=False))
    stored = {name: stored_name for stored_name, name in loaded_names(empty, model.weights).items()}
    for layer_name, layer_parameter in list(layer.named_parameters()):
        names = [name for name, parameter in parameters.items() if parameter is layer_parameter]  # several if tied
        stored_name = next((stored[name] for name in names if name in stored), None)
        if stored_name is None:
            raise OpdctlError("invalid_model", f"{model.path}: no tensor {' or '.join(sorted(names))}")
        with safe_open(model.weights.tensors[stored_name].file, "pt", device=device) as opened:
            value = opened.get_tensor(stored_name).to(getattr(torch, model.dtype))  # rounded as in load_model
        setattr(layer, layer_name, torch.nn.Parameter(value, requires_grad=False))
    return output_head(empty, model.vocab_size, getattr(torch, model.dtype))
