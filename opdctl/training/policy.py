"""The student in training: float32 master weights or LoRA adapters, sharded by FSDP2, exported as a plain model.

All ranks call every function of this module.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl import distributed
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.loading import LOGPROB_TOLERANCE, load_model
from opdctl.models.logprobs import check_head
from opdctl.recipe.schema import Lora, Recipe

if TYPE_CHECKING:
    import peft

ADAPTER = "default"  # the name that peft gives to a single adapter


def load_policy(student: ModelDir, recipe: Recipe, device: str) -> PreTrainedModel:
    """Load the student for training; trainable parameters are float32.

    bfloat16 rounds an update of 1e-5 away, so master weights are float32 whatever the dtype of the export. The frozen
    weights under an adapter keep their dtype.

    Raises:
        OpdctlError: the model does not support the recipe's LoRA settings.
    """
    sharded = distributed.world_size() > 1 or recipe.train.cpu_offload
    model = load_model(student, device="cpu" if sharded else device, dtype=None if recipe.lora.rank else "float32")
    if recipe.lora.rank:
        torch.manual_seed(recipe.seed)  # adapters have a random initialization, the same on every rank
        _inject_adapters(model, recipe.lora)
    if recipe.train.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    if sharded:
        _shard(model, recipe, device)
    return model


def _inject_adapters(model: PreTrainedModel, settings: Lora) -> None:
    """Put LoRA adapters into the model and freeze the rest."""
    import peft

    targets = settings.target_modules[0] if settings.target_modules == ["all-linear"] else settings.target_modules
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=settings.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    tied = model.config.get_text_config().tie_word_embeddings
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if tied and {head.rpartition(".")[2], "embed_tokens"} & {*settings.target_modules, *settings.modules_to_save}:
        raise OpdctlError(
            "unsupported_setting",
            "lora.target_modules, lora.modules_to_save: the output matrix of this model is its embedding",
            hint=f"remove {head.rpartition('.')[2]} and embed_tokens from both",
        )
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        reason = " ".join(str(error).split())
        hint = "give the names of linear layers of this model, or all-linear"
        raise OpdctlError("unsupported_setting", f"lora.target_modules: {reason}", hint=hint) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    if not (difference := check_head(model)) <= LOGPROB_TOLERANCE[model.dtype]:
        why = f"lora: with these settings the log-probs differ from the model's by {difference:.2g} nats"
        raise OpdctlError("unsupported_setting", why, hint="remove the output matrix from lora.target_modules")


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing without dropout, since the policy that sampled the responses had none.

    transformers checkpoints only layers in training mode, so the layers are set to it and their submodules are not.
    """
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _shard(model: PreTrainedModel, recipe: Recipe, device: str) -> None:
    """Shard every block, the remaining body, and the head, which `output_head` gathers instead of a forward pass."""
    tied = model.config.get_text_config().tie_word_embeddings
    param_dtype = torch.bfloat16 if recipe.student.dtype == "bfloat16" else None
    settings: dict[str, Any] = {
        "mesh": distributed.mesh(device),
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda")
        if recipe.train.cpu_offload
        else OffloadPolicy(),
    }
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sharded = [fully_shard(module, **settings) for module in [*blocks, model.base_model]]
    head = model.get_output_embeddings()
    if tied:
        head.weight = model.get_input_embeddings().weight
    else:
        sharded.append(fully_shard(head, **settings))
    for module in sharded:
        module.set_gradient_divide_factor(1.0)  # sum, not mean: loss scales refer to all tokens of the step
        if device == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction


def export(model: PreTrainedModel, student: ModelDir, dtype: str, directory: Path) -> None:
    """Write a plain model directory: merged weights in `dtype`, adapters also in `adapter/`, tokenizer and settings of
    the initial student. Only rank 0 writes."""
    state = merged_state_dict(model, getattr(torch, dtype))
    trained = {
        name: distributed.full_tensor(value).cpu() for name, value in model.named_parameters() if value.requires_grad
    }
    if not distributed.is_main():
        return
    model.config.dtype = getattr(torch, dtype)
    model.generation_config = GenerationConfig()  # copy_settings copies the student's file unchanged, valid or not
    model.save_pretrained(directory, state_dict=state)
    student.copy_settings(directory)
    if config := getattr(model, "peft_config", {}).get(ADAPTER):
        _save_adapter(trained, config, student, directory / "adapter")


def _save_adapter(trained: dict[str, Tensor], config: "peft.PeftConfig", student: ModelDir, directory: Path) -> None:
    """Write the adapter in peft's format. It applies to the initial student."""
    config.base_model_name_or_path = str(student.path)
    config.save_pretrained(str(directory))
    plain = {name.replace(f".{ADAPTER}.", ".").replace(".modules_to_save.", "."): t for name, t in trained.items()}
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in plain.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def merged_state_dict(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights with the names and shapes of the plain model, on the CPU. Empty except on rank 0."""
    # A cast copy of a tied matrix is no longer tied and would be written twice.
    tied, state = model.all_tied_weights_keys, {}
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        if plain in tied or "lora_" in name or ".original_module." in name:
            continue
        weight = distributed.full_tensor(value)
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = weight.float() + distributed.full_tensor(layer.get_delta_weight(ADAPTER))
        if distributed.is_main():
            state[plain] = weight.to("cpu", dtype)
    return state
