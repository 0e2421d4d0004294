"""TODO."""

from transformers import PreTrainedModel

from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import Head

LOGPROB_TOLERANCE = {True: 1e-3, False: 0.5}  # nats, by whether the weights are float32


def load_model(model: ModelDir, *, device: str, dtype: str | None = None) -> "PreTrainedModel":
    """Load a causal language model from safetensors, in `dtype` (its own by default), in evaluation mode.

    Raises OpdctlError when there are no safetensors, when a tensor is missing, or when the model transforms its
    logits in a way that opdctl's log-probs do not follow.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from opdctl.models.logprobs import check_head

    logging.disable_progress_bar()  # opdctl shows its own

    if not list(model.path.glob("*.safetensors")):
        raise OpdctlError(f"{model.path}: no *.safetensors; opdctl loads no pickled weights")
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
        raise OpdctlError(f"{model.path}: cannot be loaded: {error}", code=ExitCode.BAD_DATA) from error
    if info["missing_keys"]:
        raise OpdctlError(
            f"{model.path}: weights missing: {', '.join(sorted(info['missing_keys'])[:5])}", code=ExitCode.BAD_DATA
        )
    loaded = loaded.to(device).eval()
    if loaded.base_model is loaded:
        raise OpdctlError(f"{model.path}: {type(loaded).__name__} keeps its output matrix among its layers")
    if not (off := check_head(loaded)) <= LOGPROB_TOLERANCE[loaded.dtype == torch.float32]:  # NaN is not below anything
        raise OpdctlError(
            f"{model.path}: its logits are not what opdctl makes of its hidden states: {off:.2g} nats apart",
            hint="an output matrix with bias, scale and soft cap is known; this model does more to its logits",
        )
    return loaded


def load_head(model: ModelDir, *, device: str) -> "Head":
    """Load a model's output matrix alone, and what else makes its logits, without the rest of its weights."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from opdctl.models.logprobs import output_head

    config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    layer = empty.get_output_embeddings()
    tensors = dict(empty.named_parameters(remove_duplicate=False))
    for own, wanted in list(layer.named_parameters()):
        names = {name for name, tensor in tensors.items() if tensor is wanted}
        for file in model.path.glob("*.safetensors"):
            with safe_open(file, "pt", device=device) as opened:
                for name in names & set(opened.keys()):
                    value = opened.get_tensor(name).to(getattr(torch, model.dtype))  # rounded as in the whole model
                    setattr(layer, own, torch.nn.Parameter(value, requires_grad=False))
        if getattr(layer, own).is_meta:
            raise OpdctlError(
                f"{model.path}: no {' or '.join(sorted(names))} in its safetensors", code=ExitCode.BAD_DATA
            )
    return output_head(empty, model.vocab_size)
