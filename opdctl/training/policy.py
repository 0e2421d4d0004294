"""The student in training: float32 master weights or LoRA adapters, sharded by FSDP2.

All ranks call every function of this module.
"""

import os

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.models.directory import LOGPROB_TOLERANCE, ModelDir, translate_loading_errors
from opdctl.models.inspection import check_files, check_loaded_tensors, load_on_meta_device
from opdctl.models.loading import load_model
from opdctl.models.routing import Routers, check_has_experts, check_replay
from opdctl.models.self_check import check_scoring, enable_packing, scoring_difference
from opdctl.models.shapes import read_shape
from opdctl.models.shards import WeightReader
from opdctl.recipe.schema import Recipe
from opdctl.training import sharding
from opdctl.training.adapters import check_adapters, inject_adapters, log_untrained_matrices, set_dropout
from opdctl.training.compilation import compile_blocks
from opdctl.training.export import check_exportable, text_prefixes

ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""By which a user sets torch's allocator."""


def check_trainable(student: ModelDir, recipe: Recipe) -> None:
    """Check, without loading weights, that the student can be trained with the recipe's settings and exported.

    Raises:
        OpdctlError: it cannot.
    """
    model, _ = load_on_meta_device(student)
    _select_trained_weights(model, student, recipe)
    if recipe.train.router_replay or recipe.rollout.routed_experts:
        check_has_experts(Routers(model))


def load_policy(student: ModelDir, recipe: Recipe, device: str) -> PreTrainedModel:
    """Load the student for training; trainable parameters are in `train.master_dtype`, those of adapters in float32.

    bfloat16 rounds an update of 1e-5 away, so master weights are float32 whatever the dtype of the export. The frozen
    weights under an adapter keep their dtype.

    Raises:
        OpdctlError: the model cannot be exported, or does not support the recipe's LoRA settings.
    """
    if device == "cuda" and not ALLOCATOR_VARIABLES & os.environ.keys():
        # Micro-batches have many shapes. vLLM, in processes with this environment, cannot have it: hence no variable.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    _warn_of_slow_attention(student, recipe, device)
    dtype = recipe.student.dtype if recipe.lora.rank else recipe.train.master_dtype
    is_sharded = sharding.is_sharded(recipe)
    if is_sharded:
        model = _load_sharded(student, recipe, device, dtype)
    else:
        model = load_model(student, device=device, dtype=dtype)
        _select_trained_weights(model, student, recipe)
    with sharding.complete_forward_pass(model, recipe):
        if is_sharded:
            check_scoring(model, student.path, LOGPROB_TOLERANCE[recipe.student.dtype])
        if recipe.lora.rank:
            check_adapters(model)
            set_dropout(model, True)
            log_untrained_matrices(model, recipe.lora, text_prefixes(model))
        if recipe.train.gradient_checkpointing:
            _enable_gradient_checkpointing(model, recipe.train.checkpoint_every_n_layers)
        if recipe.lora.rank or recipe.train.gradient_checkpointing or not is_sharded:
            _check_forward_pass(model, recipe)
        if recipe.train.router_replay:
            check_replay(model, Routers(model))
        if recipe.train.packing:
            _enable_packing(model, student, recipe)
        if recipe.train.compile:
            compile_blocks(model)
    if is_sharded:
        sharding.check_trained_shards(model, student)
    return model


def _warn_of_slow_attention(student: ModelDir, recipe: Recipe, device: str) -> None:
    """Warn if torch has no kernel for the student's attention, which then holds the scores of all pairs of tokens."""
    shape = read_shape(student)
    is_grouped = shape is not None and shape.num_key_value_heads < shape.num_attention_heads
    if device == "cuda" and recipe.student.dtype == "float32" and is_grouped:
        console.warn_once(
            f"{student.path}: on a GPU, torch has no fused kernel for grouped-query attention in float32, so memory "
            'grows with the square of the length of a response. Set student.dtype = "bfloat16"'
        )


def _load_sharded(student: ModelDir, recipe: Recipe, device: str, dtype: str) -> PreTrainedModel:
    """Load the student without ever holding more than this process's shards and one tensor.

    Raises:
        OpdctlError: the stored tensors do not match the config, or as `load_policy`.
    """
    check_files(student)
    model, loading_info = load_on_meta_device(student, dtype)
    check_loaded_tensors(student, model, loading_info)
    reader = WeightReader(model, student.weights)
    with sharding.parameters_without_memory(model):
        _select_trained_weights(model, student, recipe)
    sharding.shard(model, recipe, device)
    with translate_loading_errors(student.path, "the model", "invalid_model"):
        sharding.fill(model, reader, recipe, device)
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
    difference = scoring_difference(model)
    if not difference <= LOGPROB_TOLERANCE[recipe.student.dtype]:  # not `>`, so that NaN fails too
        raise OpdctlError(
            "unsupported_setting",
            "lora, train.gradient_checkpointing: with these settings the log-probs of training differ by "
            f"{difference:.2g} nats from those of a plain forward pass",
            hint="remove the output matrix from lora.target_modules, and disable train.gradient_checkpointing",
        )


def _enable_packing(model: PreTrainedModel, student: ModelDir, recipe: Recipe) -> None:
    if obstacle := enable_packing(model, LOGPROB_TOLERANCE[recipe.student.dtype]):
        console.info_once(
            f"{student.path}: its responses are padded, since packed ones may not be separate: {obstacle}"
        )


def _enable_gradient_checkpointing(model: PreTrainedModel, every_n_layers: int) -> None:
    """Enable gradient checkpointing without dropout, since the policy that sampled the responses had none.

    transformers checkpoints only layers in training mode, so the layers are set to it and their submodules are not.
    Some layers, such as those of OPT, apply dropout themselves.
    """
    model.gradient_checkpointing_enable(every_n_layers=every_n_layers)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            probabilities = [
                name for name in vars(module) if isinstance(vars(module)[name], float) and "dropout" in name
            ]
            vars(module).update(dict.fromkeys(probabilities, 0.0))
