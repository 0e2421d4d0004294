"""What the machine offers: the device of a run, memory, file systems."""

from pathlib import Path

import pytest
import torch
from helpers.commands import small_recipe

from opdctl import environment
from opdctl.cli.session import set_up_device
from opdctl.environment import bfloat16_time_ratio, resolve_device, select_engine_gpus
from opdctl.errors import OpdctlError


def test_missing_device_is_rejected():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert resolve_device("auto") == "cpu"
    with pytest.raises(OpdctlError) as error:
        resolve_device("cuda")
    assert error.value.kind == "missing_device"


def test_search_for_a_gpu_does_not_initialize_cuda(monkeypatch):
    """`_cuda_getDeviceCount` initializes it, and a process that is forked later cannot use a GPU."""

    def initialize_cuda():
        pytest.fail("CUDA was initialized")

    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", initialize_cuda, raising=False)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
    assert resolve_device("auto") == "cuda"


NODE = [str(gpu) for gpu in range(8)]


@pytest.mark.parametrize(
    ("visible", "count", "owners"),
    [
        (NODE, 4, {0: ("0", "1", "2", "3"), 4: ("4", "5", "6", "7")}),
        (NODE, 2, {0: ("0", "1"), 2: ("2", "3"), 4: ("4", "5"), 6: ("6", "7")}),
        (NODE, 1, {rank: (str(rank),) for rank in range(8)}),
        (None, 4, {0: ("0", "1", "2", "3"), 4: ("4", "5", "6", "7")}),
        (["3", "GPU-a", "1", "0"], 2, {0: ("3", "GPU-a"), 2: ("1", "0")}),
        (NODE[:6], 4, {0: ("0", "1", "2", "3")}),  # the last two GPUs are no group
    ],
)
def test_first_rank_of_each_group_of_gpus_owns_its_engine(visible, count, owners):
    ranks = range(len(visible or NODE))
    found = {rank: select_engine_gpus(rank, visible, count) for rank in ranks}
    assert {rank: gpus for rank, gpus in found.items() if gpus} == owners


def test_gpu_that_the_launcher_chose_is_that_of_the_engine():
    assert select_engine_gpus(3, ["5"], 1) == ("5",)
    with pytest.raises(OpdctlError) as error:
        select_engine_gpus(3, ["5"], 4)
    assert error.value.kind == "missing_device"


def test_single_process_has_an_engine_on_the_first_gpus():
    assert select_engine_gpus(0, NODE, 2) == ("0", "1")
    assert select_engine_gpus(0, None, 1) == ("0",)


@pytest.mark.parametrize(
    ("ratio", "dtypes", "named"),
    [
        (40.0, ("bfloat16", "float32"), "set student.dtype to"),
        (40.0, ("bfloat16", "bfloat16"), "set student.dtype, teacher.dtype to"),
        (40.0, ("float32", "float32"), ""),
        (1.5, ("bfloat16", "bfloat16"), ""),
    ],
)
def test_slow_bfloat16_is_reported(monkeypatch, capsys, ratio, dtypes, named):
    monkeypatch.setattr(environment, "bfloat16_time_ratio", lambda: ratio)
    recipe = small_recipe(f"student.dtype={dtypes[0]}", f"teacher.dtype={dtypes[1]}")
    assert set_up_device(recipe) == "cpu"
    printed = " ".join(capsys.readouterr().err.split())
    assert ("bfloat16 products take 40 times as long as float32 ones" in printed) == bool(named)
    assert named in printed


def test_time_ratio_is_that_of_two_products():
    assert 0.05 < bfloat16_time_ratio() < 1000


# ── File systems ─────────────────────────────────────────────────────────────────────────────────────────────────────

MOUNT_LINES = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / {folder}/nfs rw,relatime - nfs4 server:/data rw,vers=4.2,sync
31 22 0:41 / {folder}/my\\040lustre rw - lustre mgs@tcp:/fs rw
32 22 8:2 / {folder}/waiting rw,sync,noatime - ext4 /dev/sdb1 rw
33 22 8:3 / {folder}/nfs/scratch rw - xfs /dev/sdc1 rw
34 22 8:4 / {folder}/hidden rw - ext4 /dev/sdd1 rw
35 34 0:42 / {folder}/hidden rw - beegfs beegfs_nodev rw
"""


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("", False),
        ("nfs", True),
        ("nfs/run", True),
        ("nfs-like", False),
        ("my lustre/run", True),
        ("waiting", True),
        ("nfs/scratch/run", False),
        ("hidden", True),
        ("link", True),
    ],
)
def test_writers_to_network_file_systems_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, expected: bool
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNT_LINES.format(folder=tmp_path))
    (tmp_path / "link").symlink_to(tmp_path / "nfs")
    monkeypatch.setattr(environment, "MOUNTS", tmp_path / "mountinfo")
    assert environment.waits_for_storage(tmp_path / directory) == expected


def test_no_writer_waits_where_the_system_lists_no_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "MOUNTS", tmp_path / "missing")
    assert not environment.waits_for_storage(tmp_path)


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control groups of a machine with 8 GiB of available memory; this process is in `job/step`."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    (tmp_path / "cgroup").write_text("1:name=systemd:/\n0::/job/step\n")
    (tmp_path / "groups/job/step").mkdir(parents=True)
    names = {"MEMORY": "meminfo", "CGROUP": "cgroup", "CGROUPS": "groups"}
    for constant, name in names.items():
        monkeypatch.setattr(environment, constant, tmp_path / name)
    return tmp_path / "groups"


def limit(group: Path, gib: str, used: int, cached: int) -> None:
    (group / "memory.max").write_text(gib if gib == "max" else str(int(gib) * GIB))
    (group / "memory.current").write_text(str(used * GIB))
    (group / "memory.stat").write_text(f"file 99\ninactive_file {cached * GIB}\nactive_file 0\n")


def test_available_memory_is_the_machines_without_a_limit(groups: Path) -> None:
    limit(groups / "job/step", "max", used=1, cached=0)
    assert environment.available_memory_bytes() == 8 * GIB


def test_available_memory_is_the_least_of_all_limits_with_cached_files(groups: Path) -> None:
    limit(groups / "job/step", "7", used=1, cached=0)
    limit(groups / "job", "6", used=5, cached=2)
    assert environment.available_memory_bytes() == 3 * GIB


def test_no_memory_is_available_beyond_a_limit_or_without_figures(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(groups / "job/step", "1", used=2, cached=0)
    assert environment.available_memory_bytes() == 0
    monkeypatch.setattr(environment, "MEMORY", groups / "missing")
    assert environment.available_memory_bytes() == 0
