"""Measurements in new processes, and the memory of a process.

The memory is not that of getrusage: the peak there of a process that began as a copy of another is the other's, also
after it has started its own program.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def run_in_new_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function in a process whose peak memory is that of the call."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes() -> int:
    return _read_memory("VmRSS")


def peak_bytes() -> int:
    """Return the largest resident size since the start of the program, or since `reset_peak`."""
    return _read_memory("VmHWM")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _read_memory(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
