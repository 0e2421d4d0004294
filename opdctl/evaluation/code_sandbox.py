"""The program that runs model-generated code. code_walls.py starts it.

It imports nothing of opdctl, and knows neither expected values nor verdicts: whatever the code does to this process, it
can only change which values leave it. It reads one JSON object from stdin and writes JSON lines to stdout:

    ["started"]                 first
    ["code", code]              the code that EvalPlus' `sanitize` extracts from the response
    ["value", seconds, value]   for each input: the encoded return value
    ["error"]                   the code raised an exception; no more inputs are run
    ["end", status, exit code]  after each set of inputs; status: ended, crash or timeout; -N is signal N

Values are encoded by `encode` and decoded by code_values.py.
"""

import collections
import json
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

CODE_MEMORY_BYTES = 4 * 2**30  # address space
MAX_FILE_BYTES = 2**20
MAX_OPEN_FILES = 64
RESULT_FD = 3
WAIT_SECONDS = 0.005  # between two looks whether the code has ended; Linux before 5.3 cannot wait with a limit
BUILTIN_BASES: tuple[Any, ...] = (int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset, collections.deque, type({}.keys()))
MAPPINGS: tuple[type, ...] = (dict, collections.OrderedDict, collections.Counter, type({}.items()))


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def serve_request() -> None:
    """Run the code of the request on stdin."""
    # EvalPlus imports this package, in most of a second, for a data set that is not used here.
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    request = json.load(sys.stdin)
    os.dup2(sys.stdout.fileno(), RESULT_FD)
    _emit(["started"])
    if request["code"] is None:
        request["code"] = extract_code(request["response"], request["entry_point"])
    _emit(["code", request["code"]])
    import evalplus.eval.utils  # noqa: F401 - once for all children

    null_fd = os.open(os.devnull, os.O_RDWR)
    for standard_fd in range(3):
        os.dup2(null_fd, standard_fd)
    input_sets = _inputs(request)
    del sys.modules["datasets"]
    for inputs, limits in zip(input_sets, request["limits"], strict=True):
        child = os.fork()
        if not child:
            _confine()
            _run_inputs(request, inputs, limits)
        _emit(["end", *_wait(child, request["total_limit"] or min(60, sum(limits)) + 2)])


def _inputs(request: dict[str, Any]) -> list[Any]:
    if request["dataset"] != "mbpp":
        return request["inputs"]
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    return [mbpp_deserialize_inputs(request["task_id"], inputs) for inputs in request["inputs"]]


def _wait(child: int, seconds: float) -> tuple[str, int]:
    """Return how the process ended, after `seconds` by force, and its exit code."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", -signal.SIGKILL
        time.sleep(WAIT_SECONDS)
    return "crash" if ended[1] else "ended", os.waitstatus_to_exitcode(ended[1])


def _confine() -> None:
    """Limit the resources of this process irrevocably. RLIMIT_NPROC 0 forbids further processes and threads."""
    os.closerange(RESULT_FD + 1, MAX_OPEN_FILES)
    limits = {
        resource.RLIMIT_AS: CODE_MEMORY_BYTES,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _run_inputs(request: dict[str, Any], inputs: Sequence[Any], limits: Sequence[float]) -> None:
    """Call the function on each input, as `evalplus.eval.unsafe_execute` does, and end this process."""
    from evalplus.eval.utils import create_tempdir, reliability_guard, swallow_io, time_limit

    end_process = os._exit
    with create_tempdir():
        reliability_guard(CODE_MEMORY_BYTES)
        names: dict[str, Any] = {}
        try:
            with swallow_io():
                exec(request["code"], names)
                function = names[request["entry_point"]]
            for arguments, limit in zip(inputs, limits, strict=True):
                start = time.perf_counter()
                with time_limit(limit), swallow_io():
                    value = function(*arguments)
                    seconds = time.perf_counter() - start
                    encoded = encode(list(value) if request["as_set"] and is_opaque(value) else value)
                _emit(["value", seconds, encoded])
        except BaseException:
            _emit(["error"])
        end_process(0)


def _emit(message: Any) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(RESULT_FD, data) :]


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(value: Any) -> Any:
    """Return a value as JSON: None, bool, float, str and small int as they are, others as [type, contents…].

    An object of an unknown type is ["object"], which equals nothing.
    """
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -(2**63) < value < 2**63 else ["int", hex(value)]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is range:
        return ["range", *map(encode, (value.start, value.stop, value.step))]
    if kind in SEQUENCES:
        return [kind.__name__, [encode(item) for item in value]]
    if kind in MAPPINGS:
        pairs = value if kind is MAPPINGS[-1] else dict.items(value)
        return [kind.__name__, [[encode(key), encode(item)] for key, item in pairs]]
    if (getattr(kind, "__module__", None), kind.__name__) in (("fractions", "Fraction"), ("decimal", "Decimal")):
        return [kind.__name__, str(value)]
    return _encode_numpy(value) or _encode_subclass(value) or ["object"]


def is_opaque(value: Any) -> bool:
    """Whether `encode` does not look into the value, as into a generator."""
    return not isinstance(value, BUILTIN_BASES) and encode(value) == ["object"]


def _encode_numpy(value: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic | numpy.ndarray) or value.dtype.kind not in "biufcUO":
        return None
    shape = list(value.shape) if isinstance(value, numpy.ndarray) else None
    dtype = value.dtype.kind if value.dtype.kind in "UO" else value.dtype.str
    return ["numpy", dtype, shape, [encode(item) for item in value.reshape(-1).tolist()]]


def _encode_subclass(value: Any) -> Any:
    for base in BUILTIN_BASES:
        if isinstance(value, base):
            # str() of an Enum is its name
            return ["subclass", encode(str.__str__(value) if base is str else base(value))]
    return None


# ── Extraction ───────────────────────────────────────────────────────────────────────────────────────────────────────


def extract_code(response: str, entry_point: str) -> str:
    """Return what `evalplus.sanitize` writes for a response."""
    from evalplus import sanitize

    sanitize.code_extract = longest_valid_lines
    return sanitize.sanitize(response, entry_point)


def longest_valid_lines(text: str) -> str:
    """Return what `evalplus.sanitize.code_extract` returns: the first longest run of lines that is valid Python.

    The length of a run is the number of its lines that are not blank. A run that is not longer than one already found
    is not parsed. EvalPlus parses every run: 400 lines of valid code take it a minute, 1,600 take hours.
    """
    from evalplus.syncheck import syntax_check

    lines = text.split("\n")
    filled_before = [0, *accumulate(bool(line.strip()) for line in lines)]
    first, last, longest = 0, 0, 0
    for start in range(len(lines)):
        for end in range(start + 1, len(lines)):
            length = filled_before[end + 1] - filled_before[start]
            if length > longest and syntax_check("\n".join(lines[start : end + 1])):
                first, last, longest = start, end, length
    return "\n".join(lines[first : last + 1])


if __name__ == "__main__":
    serve_request()
