"""Process groups of two: their GPUs, by a stand-in for torch.cuda, their timeouts and their views of files.

NCCL needs GPUs, so gloo takes its place.
"""

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from helpers.ranks import call_in_ranks, rank_variables
from torch._C._distributed_c10d import TCPStore
from torch.distributed import rendezvous

from opdctl import distributed
from opdctl.errors import OpdctlError

GPUS_OF_MACHINE = 2
TORCHRUN = {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


def two_tasks(*visible: str) -> list[dict[str, str]]:
    """Return the variables of two tasks of Slurm with these GPUs."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}
    return [
        {**step, **{name: str(task) for name in ("SLURM_PROCID", "SLURM_LOCALID")}, "CUDA_VISIBLE_DEVICES": gpus}
        for task, gpus in enumerate(visible)
    ]


# ── GPUs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class PretendCuda:
    """torch.cuda of a machine with GPUS_OF_MACHINE GPUs: what a device mesh and a process group call."""

    def __init__(self) -> None:
        self.selected: list[int] = []

    def install(self) -> None:
        for name in ("is_available", "is_initialized", "device_count", "set_device"):
            setattr(torch.cuda, name, getattr(self, name))

    def is_available(self) -> bool:
        return self.device_count() > 0

    def is_initialized(self) -> bool:
        return bool(self.selected)

    def device_count(self) -> int:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        return len([name for name in names if name and not (name.isdecimal() and int(name) >= GPUS_OF_MACHINE)])

    def set_device(self, device: int) -> None:
        if device >= self.device_count():
            raise RuntimeError("CUDA error: invalid device ordinal")
        self.selected.append(device)


def find_gpu() -> dict[str, Any]:
    """Join the group and build a mesh, as a sharded model does; return the GPU that this rank got."""
    cuda, init, bound = PretendCuda(), torch.distributed.init_process_group, []
    cuda.install()
    distributed.CUDA_BACKEND = "gloo"

    def init_without_gpu(*arguments: Any, device_id: torch.device | None = None, **options: Any) -> None:
        bound.append(device_id)
        init(*arguments, **options)

    torch.distributed.init_process_group = init_without_gpu
    distributed.init_process_group(use_gpu=True, on_peer_failure=print)
    mesh = distributed.mesh("cuda" if cuda.is_available() else "cpu")
    return {
        "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        "selected": cuda.selected,
        "bound": [None if device is None else str(device) for device in bound],
        "all": distributed.visible_gpus(),
        "mesh": (mesh.device_type, mesh.size()),
    }


def gpu(visible: str, every: list[str] | None) -> dict[str, Any]:
    return {"visible": visible, "selected": [0], "bound": ["cuda:0"], "all": every, "mesh": ("cuda", 2)}


@pytest.mark.parametrize(
    ("environments", "expected"),
    [
        (rank_variables(2, **TORCHRUN), [gpu("0", None), gpu("1", None)]),
        (rank_variables(2, **TORCHRUN, CUDA_VISIBLE_DEVICES="1,0"), [gpu("1", ["1", "0"]), gpu("0", ["1", "0"])]),
        (
            rank_variables(2, **TORCHRUN, CUDA_VISIBLE_DEVICES="GPU-a, GPU-b"),
            [gpu("GPU-a", ["GPU-a", "GPU-b"]), gpu("GPU-b", ["GPU-a", "GPU-b"])],
        ),
        (two_tasks("0,1", "0,1"), [gpu("0", ["0", "1"]), gpu("1", ["0", "1"])]),
        (two_tasks("0", "0"), [gpu("0", ["0"]), gpu("0", ["0"])]),
        (two_tasks("0", "1"), [gpu("0", ["0"]), gpu("1", ["1"])]),
    ],
    ids=["all visible", "a list", "names", "Slurm, all", "Slurm, one of its own", "Slurm, one by number"],
)
def test_each_rank_selects_its_own_gpu_before_a_mesh_does(environments, expected):
    """A device mesh would select the GPU of number LOCAL_RANK, and each rank sees one GPU, of number 0."""
    assert (
        call_in_ranks(find_gpu, [{"LOCAL_RANK": str(rank), **each} for rank, each in enumerate(environments)])
        == expected
    )


def test_hidden_gpus_remain_hidden():
    for result in call_in_ranks(find_gpu, rank_variables(2, **TORCHRUN, CUDA_VISIBLE_DEVICES="")):
        assert result == {"visible": "", "selected": [], "bound": [None], "all": [], "mesh": ("cpu", 2)}


def test_more_processes_than_gpus_are_an_error():
    results = call_in_ranks(find_gpu_or_stop, rank_variables(2, **TORCHRUN, CUDA_VISIBLE_DEVICES="1"))
    assert results == ["joining", ("missing_device", "local rank 1 has no GPU: CUDA_VISIBLE_DEVICES=1")]


def find_gpu_or_stop() -> str:
    """Return before the group is created unless this rank's GPUs are an error."""
    distributed._narrow_to_one_gpu(distributed.read_launch(os.environ))
    return "joining"


def test_ranks_with_and_without_a_gpu_do_not_wait_for_each_other():
    """CUDA_VISIBLE_DEVICES is not set, and the second of two tasks gets the GPU of number 5, which does not exist."""
    environments = rank_variables(2)
    environments[1]["LOCAL_RANK"] = "5"
    for kind, detail in call_in_ranks(find_gpu, environments):
        assert (kind, detail) == ("missing_device", "rank 1 of 2 finds no GPU, the others do")


# ── Timeouts and the interface of torch ──────────────────────────────────────────────────────────────────────────────


def find_timeouts() -> dict[str, float]:
    distributed.init_process_group(use_gpu=False, on_peer_failure=print)
    groups = {"default": torch.distributed.group.WORLD, "control": distributed._control_group}
    backends = {name: group._get_backend(torch.device("cpu")) for name, group in groups.items()}
    used = []
    for name in ("broadcast_object_list", "all_gather_object", "all_reduce"):
        collective = getattr(torch.distributed, name)

        def recorded(*arguments: Any, group: Any = None, collective=collective, **options: Any) -> Any:
            used.append(group is distributed._control_group)
            return collective(*arguments, group=group, **options)

        setattr(torch.distributed, name, recorded)
    distributed.broadcast_object(1), distributed.gather_objects(1), distributed.barrier()
    assert used == [True, True, True]
    return {name: backend.options._timeout.total_seconds() for name, backend in backends.items()}


def test_only_the_control_group_waits_for_a_day():
    """A rank that is lost in a collective of the model is known after 15 minutes, not after a day."""
    assert call_in_ranks(find_timeouts, rank_variables(2)) == [{"default": 900.0, "control": 86400.0}] * 2


def test_torch_has_the_store_that_the_watch_of_peers_uses():
    """tests/unit/test_gpu_contracts.py has the arguments of groups and the rule of a device mesh."""
    assert {"clone", "compare_set", "check", "set", "get"} <= set(dir(TCPStore))
    assert "_torchelastic_use_agent_store" in inspect.getsource(inspect.getmodule(rendezvous)._create_c10d_store)


# ── Views of files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_rank_0_decides_and_the_others_wait_for_its_files(tmp_path: Path):
    """Rank 1 sees the file of rank 0 only after five looks, as on NFS, and never makes the decision itself."""

    def decide() -> tuple[bool, int]:
        looks = []
        path = tmp_path / "answer"

        def exists() -> bool:
            looks.append(path)
            return path.exists() and (distributed.is_main() or len(looks) > 5)

        distributed.init_process_group(use_gpu=False, on_peer_failure=print)
        if distributed.is_main():
            path.touch()
        answer = distributed.call_on_main(exists)
        before_waiting = len(looks)
        distributed.wait_until_visible(exists, "the answer")
        return answer, before_waiting, len(looks)

    assert call_in_ranks(decide, rank_variables(2)) == [(True, 1, 2), (True, 0, 6)]


def test_file_that_another_machine_never_sees_is_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "VIEW_SECONDS", 0.0)
    with pytest.raises(OpdctlError) as raised:
        distributed.wait_until_visible(lambda: False, "runs/a/run.json")
    assert raised.value.kind == "missing_input"
    assert "runs/a/run.json" in raised.value.detail
