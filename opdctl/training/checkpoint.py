"""Checkpoints of the trainer: the trained parameters in float32, and AdamW's moments. Exact to the bit.

They use torch's distributed checkpoint with safetensors storage: each rank writes its own shards, and any number of
ranks can read them. There is no pickle. Nothing else is state: the learning rate and every random number follow from
the recipe's seed and the step.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
TENSOR_GROUPS = ("weight", *MOMENTS, "step")


def save(directory: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Write the state to `directory`. Called by all ranks. Tied weights are one parameter and are stored once."""
    state = _state_dict(model, optimizer)
    # The writer assembles a file in memory, so there is one file for each group of tensors.
    file_numbers = {name: 1 + TENSOR_GROUPS.index(name.partition("/")[0]) for name in state}
    writer = HuggingFaceStorageWriter(str(directory), file_numbers, save_distributed=True)
    with _plain_errors():
        state_dict_saver.save(state, storage_writer=writer)


def restore(directory: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Read the state from `directory`, written by any number of ranks. Called by all ranks.

    Raises:
        ValueError: the names or shapes of the tensors differ from the model's.
    """
    state = _state_dict(model, optimizer)
    reader = HuggingFaceStorageReader(str(directory))
    entries: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(entry.size) for name, entry in entries.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if differing := {name for name, _ in stored.items() ^ expected.items()}:
        raise ValueError(f"{directory}: not a checkpoint of this model: {', '.join(sorted(differing)[:5])}")
    with _plain_errors():
        state_dict_loader.load(state, storage_reader=reader)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the exception of a rank itself: torch wraps it in a BaseException. Hide torch's single-process warnings."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except CheckpointException as wrapped:
        raise next(iter(wrapped.failures.values()))[0] from None


def _state_dict(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Return every tensor of the state by name. Moments that do not exist before the first update are created."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), device=parameter.device)
            moments.update({key: torch.zeros_like(parameter) for key in MOMENTS})
        state[f"weight/{name}"] = parameter.detach()
        state |= {f"{key}/{name}": moments[key] for key in ("step", *MOMENTS)}
    return state
