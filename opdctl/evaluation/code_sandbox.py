"""The program that runs model-generated code. code_walls.py starts it.

It imports nothing of opdctl, and knows neither expected values nor verdicts: whatever the code does to this process, it
can only change which values leave it. It reads one JSON object from stdin and writes JSON lines to stdout:

    ["started"]                 first
    ["code", code]              of EvalPlus: the code that its `sanitize` extracts from the response
    ["value", seconds, value]   for each input: the encoded return value, or what a program wrote to its stdout
    ["error"]                   the code raised an exception; no more inputs of the set are run
    ["end", status, exit code]  after each set of inputs; status: ended, crash or timeout; -N is signal N

A set of inputs has a separate process. Of LiveCodeBench, each test is one. Values are encoded by `encode` and decoded
by code_values.py.
"""

import ast
import collections
import contextlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

CODE_MEMORY_BYTES = 4 * 2**30  # address space
MAX_FILE_BYTES = 2**20
MAX_OPEN_FILES = 64
MAX_STDOUT_BYTES = 2**26
RESULT_FD = 3
EXCEPTION_CODE = 3  # exit code of a process whose program raised an exception
WAIT_SECONDS = 0.005  # between two looks whether the code has ended; Linux before 5.3 cannot wait with a limit
BUILTIN_BASES: tuple[Any, ...] = (int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
SEQUENCES: tuple[type, ...] = (list, tuple, set, frozenset, collections.deque, type({}.keys()))
MAPPINGS: tuple[type, ...] = (dict, collections.OrderedDict, collections.Counter, type({}.items()))


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def serve_request() -> None:
    """Run the code of the request on stdin."""
    request = json.load(sys.stdin)
    os.dup2(sys.stdout.fileno(), RESULT_FD)
    _emit(["started"])
    if "tests" in request:
        _serve_tests(request)
    else:
        _serve_task(request)


def _hide_standard_files() -> None:
    null_fd = os.open(os.devnull, os.O_RDWR)
    for standard_fd in range(3):
        os.dup2(null_fd, standard_fd)


def _serve_task(request: dict[str, Any]) -> None:
    """Run the function of a task of EvalPlus on each set of inputs."""
    # EvalPlus imports this package, in most of a second, for a data set that is not used here.
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    if request["code"] is None:
        request["code"] = extract_code(request["response"], request["entry_point"])
    _emit(["code", request["code"]])
    import evalplus.eval.utils  # noqa: F401 - once for all children

    _hide_standard_files()
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


# ── LiveCodeBench ────────────────────────────────────────────────────────────────────────────────────────────────────

STAR_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
"""The code may use the names of these modules without an import, as in `lcb_runner.evaluation.testing_util`."""
MAX_RECURSION = 50_000
"""Source: as above."""


def _serve_tests(request: dict[str, Any]) -> None:
    """Run the program, or its function, on each test."""
    names: dict[str, Any] = {}
    exec("".join(f"from {module} import *\n" for module in STAR_MODULES), names)
    exec(f"import {', '.join(STAR_MODULES)}", names)
    # A program may start a thread for a larger stack. Here it runs at once: no process can start others.
    threading.Thread.start = threading.Thread.run  # type: ignore[method-assign]
    threading.Thread.join = lambda *args: None  # type: ignore[method-assign]
    _hide_standard_files()
    run = _run_program if request["function"] is None else _run_function
    for test in request["tests"]:
        status, exit_code = run(request, names, test)
        if exit_code == EXCEPTION_CODE:
            _emit(["error"])
        _emit(["end", status, exit_code])


def _run_function(request: dict[str, Any], names: dict[str, Any], text: str) -> tuple[str, int]:
    """Let the function emit its value, and return how its process ended."""
    child = os.fork()
    if not child:
        _confine()
        _end_after(partial(_call_function, request, names, text))
    return _wait(child, request["limit"])


def _run_program(request: dict[str, Any], names: dict[str, Any], text: str) -> tuple[str, int]:
    """Run the program with `text` as its stdin, emit what it writes to stdout, and return how its process ended."""
    start = time.monotonic()
    input_fd, (read_fd, write_fd) = os.memfd_create("stdin"), os.pipe()
    with open(input_fd, "wb", closefd=False) as file:
        file.write(text.encode(errors="surrogatepass"))
    os.lseek(input_fd, 0, os.SEEK_SET)
    child = os.fork()
    if not child:
        os.dup2(input_fd, 0)
        os.dup2(write_fd, 1)
        os.close(RESULT_FD)
        _confine()
        _end_after(partial(_run_main, request["code"], names))
    os.close(input_fd)
    os.close(write_fd)
    output = _read_output(read_fd, start + request["limit"])
    os.close(read_fd)
    status, exit_code = _wait(child, start + request["limit"] - time.monotonic())
    if exit_code == 0:
        _emit(["value", time.monotonic() - start, output.decode(errors="replace")])
    return status, exit_code


def _read_output(fd: int, deadline: float) -> bytes:
    """Return what is written to a pipe until all of its writers have ended, or until the deadline."""
    poll, output = select.poll(), bytearray()
    poll.register(fd, select.POLLIN)
    while len(output) < MAX_STDOUT_BYTES and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        if not (chunk := os.read(fd, 2**16)):
            break
        output += chunk
    return bytes(output)


def _end_after(run: Callable[[], None]) -> None:
    """Call a function and end this process; its exit code is EXCEPTION_CODE if it raised an exception."""
    end_process = os._exit
    try:
        run()
    except BaseException:
        end_process(EXCEPTION_CODE)
    end_process(0)


def _run_main(code: str, names: dict[str, Any]) -> None:
    sys.stdin = os.fdopen(0, newline="\n", closefd=False)
    sys.stdout = os.fdopen(1, "w", newline="\n", closefd=False)
    sys.setrecursionlimit(MAX_RECURSION)
    namespace = names | {"__name__": "program"}
    exec(compile(_as_function(code), "program", "exec"), namespace)
    with contextlib.suppress(SystemExit):
        namespace["_main"]()
    sys.stdout.flush()


def _as_function(code: str) -> ast.Module:
    """Return a program whose statements, without the imports, are those of a function `_main`.

    LiveCodeBench runs programs in this form, and a final `if __name__ == '__main__':` as if it were not there.
    """
    statements = ast.parse(code).body
    last = statements[-1] if statements else None
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        statements[-1:] = last.body
    module = ast.parse("def _main(): pass")
    imports = [each for each in statements if isinstance(each, ast.Import | ast.ImportFrom)]
    module.body[0].body += [each for each in statements if each not in imports]  # type: ignore[attr-defined]
    module.body[:0] = imports
    return module


def _call_function(request: dict[str, Any], names: dict[str, Any], text: str) -> None:
    """Call the function, or the method of the class `Solution`, with one argument a line, and emit what it returns."""
    start = time.monotonic()
    sys.setrecursionlimit(MAX_RECURSION)
    namespace = names | {"__name__": "program"}
    exec(request["code"], namespace)
    owner = namespace["Solution"]() if "class Solution" in request["code"] else types.SimpleNamespace(**namespace)
    function = getattr(owner, request["function"])
    value = function(*map(json.loads, text.split("\n")))
    _emit(["value", time.monotonic() - start, encode(value)])


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
