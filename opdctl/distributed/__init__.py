"""The processes of one command, which a launcher started together: ranks, devices, and collectives.

No other module reads a launcher's variables or calls a collective. Without a launcher there is a single process, rank
0. torch is imported only when a function needs it.
"""

import datetime
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from opdctl.distributed.launch import Launch, read_launch
from opdctl.distributed.peers import PeerWatch
from opdctl.errors import ExitCode, OpdctlError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")
CUDA_BACKEND = "cpu:gloo,cuda:nccl"
MODEL_TIMEOUT = datetime.timedelta(minutes=15)
"""Of the collectives of a model, for which all ranks are ready at about the same time."""
CONTROL_TIMEOUT = datetime.timedelta(days=1)
"""Of all others: a rank may wait for hours until another has finished its part. `PeerWatch` notices a lost rank."""
MEETING_TIMEOUT = datetime.timedelta(minutes=15)
"""Until all processes have started."""
VIEW_SECONDS = 180.0
"""Until a file that rank 0 has written must be visible on every machine: NFS remembers a missing file for a minute."""
_control_group: "ProcessGroup | None" = None  # of gloo; None for a single process
_background_group: "ProcessGroup | None" = None  # the same, for the collectives of another thread than the main one
_owns_process_group = False  # whether this module created the default group
_peers: PeerWatch | None = None
_visible_gpus: list[str] | None = None
_is_narrowed = False  # whether this process sees fewer GPUs than _visible_gpus


# ── Ranks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _launch() -> Launch:
    """Return this process's launch. Where the variables are incomplete, `init_process_group` reports it."""
    try:
        return read_launch(os.environ)
    except OpdctlError:
        return Launch()


def world_size() -> int:
    """Return the number of processes."""
    return _launch().world_size


def rank() -> int:
    return _launch().rank


def local_rank() -> int:
    """Return the rank among the processes of this machine."""
    return _launch().local_rank


def is_launched() -> bool:
    """Whether a launcher started this process as a rank, perhaps the only one."""
    return "RANK" in os.environ or world_size() > 1


def is_main() -> bool:
    """Whether this is rank 0, the only process that writes files and prints."""
    return rank() == 0


# ── Groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def init_process_group(*, use_gpu: bool, on_peer_failure: Callable[["Failure"], None]) -> None:
    """Create the process group, if there are several processes. Each process, with its engines, sees one GPU.

    on_peer_failure: called in a thread if another process is lost; it ends this process.

    Raises:
        OpdctlError: the launcher's variables are incomplete; the processes have different devices.
    """
    global _background_group, _control_group, _owns_process_group, _peers
    launch = read_launch(os.environ)
    if launch.world_size == 1:
        return
    if use_gpu:
        _narrow_to_one_gpu(launch)
    import torch
    from torch._C._distributed_c10d import PrefixStore

    use_gpu = use_gpu and torch.cuda.is_available()
    store = _meet(launch)
    _check_same_devices(store, launch, "cuda" if use_gpu else "cpu")
    torch.distributed.init_process_group(
        CUDA_BACKEND if use_gpu else "gloo",
        store=PrefixStore("default_pg", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=MODEL_TIMEOUT,
        device_id=_select_gpu() if use_gpu else None,
    )
    _owns_process_group = True
    _control_group, _background_group = (
        torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) for _ in range(2)
    )
    connection = PrefixStore("peers", store.clone())
    _peers = PeerWatch(connection, launch.rank, launch.world_size, lambda text: on_peer_failure(_parse_failure(text)))
    _peers.start()


def _meet(launch: Launch) -> Any:
    """Return the store of the group, a TCPStore, as soon as all processes have reached it.

    Raises:
        OpdctlError: they have not within MEETING_TIMEOUT.
    """
    from torch.distributed.rendezvous import rendezvous

    host = f"[{launch.master_addr}]" if ":" in launch.master_addr else launch.master_addr
    address = f"tcp://{host}:{launch.master_port}"
    try:
        store, _, _ = next(rendezvous(address, launch.rank, launch.world_size, timeout=MEETING_TIMEOUT))
    except RuntimeError as error:  # of torch's C++ code
        reason = " ".join(str(error).split())
        raise OpdctlError(
            "missing_peer",
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {address}: {reason}",
            hint="check that all processes run, and that their machines reach this address",
        ) from error
    return store


def _check_same_devices(store: "Store", launch: Launch, device: str) -> None:
    """Check that all ranks have a GPU, or none. Otherwise they would create groups that wait for each other."""
    store.set(f"device/{launch.rank}", device)
    devices = [store.get(f"device/{rank}").decode() for rank in range(launch.world_size)]
    store.set(f"knows devices/{launch.rank}", "")
    if launch.rank == 0:  # the store ends with rank 0
        store.wait([f"knows devices/{rank}" for rank in range(launch.world_size)])
    if without := [str(rank) for rank, device in enumerate(devices) if device != "cuda"]:
        if len(without) == launch.world_size:
            return
        raise OpdctlError(
            "missing_device",
            f"rank {', '.join(without)} of {launch.world_size} finds no GPU, the others do",
            hint='start as many processes on each machine as it has GPUs, or set pipeline.device = "cpu"',
        )


def destroy_process_group() -> None:
    """Destroy the process group. One that vLLM created in this process is left alone."""
    global _background_group, _control_group, _owns_process_group, _peers
    if _peers:
        _peers.stop()
        _peers = None
    if _owns_process_group:
        import torch

        # A sharded model is part of a reference cycle. If it outlives the process group, threads of gloo may abort.
        gc.collect()
        torch.distributed.destroy_process_group()
        _background_group, _control_group, _owns_process_group = None, None, False


def mesh(device: str, shard_size: int | None = None) -> "DeviceMesh":
    """Return the device mesh of all processes, over which a model is sharded. It may consist of a single process.

    shard_size: number of neighbouring processes that hold one copy of the model among them (default: all). The mesh
    then has the dimensions "replicate" and "shard".
    """
    import torch
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        global _owns_process_group
        backend, device_id = (CUDA_BACKEND, _select_gpu()) if device == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(
            backend, store=HashStore(), rank=0, world_size=1, timeout=MODEL_TIMEOUT, device_id=device_id
        )
        _owns_process_group = True
    if shard_size is None:
        return init_device_mesh(device, (world_size(),))
    shape = (world_size() // shard_size, shard_size)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


# ── GPUs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def visible_gpus() -> list[str] | None:
    """Return the GPUs that the launcher gave to this process, as in CUDA_VISIBLE_DEVICES; None for all.

    An engine in a separate process may use several, while this process uses one.
    """
    return _visible_gpus if _is_narrowed else _read_visible_gpus()


def _read_visible_gpus() -> list[str] | None:
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _narrow_to_one_gpu(launch: Launch) -> None:
    """Let this process see one GPU: every library's default, device 0, is then its own. Before CUDA is initialized.

    Raises:
        OpdctlError: there are fewer GPUs than processes.
    """
    global _visible_gpus, _is_narrowed
    visible, local = _read_visible_gpus(), launch.local_rank
    if visible == []:  # hidden on purpose
        return
    _visible_gpus, _is_narrowed = visible, True
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local)
        return
    # A launcher that gives one GPU to each process has chosen it.
    if local >= len(visible) and (launch.shares_gpus or len(visible) > 1):
        raise OpdctlError(
            "missing_device",
            f"local rank {local} has no GPU: CUDA_VISIBLE_DEVICES={','.join(visible)}",
            hint="start as many processes on each machine as it has GPUs",
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) else visible[0]


def _select_gpu() -> "torch.device":
    """Make the only GPU that this process sees the current one, and return it.

    A device mesh selects the GPU of number LOCAL_RANK, which does not exist here, unless CUDA is initialized.
    """
    import torch

    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Failure(NamedTuple):
    """What the first rank that failed has reported, and its exit code; if it `is_lost`, what another one noticed."""

    message: str
    exit_code: int
    is_lost: bool = False


def report_failure(message: str, exit_code: int) -> None:
    """Let the other ranks know why this one ends."""
    if _peers:
        _peers.report(f"{exit_code} rank {rank()} on {socket.gethostname()}: {message}")


def peer_failure() -> Failure | None:
    """Return what another rank reported before it ended, or None."""
    text = _peers.failure() if _peers else None
    return _parse_failure(text) if text else None


def _parse_failure(text: str) -> Failure:
    exit_code, _, message = text.partition(" ")
    return Failure(message, int(exit_code)) if exit_code.isdecimal() else Failure(text, ExitCode.FAILED, is_lost=True)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error only reports that another rank is gone."""
    return world_size() > 1 and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))


# ── Collectives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def control_group() -> "ProcessGroup | None":
    """Return the group of this thread's control collectives, or None for a single process.

    A background thread has its own: in one group, all ranks must call the collectives in the same order.
    """
    return _control_group if threading.current_thread() is threading.main_thread() else _background_group


def call_on_main(function: Callable[[], _T]) -> _T:
    """Call a function on rank 0 alone, and return its value on every rank.

    What depends on files is decided this way: the machines' views of a shared file system differ for a while.
    """
    if control_group() is None:
        return function()
    return broadcast_object(function() if is_main() else cast(_T, None))


def wait_until_visible(is_visible: Callable[[], bool], what: str) -> None:
    """Wait until this rank's view of the file system shows what rank 0's does.

    Raises:
        OpdctlError: it does not within VIEW_SECONDS.
    """
    start = time.monotonic()
    while not is_visible():
        if time.monotonic() - start > VIEW_SECONDS:
            raise OpdctlError(
                "missing_input",
                f"rank {rank()} on {socket.gethostname()} does not see {what}, which rank 0 does",
                hint="use an output directory that all machines share; docs/cluster.md has options to mount it",
            )
        time.sleep(0.2)


def broadcast_object(value: _T) -> _T:
    """Return the value of rank 0 on every rank."""
    if control_group() is None:
        return value
    import torch

    values: list[Any] = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=control_group(), device=torch.device("cpu"))
    return cast(_T, values[0])


def gather_objects(value: _T) -> list[_T]:
    """Return the values of all ranks, in order, on every rank."""
    if control_group() is None:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=control_group())
    return values


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_sum({})


def wait_for_end() -> None:
    """Wait, at the end of a command, until all ranks have finished: one that ends earlier would count as lost."""
    if _peers:
        barrier()


def all_reduce_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over all ranks, in float64. Every rank passes the same names."""
    if control_group() is None:
        return dict(values)
    import torch

    sums = torch.tensor([0.0, *(values[name] for name in sorted(values))], dtype=torch.float64)
    torch.distributed.all_reduce(sums, group=control_group())
    return dict(zip(sorted(values), sums.tolist()[1:], strict=True))


def full_tensor(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor, gathered from all ranks if it is sharded; then every rank must call this."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
