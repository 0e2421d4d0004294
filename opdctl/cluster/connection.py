"""The connection to a Ray cluster, and the code that all of its nodes must have."""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import opdctl
from opdctl import console, signals
from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Pipeline

CONNECT_SECONDS = 10.0
CONTROL_CODES = re.compile(r"\x1b\[[0-9;]*m")  # colors
RAY_HINT = "check pipeline.ray_address, and that `ray status` works on this machine"


@contextlib.contextmanager
def connect(settings: Pipeline) -> Iterator[None]:
    """Be connected to a cluster in the block: that of `ray_address`, of RAY_ADDRESS, of this machine, or a new one.

    Raises:
        OpdctlError: Ray is not installed; there is no cluster at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        hint = "start the command on a node of the cluster: `ray job submit -- opdctl …`"
        raise OpdctlError("unavailable_cluster", f"{address} is the address of a client", hint=hint)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _quiet_raylets():
            _connect(ray, address)
            signals.install_handlers()  # instead of Ray's
            yield
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        OpdctlError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        hint = "run `pip install 'opdctl[ray]'` on every node"
        raise OpdctlError("missing_package", 'ray: pipeline.launcher is "ray"', hint=hint) from error
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect to the cluster at the address, if it is "" to that of this machine, and without one to a new one."""
    from ray._private.utils import read_ray_address

    found = address or read_ray_address() or ""
    if found and not _is_reachable(found):
        if address:
            raise OpdctlError("unavailable_cluster", f"{address}: no answer", hint=RAY_HINT)
        found = ""  # of a cluster that has ended
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not found:
        console.info("no Ray cluster on this machine: starting one")
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        ray.init(address=found, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:  # other versions of Ray or Python, for example
        raise OpdctlError("unavailable_cluster", f"{found}: {describe_failure(error)}", hint=RAY_HINT) from error


def _is_reachable(address: str) -> bool:
    """Whether something listens at the address. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _quiet_raylets() -> Iterator[None]:
    """Print what nodes report only with -v. Ray prints it on stdout, which may be read as JSON; what matters to a run
    reaches the terminal by a `Mailbox`."""
    from ray._private import worker

    print_lines = worker.print_to_stdstream
    worker.print_to_stdstream = lambda data, *_, **__: console.debug("\n".join(map(str, data.get("lines", ()))))
    try:
        yield
    finally:
        worker.print_to_stdstream = print_lines


def describe_failure(error: Exception) -> str:
    """Return the last line of an error of Ray, which is that of its cause on another node."""
    lines = [line.strip() for line in CONTROL_CODES.sub("", str(error)).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__


@cache
def code_identity() -> str:
    """Return the version of this package and the first digits of the digest of its source files."""
    root, digest = Path(opdctl.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{importlib.metadata.version('opdctl')} ({digest.hexdigest()[:12]})"


def check_code(expected: str) -> None:
    """Check that this node has the code of the process that started the command.

    Raises:
        OpdctlError: it has not.
    """
    if code_identity() != expected:
        raise OpdctlError(
            "version_mismatch",
            f"{socket.gethostname()} has opdctl {code_identity()}; the command was started with {expected}",
            hint="install the same version on every node",
        )


def enter_directory(path: Path) -> None:
    """Make `path` the working directory, to which paths of the recipe are relative.

    Raises:
        OpdctlError: this node does not have it.
    """
    try:
        os.chdir(path)
    except OSError as error:
        raise OpdctlError(
            "missing_file",
            f"{socket.gethostname()} does not have {path}, where the command was started: {error.strerror}",
            hint="start it in a directory that all nodes share",
        ) from error
