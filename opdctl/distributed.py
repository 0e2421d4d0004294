"""Processes that work together under torchrun. The only file that reads RANK or calls a collective.

Without torchrun there is one process, which is rank 0 of one. Imports torch only where there are more.
"""

import datetime
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")
_owns_process_group = False  # whether the process group was made here
COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)  # one rank may evaluate for hours; a dead one is torchrun's to notice


def is_torchrun() -> bool:
    """Whether torchrun started this process. Others set RANK and WORLD_SIZE too, for purposes of their own."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if is_torchrun() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if is_torchrun() else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def init_process_group() -> None:
    """Join the other processes, if there are any. Each sees one GPU, its own; so do the engines that it starts."""
    if world_size() == 1:
        return
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    import torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    global _owns_process_group
    torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    _owns_process_group = True


def destroy_process_group() -> None:
    """Part from the other processes. A process group that vLLM has made in this process is not ours to take down."""
    global _owns_process_group
    if _owns_process_group:
        import torch

        torch.distributed.destroy_process_group()
        _owns_process_group = False


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    return world_size() > 1 and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))


def mesh(device: str) -> "DeviceMesh":
    """Return all processes as a mesh to shard a model over; a single one is a mesh of its own."""
    import torch
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        global _owns_process_group
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        _owns_process_group = True
    return init_device_mesh(device, (world_size(),))


def broadcast_object(value: Value) -> Value:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    import torch

    held: list[Any] = [value]
    torch.distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_sum({})


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over all ranks, in float64. Every rank gives the same names."""
    if world_size() == 1:
        return dict(values)
    import torch

    summed = torch.tensor([0.0, *(values[name] for name in sorted(values))], dtype=torch.float64)
    torch.distributed.all_reduce(summed)
    return dict(zip(sorted(values), summed.tolist()[1:], strict=True))


def main_process_first(work: Callable[[], Value]) -> Value:
    """Do the work on rank 0, then on the others: they find what it has made, and an error is said once."""
    if not is_main():
        barrier()
    done = work()
    if is_main():
        barrier()
    return done


def full_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor, or all of a sharded one; then every rank must ask for it."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
