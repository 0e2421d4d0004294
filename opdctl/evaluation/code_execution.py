"""HumanEval+ and MBPP+: model-generated code, graded by the package evalplus in a sandbox.

Each response runs in a separate process tree: in namespaces without a network, from which it can signal no other
process, as the user nobody if opdctl runs as root, with an empty environment and limits on time, memory, files and
processes. If the system does not support that, no code is run.
"""

import contextlib
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from opdctl.data.prompts import Problem
from opdctl.errors import OpdctlError
from opdctl.evaluation import code_sandbox
from opdctl.evaluation.graders import Grade, Votes

CODE_TIMEOUT_SECONDS = 300
"""Time limit of one response: the extraction of its code, the reference solution, and two checks, which EvalPlus itself
ends after min(60, the sum of the inputs' limits) + 2 seconds each (`evalplus.eval.untrusted_check`)."""
NOBODY_ID = 65534
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
    return Problem(task["task_id"], task["prompt"].strip() + "\n", gold)  # as `evalplus.codegen` asks it


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
class Code:
    """Runs the function that a response defines on a task's inputs."""

    name: str = "code"
    runs_code: bool = True
    package: str = "evalplus"

    @property
    def rules(self) -> dict[str, Any]:
        """Version 1 read the last block of code only, and had the limits of EvalPlus 0.3.1."""
        return {
            "grader_version": 2,
            "min_time_limit_seconds": code_sandbox.MIN_TIME_LIMIT_SECONDS,
            "gt_time_limit_factor": code_sandbox.GT_TIME_LIMIT_FACTOR,
        }

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (task, response) pairs.

        Raises:
            OpdctlError: the sandbox is not available.
        """
        _check_sandbox()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                return list(pool.map(_grade, *zip(*pairs, strict=True))) if pairs else []
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """Return no votes: there is no majority among programs."""
        return [[None] * len(grades) for _, grades in problems]

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        """Return for each task whether its canonical solution passes its tests."""
        solutions = [
            (gold, task["prompt"] + task["canonical_solution"]) for gold in golds if (task := json.loads(gold))
        ]
        return [grade.correct for grade in self.grade(solutions)]


CODE_GRADER = Code()


def _grade(gold: str, response: str) -> Grade:
    task = json.loads(gold)
    answer = response.rpartition("</think>")[2]
    if task["entry_point"] not in answer:
        return Grade(None, False, "no_answer")
    try:
        process = _run_sandbox({"task": task, "response": answer})
    except subprocess.TimeoutExpired:
        return Grade(answer, False, "timeout")
    try:
        result = json.loads(process.stdout)
    except ValueError:
        return Grade(answer, False, "crash")
    if task["entry_point"] not in result["code"]:
        return Grade(None, False, "no_answer")
    verdict = "timeout" if result["status"] == "timeout" else "ok"
    return Grade(result["code"], result["status"] == "pass", verdict)


def _run_sandbox(request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run code_sandbox.py in the sandbox. Raises subprocess.TimeoutExpired."""
    is_root = os.geteuid() == 0
    command = ["unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
    command += [] if is_root else ["--user"]
    command += ["setpriv", "--no-new-privs", "--pdeathsig=KILL"]  # changing the user resets that of --kill-child
    command += [f"--reuid={NOBODY_ID}", f"--regid={NOBODY_ID}", "--clear-groups"] if is_root else []
    with tempfile.TemporaryDirectory(prefix="opdctl-sandbox-") as directory:
        if is_root:
            os.chown(directory, NOBODY_ID, NOBODY_ID)
        return subprocess.run(
            # -P: a module beside code_sandbox.py must not hide one of the standard library
            [*command, sys.executable, "-P", str(Path(code_sandbox.__file__))],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=CODE_TIMEOUT_SECONDS,
            cwd=directory,
            env={"PATH": os.defpath, "TMPDIR": directory, "HOME": directory, "OMP_NUM_THREADS": "1"},
        )


@cache
def _check_sandbox() -> None:
    """Raise OpdctlError unless a correct program passes in the sandbox."""
    _check_evalplus()
    solution = SELF_TEST_TASK["prompt"] + SELF_TEST_TASK["canonical_solution"]
    try:
        process = _run_sandbox({"task": SELF_TEST_TASK, "response": solution})
        passed = process.returncode == 0 and json.loads(process.stdout)["status"] == "pass"
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        passed, reason = False, str(error)
    if not passed:
        raise OpdctlError(
            "missing_sandbox",
            f"this system cannot isolate model-generated code: {reason}",
            hint="use Linux with user namespaces and the commands unshare and setpriv of util-linux; as root, install "
            "Python in a place that the user nobody can read",
        )
