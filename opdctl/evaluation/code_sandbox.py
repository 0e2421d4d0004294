"""The program that grades model-generated code. code_execution.py starts it in namespaces without a network.

It imports nothing of opdctl. It reads one JSON object from stdin: a `task` of EvalPlus and a `response`. It writes one
to stdout: the `code` of the response and EvalPlus' `status`, which are those of the commands `evalplus.sanitize` and
`evalplus.evaluate`. EvalPlus runs the code in a child process. The child is confined when it is forked and cannot write
to this program's output.
"""

import contextlib
import json
import os
import resource
import stat
import sys
from itertools import accumulate
from typing import Any

CODE_MEMORY_BYTES = 4 * 2**30  # address space
MAX_FILE_BYTES = 2**20
MAX_OPEN_FILES = 64
MIN_TIME_LIMIT_SECONDS = 10.0
"""Time limit of one input, at least. RUCBM/G-OPD, on which the authors' code is built, evaluates with
`--min-time-limit 10.0 --gt-time-limit-factor 8.0`; EvalPlus 0.3.1 has 1 and 4."""
GT_TIME_LIMIT_FACTOR = 8.0
"""Time limit of one input, as a multiple of the time of the reference solution. Source: as above."""


def serve_request() -> None:
    """Grade the request on stdin and write the result to stdout."""
    request = json.load(sys.stdin)
    result_fd = os.dup(sys.stdout.fileno())
    null_fd = os.open(os.devnull, os.O_RDWR)
    for standard_fd in range(3):
        os.dup2(null_fd, standard_fd)
    os.register_at_fork(after_in_child=lambda: _confine(result_fd))
    os.write(result_fd, json.dumps(check_response(request["task"], request["response"])).encode())


def _confine(result_fd: int) -> None:
    """Limit the resources of this process irrevocably. RLIMIT_NPROC 0 forbids further processes and threads."""
    os.close(result_fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        # EvalPlus' shared memory for the result is a file, too. A pipe signals the end of the process.
        with contextlib.suppress(OSError):
            if fd > 2 and not stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.close(fd)
    limits = {
        resource.RLIMIT_AS: CODE_MEMORY_BYTES,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def check_response(task: dict[str, Any], response: str) -> dict[str, str]:
    """Return the code in a response, and EvalPlus' status: pass, fail or timeout.

    The expected outputs are those of the task's canonical solution. As in `evalplus.evaluate`, the original inputs and
    those of EvalPlus are two checks, each in a new process with its own time limit.
    """
    from evalplus import sanitize
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval import untrusted_check
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec

    sanitize.code_extract = longest_valid_lines
    dataset, entry_point = task["dataset"], task["entry_point"]
    code = sanitize.sanitize(response, entry_point)
    status = "pass"
    for key in ("base_input", "plus_input"):
        inputs = mbpp_deserialize_inputs(task["task_id"], task[key]) if dataset == "mbpp" else task[key]
        expected, seconds = trusted_exec(
            task["prompt"] + task["canonical_solution"],
            inputs,
            entry_point,
            record_time=True,
            output_not_none=dataset == "mbpp" and entry_point in MBPP_OUTPUT_NOT_NONE_TASKS,
        )
        arguments = (dataset, code, inputs, entry_point, expected, task["atol"], seconds)
        limits = {"min_time_limit": MIN_TIME_LIMIT_SECONDS, "gt_time_limit_factor": GT_TIME_LIMIT_FACTOR}
        status, _ = untrusted_check(*arguments, fast_check=True, **limits)
        if status != "pass":
            break
    return {"code": code, "status": status}


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
