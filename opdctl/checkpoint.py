"""The state of training, saved and restored whole: float32 master weights and the optimizer's moments."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

FILE = "state.safetensors"


def save(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the state into `folder`. Tied weights are one parameter and are stored once."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.detach()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read the state in `folder` back, bit for bit."""
    tensors = load_file(folder / FILE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.pop(f"weight/{name}"))
            keys = [key for key in tensors if key.endswith(f"/{name}") and key.count("/") == 1]
            state = {key.partition("/")[0]: tensors.pop(key) for key in keys}
            # AdamW keeps its step count on the CPU, the moments beside the parameter.
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    if tensors:
        raise ValueError(f"{folder / FILE}: tensors that the model has no place for: {sorted(tensors)[:5]}")
