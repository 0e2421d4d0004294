"""The program that grades model-generated code. code_execution.py starts it in namespaces without a network.

It imports nothing of opdctl. It reads one JSON object from stdin: a `task` of EvalPlus and a `response`. It writes one
to stdout: the `code` of the response and EvalPlus' `status`. EvalPlus runs the code in a child process. The child is
confined when it is forked and cannot write to this program's output.
"""

import contextlib
import json
import os
import re
import resource
import stat
import sys
from typing import Any

CODE_MEMORY_BYTES = 4 * 2**30  # address space
MAX_FILE_BYTES = 2**20
MAX_OPEN_FILES = 64
CODE_BLOCK_PATTERN = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


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

    The expected outputs are those of the task's canonical solution, on the original inputs and those of EvalPlus.
    """
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval import untrusted_check
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec
    from evalplus.sanitize import sanitize

    dataset, entry_point = task["dataset"], task["entry_point"]
    inputs = [*task["base_input"], *task["plus_input"]]
    if dataset == "mbpp":
        inputs = mbpp_deserialize_inputs(task["task_id"], inputs)
    blocks = CODE_BLOCK_PATTERN.findall(response)
    code = sanitize(blocks[-1] if blocks else response, entry_point)
    accepts_any_value = dataset == "mbpp" and entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
    expected, seconds = trusted_exec(
        task["prompt"] + task["canonical_solution"],
        inputs,
        entry_point,
        record_time=True,
        output_not_none=accepts_any_value,
    )
    status, _ = untrusted_check(dataset, code, inputs, entry_point, expected, task["atol"], seconds, fast_check=True)
    return {"code": code, "status": status}


if __name__ == "__main__":
    serve_request()
