"""Code that a model wrote: HumanEval+ and MBPP+, graded by the package evalplus in a sandbox.

Each response is run in a process tree of its own: namespaces without a network and without other processes in sight, as
the user nobody where opdctl runs as root, with an empty environment and limits on time, memory, files and processes.
Where the system does not allow that, nothing is run.
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
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import code_sandbox
from opdctl.evaluation.graders import Grade, Votes

TIMEOUT_SECONDS = 90  # for one response, all its tests together; EvalPlus itself ends after 60
NOBODY = 65534
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
Dataset = Literal["humaneval", "mbpp"]
RELEASES: dict[Dataset, tuple[str, str]] = {"humaneval": ("HumanEvalPlus", "v0.1.10"), "mbpp": ("MbppPlus", "v0.2.0")}
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


def problems(dataset: Dataset, data: Path | None) -> Iterator[Problem]:
    """Yield EvalPlus' tasks, from its `.jsonl` or `.jsonl.gz` file `data`, or from where the package keeps them.

    A problem's answer is the task itself, as JSON: solution, inputs and tolerance.

    Raises OpdctlError: 3 for a file that holds no such tasks, 5 without the package or its data.
    """
    path = data or _fetched(dataset)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _problem(dataset, json.loads(line), f"{path}:{number}")
    except (OSError, EOFError, ValueError) as error:
        raise OpdctlError(f"{path}: cannot be read as JSON Lines: {error}", code=ExitCode.BAD_DATA) from error


def _problem(dataset: Dataset, task: Any, where: str) -> Problem:
    missing = [name for name in COLUMNS if name not in task] if isinstance(task, dict) else COLUMNS
    if missing:
        raise OpdctlError(
            f"{where}: is no task of EvalPlus: it has no {', '.join(missing)}",
            hint=f"wanted is {RELEASES[dataset][0]}.jsonl as EvalPlus publishes it",
            code=ExitCode.BAD_DATA,
        )
    gold = json.dumps({"dataset": dataset} | {name: task[name] for name in COLUMNS})
    return Problem(task["task_id"], f"```python\n{task['prompt'].strip()}\n```", gold)


def _fetched(dataset: Dataset) -> Path:
    """Return EvalPlus' own copy of a data set, which it fetches once."""
    _need_evalplus()
    from evalplus.data.utils import get_dataset_metadata, make_cache

    name, version = RELEASES[dataset]
    address, path = get_dataset_metadata(name, version, mini=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            make_cache(address, path)
    except OSError as error:
        raise OpdctlError(
            f"--bench {dataset}_plus: EvalPlus could not fetch its {name} {version}: {error}",
            hint=f"give it by --data {name}.jsonl; or run it once where there is a network",
            code=ExitCode.UNAVAILABLE,
        ) from error
    return Path(path)


def _need_evalplus() -> None:
    if importlib.util.find_spec("evalplus") is None:
        raise OpdctlError(
            "the benchmarks of code need the package evalplus",
            hint="pip install 'opdctl[code]'",
            code=ExitCode.UNAVAILABLE,
        )


# ── Grades ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Code:
    """Runs the function that a response defines on a task's inputs."""

    name: str = "code"
    runs_code: bool = True

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (task, response) pairs. Raises OpdctlError (code 5) where code cannot be confined."""
        _need_confinement()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            try:
                return list(pool.map(_grade, *zip(*pairs, strict=True))) if pairs else []
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """Programs are not voted on."""
        return [[None] * len(grades) for _, grades in problems]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Return of each task whether its own solution passes its tests."""
        solutions = [
            (gold, task["prompt"] + task["canonical_solution"]) for gold in golds if (task := json.loads(gold))
        ]
        return [grade.correct for grade in self.grade(solutions)]


code = Code()


def _grade(gold: str, response: str) -> Grade:
    task = json.loads(gold)
    said = response.rpartition("</think>")[2]
    if f"def {task['entry_point']}" not in said:
        return Grade(None, False, "no_answer")
    try:
        ended = _confined({"task": task, "response": said})
    except subprocess.TimeoutExpired:
        return Grade(said, False, "timeout")
    try:
        found = json.loads(ended.stdout)
    except ValueError:
        return Grade(said, False, "crash")
    verdict = "timeout" if found["status"] == "timeout" else "ok"
    return Grade(found["code"], found["status"] == "pass", verdict)


def _confined(asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run sandbox.py, confined, on `asked`. Raises TimeoutExpired."""
    root = os.geteuid() == 0
    command = ["unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
    command += [] if root else ["--user"]
    command += ["setpriv", "--no-new-privs", "--pdeathsig=KILL"]  # a change of user clears that of --kill-child
    command += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if root else []
    with tempfile.TemporaryDirectory(prefix="opdctl-sandbox-") as folder:
        if root:
            os.chown(folder, NOBODY, NOBODY)
        return subprocess.run(
            # -P: beside sandbox.py lie modules whose names are the standard library's, too
            [*command, sys.executable, "-P", str(Path(code_sandbox.__file__))],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            cwd=folder,
            env={"PATH": os.defpath, "TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"},
        )


@cache
def _need_confinement() -> None:
    """Raise OpdctlError unless a program can be run, confined, with the right verdict."""
    _need_evalplus()
    try:
        ended = _confined(
            {"task": SELF_TEST_TASK, "response": SELF_TEST_TASK["prompt"] + SELF_TEST_TASK["canonical_solution"]}
        )
        passed = ended.returncode == 0 and json.loads(ended.stdout)["status"] == "pass"
        why = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
    except (OSError, subprocess.TimeoutExpired) as error:
        passed, why = False, [str(error)]
    if not passed:
        raise OpdctlError(
            f"a model's code cannot be confined here, so none is run: {why[0]}",
            hint="needed are Linux with user namespaces, the commands unshare and setpriv of util-linux, and as root a "
            "Python that the user nobody can read",
            code=ExitCode.UNAVAILABLE,
        )
