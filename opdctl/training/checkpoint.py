"""Checkpoints of the trainer: the trained parameters in float32, and AdamW's moments. Exact to the bit.

They use torch's distributed checkpoint with safetensors files: each rank writes its own shards, and any number of ranks
can read them. There is no pickle. Nothing else is state: the learning rate and every random number follow from
the recipe's seed and the step.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from torch.optim import AdamW

from opdctl import distributed
from opdctl.artifacts.tensor_files import TensorEntry, TensorFileWriter, position_in_file
from opdctl.models.dtypes import DTYPE_NAMES, tensor_bytes

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of a single process

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(directory: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Write the state to `directory` and return the bytes of this rank's file by name. Called by all ranks.

    It may be called in a background thread, while nothing changes the tensors.
    """
    writer, group = ShardWriter(directory), distributed.control_group()
    with _plain_errors():
        state_dict_saver.save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)
    return writer.sizes


class ShardWriter(StorageWriter):
    """Writes a rank's shards to one file, as HuggingFaceStorageReader reads it: each with its offsets in the tensor.

    torch's own writer of this format assembles a file in memory.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self.sizes: dict[str, int] = {}

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the name of its file."""
        return [
            replace(plan, storage_data=f"shard-{number:05d}-of-{len(plans):05d}.safetensors")
            for number, plan in enumerate(plans, 1)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the shards one after another: no more than one is copied to the CPU."""
        shards = {entry: item for item in plan.items if (entry := _entry(item)).num_bytes}
        entries = sorted(shards, key=position_in_file)
        offsets = {entry.name: {SAVED_OFFSETS_KEY: list(_chunk(shards[entry]).offsets)} for entry in entries}
        if entries:
            metadata = {CUSTOM_METADATA_KEY: json.dumps(offsets)}
            with TensorFileWriter(self._directory / plan.storage_data, entries, metadata) as file:
                for entry in entries:
                    file.write(tensor_bytes(cast(Tensor, planner.resolve_data(shards[entry])).cpu()))
                self.sizes[plan.storage_data] = file.finish()
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _entry(item: WriteItem) -> TensorEntry:
    assert item.tensor_data is not None
    shape, dtype = tuple(_chunk(item).sizes), item.tensor_data.properties.dtype
    return TensorEntry(item.index.fqn, DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def restore(directory: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Read the state from `directory`, written by any number of ranks. Called by all ranks.

    Raises:
        ValueError: the names or shapes of the tensors differ from the model's.
    """
    state = state_tensors(model, optimizer)
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
    """Raise the exception of a rank itself: torch wraps it in a BaseException."""
    try:
        yield
    except CheckpointException as wrapped:
        raise next(iter(wrapped.failures.values()))[0] from None


def state_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Return every tensor of the state by name, without copying it. Tied weights are one parameter.

    Moments that do not exist before the first update are created.
    """
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
