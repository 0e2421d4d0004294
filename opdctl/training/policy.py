"""The student as it is trained: float32 master weights or LoRA adapters, sharded by FSDP2, exported as a plain model.

Every function here is called by all ranks.
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

ADAPTER = "default"  # peft's own name for the only one


def load_policy(student: ModelDir, recipe: Recipe, device: str) -> PreTrainedModel:
    """Load the student for training: what is trained is in float32, and requires a gradient.

    An update of 1e-5 is lost in bfloat16, so masters are float32 whatever the export's type; the frozen weights under
    an adapter are never updated and stay as they are. Raises OpdctlError where the model has no such LoRA targets.
    """
    sharded = distributed.world_size() > 1 or recipe.train.cpu_offload
    model = load_model(student, device="cpu" if sharded else device, dtype=None if recipe.lora.rank else "float32")
    if recipe.lora.rank:
        torch.manual_seed(recipe.seed)  # an adapter begins at random, and on every rank alike
        _inject(model, recipe.lora)
    if recipe.train.gradient_checkpointing:
        _recompute_activations(model)
    if sharded:
        _shard(model, recipe, device)
    return model


def _inject(model: PreTrainedModel, settings: Lora) -> None:
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
            "lora: this model's output matrix is its embedding, so neither can have an adapter or a copy of its own",
            hint="take them out of lora.target_modules and lora.modules_to_save",
        )
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise OpdctlError(f"lora: {' '.join(str(error).split())}", hint="see lora.target_modules") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    if not (off := check_head(model)) <= LOGPROB_TOLERANCE[model.dtype]:
        raise OpdctlError(f"lora: with these settings the log-probs are {off:.2g} nats from the model's own")


def _recompute_activations(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, and dropout not: transformers recomputes only layers in training mode, and a
    policy with dropout is another policy than the one that drew the responses."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _shard(model: PreTrainedModel, recipe: Recipe, device: str) -> None:
    """Shard every block, the rest of the body, and the head: it is gathered by `output_head`, never by a forward."""
    tied = model.config.get_text_config().tie_word_embeddings
    low = torch.bfloat16 if recipe.student.dtype == "bfloat16" else None
    settings: dict[str, Any] = {
        "mesh": distributed.mesh(device),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda")
        if recipe.train.cpu_offload
        else OffloadPolicy(),
    }
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = [fully_shard(module, **settings) for module in [*blocks, model.base_model]]
    head = model.get_output_embeddings()
    if tied:
        head.weight = model.get_input_embeddings().weight
    else:
        parts.append(fully_shard(head, **settings))
    for part in parts:
        part.set_gradient_divide_factor(1.0)  # each rank's loss is its share of the whole, so gradients add up
        if device == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def export(model: PreTrainedModel, student: ModelDir, dtype: str, folder: Path) -> None:
    """Write a plain model directory: weights in the recipe's type, adapters merged and beside them, the rest as the
    student came. Only rank 0 writes."""
    state = merged(model, getattr(torch, dtype))
    trained = {
        name: distributed.full_tensor(value).cpu() for name, value in model.named_parameters() if value.requires_grad
    }
    if not distributed.is_main():
        return
    model.config.dtype = getattr(torch, dtype)
    model.generation_config = GenerationConfig()  # the student's own is copied as it is, valid or not
    model.save_pretrained(folder, state_dict=state)
    student.copy_settings(folder)
    if config := getattr(model, "peft_config", {}).get(ADAPTER):
        _save_adapter(trained, config, student, folder / "adapter")


def _save_adapter(trained: dict[str, Tensor], config: "peft.PeftConfig", student: ModelDir, folder: Path) -> None:
    """Write the adapter alone, in peft's own format, to be put on the model that training began with."""
    config.base_model_name_or_path = str(student.path)
    config.save_pretrained(str(folder))
    plain = {name.replace(f".{ADAPTER}.", ".").replace(".modules_to_save.", "."): t for name, t in trained.items()}
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in plain.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def merged(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights under the names and in the shapes of the plain model, on the CPU; on rank 0 alone."""
    # A cast copy of a tied matrix is no longer tied and would be written a second time.
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
