"""Starts code_sandbox.py behind the walls of code_walls.py and reads its messages."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.evaluation import code_sandbox, code_walls
from opdctl.evaluation.code_values import MalformedValueError

MAX_SANDBOXES = 3
"""How often a response or a reference solution is run whose sandbox or process ended itself, by the code or by the
system. Then it counts as a crash. A sandbox is started as often; then the evaluation ends with an error."""
START_WAIT_SECONDS = 1.0
"""Between two starts of a sandbox."""
SPARE_OUTPUT_BYTES = 2**16
"""What a program may write beyond the size of its values."""
SYSTEM_PATHS = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/nix/store",
)
"""What Python needs besides its directories. The code can read these, and nothing else."""
SANDBOX_HINT = "use Linux as root or with user namespaces; in a container, allow it to make namespaces"


class TooLongError(Exception):
    """The code returned more than any correct answer has."""


def run_sandbox(
    request: dict[str, Any], max_bytes: int, seconds: float, errors: IO[bytes] | None = None
) -> Generator[list[Any]]:
    """Run a request in the sandbox and yield the messages of code_sandbox.py; closing ends the sandbox.

    Args:
        seconds: the time limit.
        errors: a file for what the walls write to stderr.

    Raises:
        OpdctlError: the sandbox does not start.
        subprocess.TimeoutExpired: it does not end in time.
        MalformedValueError: what it writes is not as code_sandbox.py writes it.
        TooLongError: it writes more than `max_bytes`.
    """
    with contextlib.ExitStack() as files:
        errors = errors or files.enter_context(tempfile.TemporaryFile())
        for attempt in range(MAX_SANDBOXES):
            time.sleep(START_WAIT_SECONDS * bool(attempt))
            with contextlib.closing(_start_sandbox(request, max_bytes, seconds, errors)) as messages:
                if next(messages, None) == ["started"]:
                    yield from messages
                    return
        lines = _lines(errors)
    raise OpdctlError(
        "missing_sandbox",
        f"this system cannot isolate model-generated code: {lines[-1] if lines else 'the sandbox ended at its start'}",
        hint=SANDBOX_HINT,
    )


def _start_sandbox(request: dict[str, Any], max_bytes: int, seconds: float, errors: IO[bytes]) -> Generator[list[Any]]:
    """Run a request in one sandbox and yield its messages."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="opdctl-sandbox-") as root, tempfile.TemporaryFile() as requests:
        requests.write(json.dumps(request).encode())
        requests.seek(0)
        paths = sorted({*SYSTEM_PATHS, *_python_paths()})
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", code_walls.__file__, root, code_sandbox.__file__, *paths],
            stdin=requests,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd="/",
            env={"PATH": os.defpath, "TMPDIR": "/tmp", "HOME": "/tmp", "OMP_NUM_THREADS": "1"},
        )
        try:
            yield from _messages(process, deadline, max_bytes)
            if process.wait(max(0.0, deadline - time.monotonic())):
                reason = "; ".join(_lines(errors)[-1:])
                console.debug(f"sandbox of {request['task_id']} ended with exit code {process.returncode}: {reason}")
        finally:
            process.kill()
            process.communicate()


def _lines(errors: IO[bytes]) -> list[str]:
    errors.seek(0)
    return errors.read().decode(errors="replace").splitlines()


def _messages(process: subprocess.Popen[bytes], deadline: float, max_bytes: int) -> Iterator[list[Any]]:
    assert process.stdout is not None
    output, num_bytes = process.stdout.fileno(), 0
    poll, line = select.poll(), bytearray()
    poll.register(output, select.POLLIN)
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise subprocess.TimeoutExpired(process.args, deadline)
        if not (chunk := os.read(output, 2**16)):
            return
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise TooLongError
        for part in chunk.splitlines(keepends=True):
            line += part
            if line.endswith(b"\n"):
                yield _parse_message(bytes(line))
                line.clear()


def _parse_message(line: bytes) -> list[Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedValueError(str(error)) from None
    if not isinstance(message, list) or not message:
        raise MalformedValueError("not a message")
    return message


def _python_paths() -> Iterator[str]:
    """Yield the directories of this Python."""
    yield from (sys.prefix, sys.base_prefix)
    executable = Path(sys.executable)
    while executable.is_symlink():
        executable = Path(os.path.normpath(executable.parent / executable.readlink()))
        yield str(executable.parent)


def check_sandbox(request: dict[str, Any], expected: list[Any], seconds: float) -> None:
    """Run a request whose values are known, and say which wall is missing if they do not arrive.

    Raises:
        OpdctlError: they do not.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            with contextlib.closing(run_sandbox(request, SPARE_OUTPUT_BYTES, seconds, errors)) as messages:
                values = [message[2] for message in messages if message[0] == "value"]
            reason = "a program returned wrong values in it"
        except (OSError, subprocess.TimeoutExpired, MalformedValueError) as error:
            values, reason = [], str(error)
        lines = _lines(errors)
    if values != expected:
        raise OpdctlError(
            "missing_sandbox",
            f"this system cannot isolate model-generated code: {lines[-1] if lines else reason}",
            hint=SANDBOX_HINT,
        )
    for line in lines:
        if line.startswith(code_walls.WARNING_PREFIX):
            console.warn(line.removeprefix(code_walls.WARNING_PREFIX))
