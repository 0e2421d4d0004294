"""The state of training, saved and restored whole: what is trained, in float32, and the optimizer's moments.

torch's distributed checkpoint on its safetensors storage: each rank writes its own shards, and any other number of
ranks reads them back. There is no pickle: the shards' places lie in the files' own headers. What else training needs
is no state: the learning rate and every random draw follow from the recipe's seed and the step.
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
KINDS = ("weight", *MOMENTS, "step")


def save(folder: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Write the state into `folder`. Called by every rank. Tied weights are one parameter and are stored once."""
    with warnings.catch_warnings(action="ignore"), _plain_errors():  # that there is one process only: so it may be
        state = _state(model, optimizer)
        # A file is put together in memory before it is written: so one for each kind of tensor.
        files = {name: 1 + KINDS.index(name.partition("/")[0]) for name in state}
        writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
        state_dict_saver.save(state, storage_writer=writer)


def restore(folder: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Read the state in `folder` back, bit for bit, whatever the number of ranks that wrote it. Called by every rank.

    Raises ValueError unless the files hold exactly the model's tensors, in their shapes.
    """
    state = _state(model, optimizer)
    reader = HuggingFaceStorageReader(str(folder))
    entries: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(entry.size) for name, entry in entries.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if differing := {name for name, _ in stored.items() ^ wanted.items()}:
        raise ValueError(f"{folder}: not the state of this model: {', '.join(sorted(differing)[:5])}")
    with warnings.catch_warnings(action="ignore"), _plain_errors():  # that there is one process only: so it may be
        state_dict_loader.load(state, storage_reader=reader)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what a rank raised: torch wraps it in something that is no Exception."""
    try:
        yield
    except CheckpointException as wrapped:
        raise next(iter(wrapped.failures.values()))[0] from None


def _state(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Return every tensor of the state by name; the moments are made where there was no update yet."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = optimizer.state[parameter]
        if not own:
            own["step"] = torch.zeros((), device=parameter.device)
            own.update({key: torch.zeros_like(parameter) for key in MOMENTS})
        state[f"weight/{name}"] = parameter.detach()
        state |= {f"{key}/{name}": own[key] for key in ("step", *MOMENTS)}
    return state
