"""What runs a model's code: a program of its own, started by execution.py in namespaces without a network. It knows
nothing of opdctl.

Reads one JSON object from stdin: a `task` as EvalPlus gives it, and a `response`. Writes one to stdout: the code that
was read from the response, and EvalPlus' verdict on it. EvalPlus runs the code in a process of its own, which is
confined when it is forked and has no way to this program's output.
"""

import contextlib
import json
import os
import re
import resource
import stat
import sys
from typing import Any

MEMORY = 4 * 2**30  # bytes of address space
FILE = 2**20  # bytes of any file
OPEN_FILES = 64
FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def main() -> None:
    asked = json.load(sys.stdin)
    results = os.dup(sys.stdout.fileno())
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.register_at_fork(after_in_child=lambda: _confine(results))
    os.write(results, json.dumps(judge(asked["task"], asked["response"])).encode())


def _confine(results: int) -> None:
    """Bound what the process may use, for good. RLIMIT_NPROC 0: it can make no process and no thread."""
    os.close(results)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # The memory in which EvalPlus' verdict will stand is a file, too; a pipe tells of the process' end.
        with contextlib.suppress(OSError):
            if descriptor > 2 and not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.close(descriptor)
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: FILE,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def judge(task: dict[str, Any], response: str) -> dict[str, str]:
    """Return the code in a response, and EvalPlus' status: pass, fail or timeout.

    What is right is what the task's own solution returns, on EvalPlus' inputs beside the original ones.
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
    blocks = FENCED.findall(response)
    code = sanitize(blocks[-1] if blocks else response, entry_point)
    any_value = dataset == "mbpp" and entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
    expected, seconds = trusted_exec(
        task["prompt"] + task["canonical_solution"], inputs, entry_point, record_time=True, output_not_none=any_value
    )
    status, _ = untrusted_check(dataset, code, inputs, entry_point, expected, task["atol"], seconds, fast_check=True)
    return {"code": code, "status": status}


if __name__ == "__main__":
    main()
