"""Model-generated code in the real sandbox: the verdicts of EvalPlus, and the limits of the programs."""

import json
import os
import shutil
import subprocess
from typing import Any

import pytest
from helpers.code_sandbox import needs_sandbox

from opdctl.errors import OpdctlError
from opdctl.evaluation import code_execution, code_sandbox
from opdctl.evaluation.code_execution import CODE_GRADER, SELF_TEST_TASK
from opdctl.evaluation.graders import Grade

ADD = SELF_TEST_TASK | {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\ndef add(x: List[int]) -> int:\n    """Add the numbers up."""\n',
    "entry_point": "add",
    "canonical_solution": "    return sum(x)\n",
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[-5, 5, 7]]],
}
ROOT = SELF_TEST_TASK | {
    "task_id": "HumanEval/901",
    "prompt": "def root(x: float) -> float:\n",
    "entry_point": "root",
    "canonical_solution": "    return x ** 0.5\n",
    "base_input": [[2.0]],
    "plus_input": [[3.0]],
    "atol": 1e-6,
}
TUPLES = SELF_TEST_TASK | {  # MBPP 2: its inputs are tuples, which JSON lacks
    "dataset": "mbpp",
    "task_id": "Mbpp/2",
    "prompt": '"""Find the shared elements of two tuples."""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": [[[1, 2], [3]]],
}


def graded(body: str, task: dict[str, Any] = SELF_TEST_TASK) -> Grade:
    (grade,) = CODE_GRADER.grade([(json.dumps(task), body)])
    return grade


# ── Verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_sandbox
@pytest.mark.parametrize(
    ("task", "response", "correct"),
    [
        (ADD, "def add(x):\n    return sum(x)", True),
        (ADD, "Here it is:\n```python\ndef add(x):\n    return sum(x)\n```\nDone.", True),
        (
            ADD,
            "```python\ndef add(x):\n    return sum(x)\nprint(add(input()))\n```",
            True,
        ),  # code below the function is not run
        (
            ADD,
            "<think>def add(x): return 0</think>def add(x):\n    return helped(x)\ndef helped(x):\n    return sum(x)",
            True,
        ),
        (ADD, "def add(x):\n    return 3 if x == [1, 2] else 0", False),  # correct on the original inputs only
        (ADD, "def add(x):\n    return abs(sum(x)) + x[0]", False),
        (ROOT, "import math\ndef root(x):\n    return math.sqrt(x) + 1e-8", True),
        (ROOT, "def root(x):\n    return round(x ** 0.5, 2)", False),
        (TUPLES, "def similar_elements(a, b):\n    assert type(a) is tuple\n    return tuple(set(a) & set(b))", True),
        (TUPLES, "def similar_elements(a, b):\n    return (4,)", False),
    ],
)
def test_grade_depends_on_the_returned_values(task: dict[str, Any], response: str, correct: bool) -> None:
    grade = graded(response, task)
    assert (grade.correct, grade.verdict) == (correct, "ok")
    assert grade.extracted is not None
    assert f"def {task['entry_point']}(" in grade.extracted
    assert "```" not in grade.extracted


@needs_sandbox
def test_responses_without_the_function_have_no_answer() -> None:
    right, wrong = "def echo(x):\n    return x", "def echo(x):\n    return 0"
    pairs = [
        (json.dumps(SELF_TEST_TASK), each) for each in (right, "no idea", wrong, "<think>def echo(x)</think>", right)
    ]
    grades = CODE_GRADER.grade(pairs)
    assert [grade.verdict for grade in grades] == ["ok", "no_answer", "ok", "no_answer", "ok"]
    assert [grade.correct for grade in grades] == [True, False, False, False, True]
    assert CODE_GRADER.grade([]) == []


@needs_sandbox
def test_task_whose_solution_fails_is_not_parsable() -> None:
    raising = ADD | {"canonical_solution": "    raise ValueError\n"}
    assert CODE_GRADER.are_parsable([json.dumps(task) for task in (ADD, raising, TUPLES)]) == [True, False, True]


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SOCKET = """\
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    return x if error.errno == 101 else None  # the network is unreachable
"""
FORK = """\
import ctypes
return x if ctypes.CDLL(None).fork() == -1 else None
"""
THREAD = """\
import threading
try:
    threading.Thread(target=print).start()
except RuntimeError:
    return x
"""
MEMORY = """\
try:
    bytearray(6 * 2**30)
except MemoryError:
    return x
"""
LARGE_FILE = """\
import io
file = io.open("large", "wb", buffering=0)
file.write(b"x" * 2**20)
try:
    file.write(b"x")
except OSError:
    return x
"""
OPEN_FILES = """\
import io
try:
    files = [io.open("/dev/null") for _ in range(99)]
except OSError:
    return x
"""
ENVIRONMENT = """\
import os
return x if "OPDCTL_SECRET" not in os.environ else None
"""
OTHERS_FILE = f"""\
import io
try:
    io.open({__file__!r}, "a")
except OSError:
    return x
"""


def program(body: str) -> str:
    """Return `echo` with this body."""
    return "def echo(x):\n" + "".join(f"    {line}\n" for line in body.splitlines())


@needs_sandbox
@pytest.mark.parametrize("body", [SOCKET, FORK, THREAD, MEMORY, LARGE_FILE, OPEN_FILES, ENVIRONMENT])
def test_forbidden_operations_fail(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPDCTL_SECRET", "key")
    assert graded(program(body)) == Grade(program(body).strip(), True, "ok")


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give code to another user")
def test_code_runs_as_nobody_under_root() -> None:
    assert graded(program(OTHERS_FILE)).correct


FORGED = """\
import os
for descriptor in range(64):
    try:
        os.write(descriptor, b'\\0' * 64 + b'{"status": "pass", "code": ""}')
    except OSError:
        pass
os._exit(0)
return x
"""


@needs_sandbox
@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("while True: pass\nreturn x", "ok"),  # the limit of one input, not of the response
        ("import os\nos._exit(0)\nreturn x", "timeout"),  # it exits without a result
        ("import ctypes\nctypes.string_at(0)\nreturn x", "timeout"),
        (FORGED, "timeout"),
        ("class Any:\n    def __eq__(self, other): return 1 / 0\nreturn Any()", "ok"),
    ],
)
def test_hostile_code_is_incorrect_and_affects_no_other_grade(body: str, verdict: str) -> None:
    grades = CODE_GRADER.grade([(json.dumps(SELF_TEST_TASK), program(each)) for each in (body, "return x")])
    assert [(grade.correct, grade.verdict) for grade in grades] == [(False, verdict), (True, "ok")]


@needs_sandbox
def test_timeout_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_execution, "CODE_TIMEOUT_SECONDS", 1)
    task = SELF_TEST_TASK | {"canonical_solution": "    while True: pass\n"}  # the task itself hangs
    assert graded(program("return x"), task).verdict == "timeout"
    running = subprocess.run(["pgrep", "-f", code_sandbox.__file__], capture_output=True, text=True).stdout
    assert running == ""


def test_no_code_runs_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    code_execution._check_sandbox.cache_clear()
    monkeypatch.setattr(os, "defpath", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OpdctlError) as caught:
        graded(program("return x"))
    assert caught.value.kind == "missing_sandbox"
    code_execution._check_sandbox.cache_clear()
