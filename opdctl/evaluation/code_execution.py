"""HumanEval+ and MBPP+: model-generated code runs in a sandbox; what it returns is compared here.

Each response runs in a separate process tree: in namespaces without a network, with separate processes and files
(code_walls.py), an empty environment, and limits on time, memory, files and processes. If the system does not
support that, no code is run. The expected values are those of the reference solution, which runs in another sandbox
before. They never enter the one of the response.
"""

import contextlib
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from opdctl import console
from opdctl.data.prompts import Problem
from opdctl.errors import OpdctlError
from opdctl.evaluation.code_processes import (
    MAX_SANDBOXES,
    SPARE_OUTPUT_BYTES,
    TooLongError,
    check_sandbox,
    run_sandbox,
)
from opdctl.evaluation.code_values import MalformedValueError, OutputComparison, decode
from opdctl.evaluation.graders import Grade, WithoutMajority

CODE_TIMEOUT_SECONDS = 300
"""Time limit of one response, and of one reference solution: the extraction of the code, and two sets of inputs, which
have min(60, the sum of the inputs' limits) + 2 seconds each, as in `evalplus.eval.untrusted_check`."""
MIN_TIME_LIMIT_SECONDS = 10.0
"""Time limit of one input, at least. RUCBM/G-OPD, on which the authors' code is built, evaluates with
`--min-time-limit 10.0 --gt-time-limit-factor 8.0`; EvalPlus 0.3.1 has 1 and 4."""
GT_TIME_LIMIT_FACTOR = 8.0
"""Time limit of one input, as a multiple of the time of the reference solution. Source: as above."""
LOST = "lost"
"""The status of a response whose sandbox ended itself: by the code, or by the system."""
MAX_OUTPUT_FACTOR = 4
"""A response may return this many times as many bytes as its reference solution does."""
MAX_REFERENCE_BYTES = 2**28
INPUT_KEYS = ("base_input", "plus_input")
TASK_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
Dataset = Literal["humaneval", "mbpp"]
RELEASES: dict[Dataset, tuple[str, str]] = {"humaneval": ("HumanEvalPlus", "v0.1.10"), "mbpp": ("MbppPlus", "v0.2.0")}
"""Name and version of each data set at EvalPlus."""
SELF_TEST_TASK: dict[str, Any] = {
    "dataset": "humaneval",
    "task_id": "echo",
    "prompt": "def echo(x):\n",
    "entry_point": "echo",
    "canonical_solution": "    return x\n",
    "base_input": [[1]],
    "plus_input": [[2]],
    "atol": 0,
}


# ── Problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_tasks(dataset: Dataset, data: Path | None) -> Iterator[Problem]:
    """Yield the tasks of the `.jsonl` or `.jsonl.gz` file `data`, by default of the copy that evalplus downloads.

    The gold answer of a problem is the task as JSON, with its solution, inputs and tolerance.

    Raises:
        OpdctlError: the file has no such tasks, the package is missing, or the download fails.
    """
    path = data or _download_tasks(dataset)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _problem(dataset, json.loads(line), f"{path}:{number}")
    except (OSError, EOFError, ValueError) as error:
        raise OpdctlError("invalid_data", f"{path}: not readable as JSON Lines: {error}") from error


def _problem(dataset: Dataset, task: Any, location: str) -> Problem:
    missing = [key for key in TASK_KEYS if key not in task] if isinstance(task, dict) else TASK_KEYS
    if missing:
        raise OpdctlError(
            "invalid_data",
            f"{location}: not a task of EvalPlus: no {', '.join(missing)}",
            hint=f"give the file {RELEASES[dataset][0]}.jsonl that EvalPlus publishes",
        )
    gold = json.dumps({"dataset": dataset} | {key: task[key] for key in TASK_KEYS})
    text = task["prompt"].strip() + "\n"  # as `evalplus.codegen` asks it
    return Problem(task["task_id"], text, gold, location=location)


def _download_tasks(dataset: Dataset) -> Path:
    """Return EvalPlus' cached copy of a data set; the first call downloads it."""
    _check_evalplus()
    from evalplus.data.utils import get_dataset_metadata, make_cache

    name, version = RELEASES[dataset]
    url, path = get_dataset_metadata(name, version, mini=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            make_cache(url, path)
    except OSError as error:
        raise OpdctlError(
            "failed_download",
            f"--bench {dataset}_plus: {name} {version}, by evalplus: {error}",
            hint=f"give a local copy by --data {name}.jsonl; or run it once with a network",
        ) from error
    return Path(path)


def _check_evalplus() -> None:
    if importlib.util.find_spec("evalplus") is None:
        detail = "HumanEval+ and MBPP+ require the package evalplus"
        raise OpdctlError("missing_sandbox", detail, hint="run `pip install 'opdctl[code]'`")


# ── Grades ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Code(WithoutMajority):
    """Runs the function that a response defines on a task's inputs."""

    name: str = "code"
    runs_code: bool = True
    package: str = "evalplus"

    @property
    def rules(self) -> dict[str, Any]:
        """Version 1 read the last block of code only, and had the limits of EvalPlus 0.3.1. In version 2, the process
        that ran the code compared its values."""
        return {
            "grader_version": 3,
            "min_time_limit_seconds": MIN_TIME_LIMIT_SECONDS,
            "gt_time_limit_factor": GT_TIME_LIMIT_FACTOR,
        }

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (task, response) pairs.

        Raises:
            OpdctlError: the sandbox is not available.
        """
        _check_sandbox()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                # A response waits for its reference, which has been submitted before it, so that no wait is for ever.
                references = {
                    gold: pool.submit(_run_reference, gold) for gold in dict.fromkeys(gold for gold, _ in pairs)
                }
                grades = [pool.submit(_grade, references[gold], response) for gold, response in pairs]
                return [grade.result() for grade in grades]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        """Return for each task whether its canonical solution passes its tests."""
        solutions = [
            (gold, task["prompt"] + task["canonical_solution"]) for gold in golds if (task := json.loads(gold))
        ]
        return [grade.correct for grade in self.grade(solutions)]


CODE_GRADER = Code()


@dataclass(frozen=True)
class _Reference:
    """What the reference solution of a task returns.

    inputs, expected, limits (seconds): for each set of inputs, for each input. num_bytes: size of its output. failure:
    the verdict of every response, if the reference solution does not return for every input.
    """

    task: dict[str, Any]
    inputs: list[list[Any]]
    expected: list[list[Any]]
    limits: list[list[float]]
    num_bytes: int
    failure: str | None = None


def _run_reference(gold: str) -> _Reference:
    task = json.loads(gold)
    for _ in range(MAX_SANDBOXES):
        reference = _try_reference(task)
        if reference.failure != "crash":
            break
    return reference


def _try_reference(task: dict[str, Any]) -> _Reference:
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS

    is_mbpp = task["dataset"] == "mbpp"
    limits = [[float(CODE_TIMEOUT_SECONDS)] * len(task[key]) for key in INPUT_KEYS]
    request = _request(task, limits, code=task["prompt"] + task["canonical_solution"], total_limit=CODE_TIMEOUT_SECONDS)
    try:
        with contextlib.closing(run_sandbox(request, MAX_REFERENCE_BYTES, CODE_TIMEOUT_SECONDS)) as lines:
            values = [line for line in lines if line[0] == "value"]
        if len(values) != sum(map(len, limits)):
            return _Reference(task, [], [], [], 0, failure="crash")
        outputs = [decode(value) for _, _, value in values]
    except subprocess.TimeoutExpired:
        return _Reference(task, [], [], [], 0, failure="timeout")
    except (MalformedValueError, ValueError, TooLongError):
        return _Reference(task, [], [], [], 0, failure="crash")
    if is_mbpp and task["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS:
        outputs = [output is not None for output in outputs]
    times = [max(MIN_TIME_LIMIT_SECONDS, GT_TIME_LIMIT_FACTOR * seconds) for _, seconds, _ in values]
    size = len(task[INPUT_KEYS[0]])
    num_bytes = len(json.dumps(values))
    return _Reference(task, _inputs(task), [outputs[:size], outputs[size:]], [times[:size], times[size:]], num_bytes)


def _inputs(task: dict[str, Any]) -> list[list[Any]]:
    if task["dataset"] != "mbpp":
        return [task[key] for key in INPUT_KEYS]
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    return [mbpp_deserialize_inputs(task["task_id"], task[key]) for key in INPUT_KEYS]


def _grade(computed: Future[_Reference], response: str) -> Grade:
    reference = computed.result()
    entry_point = reference.task["entry_point"]
    answer = response.rpartition("</think>")[2]
    if entry_point not in answer:
        return Grade(None, False, "no_answer")
    if reference.failure:
        return Grade(answer, False, reference.failure)
    request = _request(reference.task, reference.limits, response=answer)
    max_bytes = len(json.dumps(answer)) + MAX_OUTPUT_FACTOR * reference.num_bytes + SPARE_OUTPUT_BYTES
    for _ in range(MAX_SANDBOXES):
        code, status = _run_response(reference, request, max_bytes)
        if status not in (LOST, "crash"):
            break
    if status == "no_answer":
        return Grade(None, False, status)
    verdict = {"timeout": "timeout", "crash": "crash", LOST: "crash"}.get(status, "ok")
    return Grade(answer if code is None else code, status == "pass", verdict)


def _run_response(reference: _Reference, request: dict[str, Any], max_bytes: int) -> tuple[str | None, str]:
    """Return the code of a response, None if it is unknown, and the status: as of `_compare`, or no_answer."""
    code = None
    try:
        with contextlib.closing(run_sandbox(request, max_bytes, CODE_TIMEOUT_SECONDS)) as lines:
            if (first := next(lines, None)) is None:
                return None, LOST
            _, code = first
            return code, _compare(reference, lines) if request["entry_point"] in code else "no_answer"
    except subprocess.TimeoutExpired:
        return code, "timeout"
    except (MalformedValueError, ValueError):
        return code, "crash"
    except TooLongError:
        return code, "fail"


def _compare(reference: _Reference, lines: Iterator[list[Any]]) -> str:
    """Return the status of a response: pass, fail, timeout, crash or LOST. The first difference decides."""
    task = reference.task
    for arguments, expected in zip(reference.inputs, reference.expected, strict=True):
        comparison = OutputComparison(task["dataset"], task["entry_point"], task["atol"])
        remaining = list(zip(arguments, expected, strict=True))[::-1]
        for kind, *contents in lines:
            if kind != "value":
                break
            _, value = contents
            if not remaining or not comparison.accepts(decode(value), *remaining.pop()):
                return "fail"
        else:
            return LOST
        if kind == "error":
            return "fail"
        if remaining:
            ending, exit_code = contents
            console.debug(f"code of {task['task_id']}: {ending}, exit code {exit_code}")
            return "timeout" if ending == "timeout" else "crash"
    return "pass"


def _request(
    task: dict[str, Any],
    limits: list[list[float]],
    code: str | None = None,
    response: str | None = None,
    total_limit: float | None = None,
) -> dict[str, Any]:
    """Return a request to code_sandbox.py. limits: seconds of each input; total_limit: of each set of inputs."""
    from evalplus.eval._special_oracle import MBPP_OUTPUT_SET_EQ_TASKS

    return {
        "dataset": task["dataset"],
        "task_id": task["task_id"],
        "entry_point": task["entry_point"],
        "code": code,
        "response": response,
        "inputs": [task[key] for key in INPUT_KEYS],
        "limits": limits,
        "total_limit": total_limit,
        "as_set": task["dataset"] == "mbpp" and task["entry_point"] in MBPP_OUTPUT_SET_EQ_TASKS,
    }


# ── Sandbox ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _check_sandbox() -> None:
    """Run a correct program in the sandbox and say which wall is missing.

    Raises:
        OpdctlError: the program does not run.
    """
    _check_evalplus()
    response = SELF_TEST_TASK["prompt"] + SELF_TEST_TASK["canonical_solution"]
    check_sandbox(_request(SELF_TEST_TASK, [[10.0], [10.0]], response=response), [1, 2], CODE_TIMEOUT_SECONDS)
