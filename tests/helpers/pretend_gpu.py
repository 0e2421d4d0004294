"""A pretend GPU for torch without CUDA: tensors that say they are on another device and hold values of the CPU.

As on CUDA, tensors of two devices cannot be mixed, `.numpy()` is an error, and only a copy moves values. So code
without `.to(device)` or `.cpu()` where CUDA requires it fails, and other code computes what the CPU computes.
Kernels, memory, streams and collectives are not emulated. FSDP2 runs with a mesh of one; `emulate_fsdp` replaces how it
allocates, frees and moves parameters. A product of 16-bit matrices with a float32 result is that of the same numbers in
float32.

A device is registered for an entire process, so tests call functions in another process. torch itself registers it
there and in that process's children, by the entry point of a package that `process_with_pretend_gpu` writes. This uses
private names of torch, and is therefore limited to the tested version.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

TESTED_TORCH = "2.13."
CPU = torch.device("cpu")
DEVICE = "npu"  # a name of PrivateUse1 that safetensors knows

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that accept indices of the CPU, as on CUDA."""
FLOAT32_RESULTS = {
    aten.mm.dtype: aten.mm.default,
    aten.mm.dtype_out: aten.mm.out,
    aten.addmm.dtype_out: aten.addmm.out,
}
"""Products of 16-bit matrices with a float32 result, which a CPU does not have, and those in float32."""
everything = torch.library.Library("_", "IMPL")


class DeviceTensor(torch.Tensor):
    """A tensor on the device. `values` is the tensor of the CPU that it stands for, with the same size and strides."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "DeviceTensor":
        with torch.inference_mode(False):  # an inference tensor could not share the version counter of its base
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=torch.device(DEVICE, 0),
            )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, *args, **(kwargs or {}))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Let torch.compile see what a tensor of the device consists of."""
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> "DeviceTensor":
        return DeviceTensor(inner["values"])

    def __repr__(self) -> str:
        return f"DeviceTensor({self.values})"

    def tolist(self) -> Any:
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE}:0 device type tensor to numpy")


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device on the values, and return its result on the device that it asks for."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    check_devices(operation, args, tensors)
    if operation is aten._fused_sdp_choice.default:
        return torch.nn.attention.SDPBackend.MATH.value
    of_values = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
    to_cpu = CPU in leaves or (operation is aten.copy_.default and not isinstance(args[0], DeviceTensor))
    args, kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.values, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda device: CPU, (args, kwargs))
    kwargs.pop("pin_memory", None)
    if operation in FLOAT32_RESULTS:
        *operands, dtype = args
        check_float32_result(operands, dtype, kwargs)
        operation, args = FLOAT32_RESULTS[operation], [operand.float() for operand in operands]
    result = operation(*args, **kwargs)

    def wrap(values: torch.Tensor) -> DeviceTensor:  # an operation in place returns its argument
        return of_values[id(values)] if id(values) in of_values else DeviceTensor(values)

    return result if to_cpu else tree_map_only(torch.Tensor, wrap, result)


def check_devices(operation: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError if CUDA would refuse the devices of an operation's tensors. Scalars may be on the CPU."""
    if operation in INDEXING and isinstance(args[0], DeviceTensor):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]  # without the list of indices
    on_device = [isinstance(tensor, DeviceTensor) for tensor in tensors if tensor.dim() > 0]
    if operation not in COPIES and any(on_device) and not all(on_device):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {operation} has {DEVICE}:0 and cpu")


def check_float32_result(operands: list[torch.Tensor], dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if CUDA would refuse the dtypes of a product of 16-bit matrices with a float32 result."""
    *sums, left, right = operands
    results = [tensor for tensor in [*sums, kwargs.get("out")] if tensor is not None]
    if left.dtype != right.dtype or left.dtype not in (torch.bfloat16, torch.float16) or dtype != torch.float32:
        raise RuntimeError(f"no product of {left.dtype} and {right.dtype} as {dtype}")
    if any(tensor.dtype != torch.float32 for tensor in results):
        raise RuntimeError("the result of such a product must be float32")


class Stream(torch.cpu.Stream):
    def synchronize(self) -> None:
        pass


STREAM = Stream()


class Backend:
    """The functions of `torch.npu` that torch calls."""

    Stream, Event = torch.cpu.Stream, torch.cpu.Event

    def current_stream(self) -> Any:
        return STREAM

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def emulate_fsdp() -> None:
    """Replace what FSDP2 does to the memory of tensors: a tensor of the device has none of its own."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fsdp_param, _fsdp_param_group

    for module in (_fsdp_param, _fsdp_param_group):
        module.alloc_storage = partial(_resize, module.alloc_storage)
    _fsdp_param.free_storage = partial(_resize, _fsdp_param.free_storage)
    _fsdp_init._move_states_to_device = _move_states
    reset = _fsdp_param.FSDPParam.reset_sharded_param
    _fsdp_param.FSDPParam.reset_sharded_param = lambda parameter: _without_swaps(reset, parameter)


def _without_swaps(function: Callable[[Any], None], argument: Any) -> None:
    """Call a function that refuses replaced parameters if `module.to` would swap them."""
    torch.__future__.set_swap_module_params_on_conversion(False)
    function(argument)
    torch.__future__.set_swap_module_params_on_conversion(True)


def _resize(resize: Callable[[torch.Tensor], None], tensor: torch.Tensor) -> None:
    resize(tensor.values if isinstance(tensor, DeviceTensor) else tensor)


def _move_states(params: list[torch.Tensor], buffers: list[torch.Tensor], device: torch.device) -> None:
    """Move tensors to the device. Otherwise FSDP2 assigns to `.data`, which refuses a tensor of another class."""
    for tensor in [*params, *buffers]:
        if tensor.device.type == "cpu":
            moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            torch.utils.swap_tensors(tensor, torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved)


def register() -> None:
    """Register the device in this process. torch calls it when it is imported."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Backend())
    everything.fallback(run, "PrivateUse1")  # for operations without a tensor of the device, such as torch.zeros
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=DEVICE) makes a tensor of the CPU, then copies
    torch.__future__.set_swap_module_params_on_conversion(True)  # otherwise `module.to(DEVICE)` unties tied weights


@contextlib.contextmanager
def process_with_pretend_gpu(folder: Path) -> Iterator[Callable[..., Any]]:
    """Yield a caller: `call(function, *arguments)` calls a function of a module in a process that has the device."""
    package = folder / "pretend_gpu-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: pretend-gpu\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[torch.backends]\n{DEVICE} = {__name__}:register\n")
    load_torch = (import_module, ("torch",))  # before this module, which torch imports
    with (
        mock.patch.object(sys, "path", [*sys.path, str(folder)]),
        ProcessPoolExecutor(1, get_context("spawn"), *load_torch) as pool,
    ):
        pool.submit(emulate_fsdp).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
