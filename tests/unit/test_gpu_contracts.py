"""What the code assumes of torch on a GPU, checked against the installed torch: names, parameters, and conditions.

Machines without a GPU run none of these calls. `tests/acceptance/test_vllm_gpu_contracts.py` does the same for vLLM.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import torchgen
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from opdctl.errors import is_out_of_memory
from opdctl.training.policy import ALLOCATOR_VARIABLES

PACKAGE = Path(__file__).parents[2] / "opdctl"


def names_used(*modules: str) -> list[str]:
    """Return the attributes of these modules that the package's code names in full, such as `torch.cuda.set_device`."""
    names = {
        ast.unparse(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    return sorted(name for name in names if name.startswith(tuple(f"{module}." for module in modules)))


@pytest.mark.parametrize("name", names_used("torch.cuda", "torch.accelerator", "torch.backends"))
def test_name_exists(name):
    target = torch
    for attribute in name.split(".")[1:]:
        target = getattr(target, attribute)


def test_segments_of_the_allocator_can_be_expandable():
    variables = Path(torch.__file__).parent / "include/c10/cuda/CUDAAllocatorConfig.h"
    assert all(f'"{name}"' in variables.read_text() for name in ALLOCATOR_VARIABLES)
    with pytest.raises(ValueError, match="'True' or 'False'"):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:on")
    for value in (True, False):
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{value}")


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.usefixtures("process_group")
def test_mesh_selects_the_device_of_the_local_rank_unless_cuda_is_initialized(monkeypatch, is_initialized):
    """A process that sees one GPU therefore selects it before: `LOCAL_RANK` is no valid index there."""
    selected = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setenv("LOCAL_RANK", "5")
    init_device_mesh("cuda", (1,))
    assert selected == ([] if is_initialized else [5])


def test_device_of_a_process_group_is_an_index_of_a_visible_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for device, reason in (("cuda:5", "out of range"), ("cuda", "with index")):
        with pytest.raises(ValueError, match=reason):
            torch.distributed.init_process_group(
                "gloo", store=HashStore(), rank=0, world_size=1, device_id=torch.device(device)
            )
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (torch.distributed.init_process_group, {"backend", "timeout", "device_id"}),
        (torch.distributed.new_group, {"backend", "timeout"}),
        (fully_shard, {"mesh", "mp_policy", "offload_policy"}),
        (torch.cuda.graph, {"cuda_graph", "capture_error_mode"}),
        (FSDPModule.set_gradient_divide_factor, {"factor"}),
        (FSDPModule.set_force_sum_reduction_for_comms, {"enable"}),
        (varlen_attn, {"cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa"}),
    ],
)
def test_function_has_parameters(function, parameters):
    assert parameters <= inspect.signature(function).parameters.keys()


def test_policies_of_fsdp_have_their_fields():
    assert "pin_memory" in {field.name for field in dataclasses.fields(CPUOffloadPolicy)}
    assert {"param_dtype", "reduce_dtype"} <= {field.name for field in dataclasses.fields(MixedPrecisionPolicy)}


def test_grouped_query_attention_has_no_float32_kernel():
    """Of the two kernels that it has on CUDA, flash attention is for 16 bits."""
    documentation = " ".join((torch.nn.functional.scaled_dot_product_attention.__doc__ or "").split())
    assert "works only for Flash_attention and math kernel on CUDA tensor" in documentation


def test_fused_adamw_supports_cuda():
    assert "cuda" in _get_fused_kernels_supported_devices()


def test_out_of_memory_of_cuda_is_recognized():
    message = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB"
    assert is_out_of_memory(torch.cuda.OutOfMemoryError(message))


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_products_of_16_bit_matrices_can_have_a_float32_result(name):
    """torch declares these kernels for CUDA, and none for the CPU. The trainer passes both arguments together."""
    declared = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    _, _, kernels = declared.partition(f"- func: {name}.dtype_out(")
    kernels = kernels.split("- func: ")[0]
    assert f"CUDA: _{name}_dtype_out_cuda" in kernels
    assert "CPU" not in kernels
    arguments = [argument.name for argument in getattr(torch.ops.aten, name).dtype_out._schema.arguments]
    assert {"out_dtype", "out"} <= set(arguments)
    operands = [torch.ones(1, 1)] + [torch.ones(1, 1, dtype=torch.bfloat16)] * 2
    with pytest.raises(NotImplementedError, match=rf"aten::{name}\.dtype"):
        getattr(torch, name)(*operands[-2 if name == "mm" else 0 :], out_dtype=torch.float32, out=operands[0])


def test_fsdp_recovers_from_an_error_within_a_pass():
    assert list(inspect.signature(FSDPModule.reset_iter_state).parameters) == ["self"]
