"""The student in training: float32 master weights or LoRA adapters, sharded by FSDP2.

All ranks call every function of this module.
"""

from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl import distributed
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.inspection import load_on_meta_device
from opdctl.models.loading import load_model
from opdctl.models.self_check import LOGPROB_TOLERANCE, scoring_difference
from opdctl.recipe.schema import Recipe
from opdctl.training.adapters import check_adapters, inject_adapters, log_untrained_matrices, set_dropout
from opdctl.training.export import check_exportable, text_prefixes


def check_trainable(student: ModelDir, recipe: Recipe) -> None:
    """Check, without loading weights, that the student can be trained with the recipe's settings and exported.

    Raises:
        OpdctlError: it cannot.
    """
    model, _ = load_on_meta_device(student)
    _select_trained_weights(model, student, recipe)


def load_policy(student: ModelDir, recipe: Recipe, device: str) -> PreTrainedModel:
    """Load the student for training; trainable parameters are float32.

    bfloat16 rounds an update of 1e-5 away, so master weights are float32 whatever the dtype of the export. The frozen
    weights under an adapter keep their dtype.

    Raises:
        OpdctlError: the model cannot be exported, or does not support the recipe's LoRA settings.
    """
    sharded = distributed.world_size() > 1 or recipe.train.cpu_offload
    model = load_model(student, device="cpu" if sharded else device, dtype=None if recipe.lora.rank else "float32")
    _select_trained_weights(model, student, recipe)
    if recipe.lora.rank:
        check_adapters(model)
        set_dropout(model, True)
        log_untrained_matrices(model, recipe.lora, text_prefixes(model))
    if recipe.train.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    _check_forward_pass(model, recipe)
    if sharded:
        _shard(model, recipe, device)
    return model


def _select_trained_weights(model: PreTrainedModel, student: ModelDir, recipe: Recipe) -> None:
    """Freeze the weights that are not trained, and add those of adapters."""
    check_exportable(model, student)
    text = text_prefixes(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(text)  # towers of other modalities get no gradient from text
    if recipe.lora.rank:
        torch.manual_seed(recipe.seed)  # adapters have a random initialization, the same on every rank
        inject_adapters(model, recipe.lora, text)


def _check_forward_pass(model: PreTrainedModel, recipe: Recipe) -> None:
    """Check that a micro-batch, with adapters and gradient checkpointing, has the log-probs of a plain forward pass.

    Raises:
        OpdctlError: they do not.
    """
    dtype = getattr(torch, recipe.student.dtype)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        difference = scoring_difference(model)
    if not difference <= LOGPROB_TOLERANCE[dtype]:  # not `>`, so that NaN fails too
        raise OpdctlError(
            "unsupported_setting",
            "lora, train.gradient_checkpointing: with these settings the log-probs of training differ by "
            f"{difference:.2g} nats from those of a plain forward pass",
            hint="remove the output matrix from lora.target_modules, and disable train.gradient_checkpointing",
        )


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing without dropout, since the policy that sampled the responses had none.

    transformers checkpoints only layers in training mode, so the layers are set to it and their submodules are not.
    Some layers, such as those of OPT, apply dropout themselves.
    """
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
            probabilities = [
                name for name in vars(module) if isinstance(vars(module)[name], float) and "dropout" in name
            ]
            vars(module).update(dict.fromkeys(probabilities, 0.0))


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
