"""The device of a run."""

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
