"""A student of which each process holds a part, sharded by FSDP2 from the start: no process ever holds all of it.

All ranks call every function of this module.
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl import distributed
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import output_head
from opdctl.models.shards import WeightReader
from opdctl.recipe.schema import Recipe
from opdctl.training.adapters import plain_name


def is_sharded(recipe: Recipe) -> bool:
    """Whether the student is sharded by FSDP2."""
    return recipe.shards_student(distributed.world_size())


def check_fsdp_size(recipe: Recipe) -> None:
    """Check that the processes can be divided into groups of `train.fsdp_size`.

    Raises:
        OpdctlError: they cannot.
    """
    size, processes = recipe.train.fsdp_size, distributed.world_size()
    if size and processes % size:
        raise OpdctlError(
            "unsupported_setting",
            f"train.fsdp_size: {size} does not divide the number of processes, {processes}",
            hint="set it to a divisor of that number, or remove it",
        )


def shard(model: PreTrainedModel, recipe: Recipe, device: str) -> None:
    """Shard every block, the remaining body, and the head, which `output_head` gathers instead of a forward pass.

    Parameters on torch's meta device stay there.
    """
    places, body, head = _places(model), _body(model), model.get_output_embeddings()
    shared = set(head.parameters()) & set(body.parameters())
    settings: dict[str, Any] = {
        "mesh": distributed.mesh(device, recipe.train.fsdp_size),
        "mp_policy": MixedPrecisionPolicy(param_dtype=_param_dtype(recipe), reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda")
        if recipe.train.cpu_offload
        else OffloadPolicy(),
    }
    sharded = [fully_shard(module, **settings) for module in [*_separate_blocks(model), body]]
    if shared != set(head.parameters()):  # a tied head may have a bias
        sharded.append(fully_shard(head, **settings, ignored_params=shared))
    _share_again(places)
    for module in sharded:
        module.set_gradient_divide_factor(1.0)  # sum, not mean: loss scales refer to all tokens of the step
        module.set_force_sum_reduction_for_comms(True)  # the only reduction of gloo, so that NCCL's is the tested one


def _places(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return for each parameter the modules that have it, with its name there."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                places[value].append((module, name))
    return list(places.values())


def _share_again(places: list[list[tuple[nn.Module, str]]]) -> None:
    """Let modules that had a parameter together have its shards together, whichever of them FSDP2 has sharded."""
    for owners in places:
        values = [getattr(module, name) for module, name in owners]
        shards = next((value for value in values if isinstance(value, DTensor)), None)
        for module, name in owners if shards is not None else ():
            setattr(module, name, shards)


def _body(model: PreTrainedModel) -> nn.Module:
    """Return the module whose forward pass every pass runs: the base model, or what it only wraps."""
    body: nn.Module = model.base_model
    while len(children := list(body.children())) == 1 and not list(body.parameters(recurse=False)):
        body = children[0]
    return body


def _separate_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks whose parameters belong to no other one. FSDP2 gathers the others with the remaining body."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    counts = Counter(parameter for block in blocks for parameter in block.parameters())
    return [block for block in blocks if all(counts[parameter] == 1 for parameter in block.parameters())]


def _param_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the dtype of gathered parameters; None for that of the shards."""
    return torch.bfloat16 if recipe.student.dtype == "bfloat16" else None


@contextlib.contextmanager
def parameters_without_memory(model: nn.Module) -> Iterator[None]:
    """Let a model on torch's meta device have parameters on the CPU, without memory, until the end of the context.

    What peft adds for these parameters is then initialized on the CPU, by the same random numbers as for a loaded
    model. It is kept; all other parameters are on the meta device again afterwards.
    """
    _replace(model, lambda value: torch.empty(1, dtype=value.dtype).expand(value.shape))
    yield
    kept = {id(value) for name, value in model.named_parameters() if re.search(r"\.lora_\w+\.", name)}
    _replace(
        model, lambda value: value if id(value) in kept else torch.empty(value.shape, dtype=value.dtype, device="meta")
    )


def fill(model: PreTrainedModel, reader: WeightReader, recipe: Recipe, device: str) -> None:
    """Give memory to the parameters and buffers of a sharded model on the meta device, and read their values.

    Each process reads its own rows. Buffers that are not stored are computed.
    """
    home = "cpu" if recipe.train.cpu_offload else device
    _replace(model, lambda value: torch.empty_like(value, device=home) if value.is_meta else value)
    _replace_buffers(model, lambda value: torch.empty_like(value, device="cpu") if value.is_meta else value)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    targets = defaultdict(list)
    for name, tensor in tensors:
        targets[plain_name(name.replace(".original_module.", "."))].append(tensor)
    stored = reader.read(targets)
    for name, tensor in tensors:
        # transformers initializes only what is not marked so.
        is_adapter = re.search(r"\.lora_\w+\.", name)
        if is_adapter or plain_name(name.replace(".original_module.", ".")) in stored:
            tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    _replace_buffers(model, lambda value: value.to(device))


def _replace(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replace the parameters of a model; one that several modules share stays one."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is None:
                continue
            if value not in replaced:
                converted = convert(value)
                is_same = converted is value
                replaced[value] = value if is_same else nn.Parameter(converted, requires_grad=value.requires_grad)
            module._parameters[name] = replaced[value]


def _replace_buffers(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    replaced: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = replaced.setdefault(value, convert(value))


@contextlib.contextmanager
def complete_forward_pass(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Let the complete model run, with its head, and shard it again afterwards.

    A tied head is outside of what FSDP gathers, and training gathers it without the model's own forward pass.
    """
    head = model.get_output_embeddings()
    weight = head.weight
    is_tied = weight is model.get_input_embeddings().weight
    is_gathered_by_nobody = isinstance(weight, DTensor) and (is_tied or not isinstance(head, FSDPModule))
    if is_gathered_by_nobody:
        with torch.no_grad():
            gathered_VD = output_head(model, len(weight)).weight_VD
        head.weight = nn.Parameter(gathered_VD.to(_param_dtype(recipe) or weight.dtype), requires_grad=False)
    try:
        yield
    finally:
        if is_gathered_by_nobody:
            head.weight = weight
        discard_pass(model)  # a self-check may have found that a pass fails
        reshard(model)


def check_trained_shards(model: PreTrainedModel, student: ModelDir) -> None:
    """Check that every trained parameter is a shard. The ranks would train another one apart from each other.

    Raises:
        OpdctlError: one is not: no module that FSDP2 shards contains it.
    """
    names = [name for name, value in model.named_parameters() if value.requires_grad and not isinstance(value, DTensor)]
    if names:
        raise OpdctlError(
            "unsupported_model",
            f"{student.path}: no block, body or head contains {', '.join(names[:3])}, so FSDP2 cannot shard it",
            hint='set student.dtype = "float32", and train with one process',
        )


def discard_pass(model: PreTrainedModel) -> None:
    """Discard the gradients, and with them a forward or backward pass that failed, so that another one can begin."""
    model.zero_grad()  # of the parameters that are gathered just now
    if isinstance(body := _body(model), FSDPModule):
        body.reset_iter_state()
    model.zero_grad()


def reshard(model: PreTrainedModel) -> None:
    """Shard a model again after a forward pass that no backward pass follows, so that its parameters are the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
