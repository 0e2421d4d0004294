"""Process groups under torchrun. No other module reads RANK or calls a collective.

Without torchrun there is a single process, rank 0. torch is imported only when a function needs it.
"""

import datetime
import gc
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")
CUDA_BACKEND = "cpu:gloo,cuda:nccl"
COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)
"""Long, since the others wait while one rank evaluates for hours. torchrun detects a rank that has exited."""
_owns_process_group = False  # whether this module created the process group


def is_torchrun() -> bool:
    """Whether torchrun started this process. RANK and WORLD_SIZE are no evidence: other launchers set them too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if is_torchrun() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if is_torchrun() else 0


def is_main() -> bool:
    """Whether this is rank 0, the only process that writes files and prints."""
    return rank() == 0


def init_process_group() -> None:
    """Create the process group, if there are several processes. Each process, with its engines, sees one GPU."""
    if world_size() == 1:
        return
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    import torch

    backend = CUDA_BACKEND if torch.cuda.is_available() else "gloo"
    global _owns_process_group
    torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    _owns_process_group = True


def destroy_process_group() -> None:
    """Destroy the process group. One that vLLM created in this process is left alone."""
    global _owns_process_group
    if _owns_process_group:
        import torch

        # A sharded model is part of a reference cycle. If it outlives the process group, threads of gloo may abort.
        gc.collect()
        torch.distributed.destroy_process_group()
        _owns_process_group = False


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error only reports that another rank is gone."""
    return world_size() > 1 and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))


def mesh(device: str) -> "DeviceMesh":
    """Return the device mesh of all processes, over which a model is sharded. It may consist of a single process."""
    import torch
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        backend = CUDA_BACKEND if device == "cuda" else "gloo"
        global _owns_process_group
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        _owns_process_group = True
    return init_device_mesh(device, (world_size(),))


def broadcast_object(value: _T) -> _T:
    """Return the value of rank 0 on every rank."""
    if world_size() == 1:
        return value
    import torch

    values: list[Any] = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gather_objects(value: _T) -> list[_T]:
    """Return the values of all ranks, in order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_sum({})


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over all ranks, in float64. Every rank passes the same names."""
    if world_size() == 1:
        return dict(values)
    import torch

    sums = torch.tensor([0.0, *(values[name] for name in sorted(values))], dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return dict(zip(sorted(values), sums.tolist()[1:], strict=True))


def main_process_first(function: Callable[[], _T]) -> _T:
    """Call the function on rank 0, then on the other ranks, which reuse its files. An error is reported once."""
    if not is_main():
        barrier()
    result = function()
    if is_main():
        barrier()
    return result


def full_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor, gathered from all ranks if it is sharded; then every rank must call this."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
