"""Code of a model: EvalPlus' verdict on it, and what it cannot do while it runs. Real programs in the real sandbox."""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import code_execution, code_sandbox
from opdctl.evaluation.benchmarks import find
from opdctl.evaluation.code_execution import SELF_TEST_TASK, code
from opdctl.evaluation.graders import Grade
from opdctl.recipe.schema import Eval


def confinement() -> str:
    """Return why code cannot be confined here, or nothing."""
    try:
        code_execution._need_confinement()
    except OpdctlError as error:
        return error.message
    return ""


WHY = confinement()
confined = pytest.mark.skipif(bool(WHY), reason=WHY)

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
TUPLES = SELF_TEST_TASK | {  # MBPP 2: its inputs are tuples, which JSON has not
    "dataset": "mbpp",
    "task_id": "Mbpp/2",
    "prompt": '"""Find the shared elements of two tuples."""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    "plus_input": [[[1, 2], [3]]],
}


def graded(body: str, task: dict[str, Any] = SELF_TEST_TASK) -> Grade:
    (grade,) = code.grade([(json.dumps(task), body)])
    return grade


# ── Verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@confined
@pytest.mark.parametrize(
    ("task", "response", "correct"),
    [
        (ADD, "def add(x):\n    return sum(x)", True),
        (ADD, "Here it is:\n```python\ndef add(x):\n    return sum(x)\n```\nDone.", True),
        (ADD, "```python\ndef add(x):\n    return 0\n```\nno:\n```\ndef add(x):\n    return sum(x)\n```", True),
        (ADD, "```python\ndef add(x):\n    return sum(x)\nprint(add(input()))\n```", True),  # what is below is not run
        (
            ADD,
            "<think>def add(x): return 0</think>def add(x):\n    return helped(x)\ndef helped(x):\n    return sum(x)",
            True,
        ),
        (ADD, "def add(x):\n    return 3 if x == [1, 2] else 0", False),  # right on the original inputs alone
        (ADD, "def add(x):\n    return abs(sum(x)) + x[0]", False),
        (ROOT, "import math\ndef root(x):\n    return math.sqrt(x) + 1e-8", True),
        (ROOT, "def root(x):\n    return round(x ** 0.5, 2)", False),
        (TUPLES, "def similar_elements(a, b):\n    assert type(a) is tuple\n    return tuple(set(a) & set(b))", True),
        (TUPLES, "def similar_elements(a, b):\n    return (4,)", False),
    ],
)
def test_what_a_response_s_function_returns_decides(task: dict[str, Any], response: str, correct: bool) -> None:
    grade = graded(response, task)
    assert (grade.correct, grade.verdict) == (correct, "ok")
    assert grade.extracted is not None
    assert f"def {task['entry_point']}(" in grade.extracted
    assert "```" not in grade.extracted


@confined
def test_responses_without_the_function_are_no_answers_and_each_keeps_its_place() -> None:
    right, wrong = "def echo(x):\n    return x", "def echo(x):\n    return 0"
    pairs = [
        (json.dumps(SELF_TEST_TASK), each) for each in (right, "no idea", wrong, "<think>def echo(x)</think>", right)
    ]
    assert [grade.verdict for grade in code.grade(pairs)] == ["ok", "no_answer", "ok", "no_answer", "ok"]
    assert [grade.correct for grade in code.grade(pairs)] == [True, False, False, False, True]
    assert code.grade([]) == []


@confined
def test_a_task_whose_own_solution_fails_is_told() -> None:
    raising = ADD | {"canonical_solution": "    raise ValueError\n"}
    assert code.readable([json.dumps(task) for task in (ADD, raising, TUPLES)]) == [True, False, True]


# ── What it cannot do ────────────────────────────────────────────────────────────────────────────────────────────────

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


@confined
@pytest.mark.parametrize("body", [SOCKET, FORK, THREAD, MEMORY, LARGE_FILE, OPEN_FILES, ENVIRONMENT])
def test_each_returns_the_right_answer_only_where_it_is_refused(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPDCTL_SECRET", "key")
    assert graded(program(body)) == Grade(program(body).strip(), True, "ok")


@confined
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give code to another user")
def test_as_root_it_has_another_user_s_rights() -> None:
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


@confined
@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("while True: pass\nreturn x", "ok"),  # one input's limit, not the whole response's
        ("import os\nos._exit(0)\nreturn x", "timeout"),  # it ends without a word
        ("import ctypes\nctypes.string_at(0)\nreturn x", "timeout"),
        (FORGED, "timeout"),
        ("class Any:\n    def __eq__(self, other): return 1 / 0\nreturn Any()", "ok"),
    ],
)
def test_what_does_not_play_fair_is_wrong_and_harms_no_other(body: str, verdict: str) -> None:
    grades = code.grade([(json.dumps(SELF_TEST_TASK), program(each)) for each in (body, "return x")])
    assert [(grade.correct, grade.verdict) for grade in grades] == [(False, verdict), (True, "ok")]


@confined
def test_what_outlasts_the_limit_is_ended_with_all_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_execution, "TIMEOUT_SECONDS", 1)
    task = SELF_TEST_TASK | {"canonical_solution": "    while True: pass\n"}  # the task itself hangs
    assert graded(program("return x"), task).verdict == "timeout"
    left = subprocess.run(["pgrep", "-f", code_sandbox.__file__], capture_output=True, text=True).stdout
    assert left == ""


def test_where_code_cannot_be_confined_none_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    code_execution._need_confinement.cache_clear()
    monkeypatch.setattr(os, "defpath", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OpdctlError, match="cannot be confined here, so none is run") as caught:
        graded(program("return x"))
    assert caught.value.code == ExitCode.UNAVAILABLE
    code_execution._need_confinement.cache_clear()


# ── Problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["HumanEvalPlus.jsonl", "HumanEvalPlus.jsonl.gz"])
def test_evalplus_own_file_gives_the_problems(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = "".join(json.dumps(task | {"contract": "", "test": "…"}) + "\n" for task in (ADD, ROOT))
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    problems = find("humaneval_plus", Eval()).problems(None, path)
    assert [problem.id for problem in problems] == ["HumanEval/900", "HumanEval/901"]
    assert problems[0].text == f"```python\n{ADD['prompt'].strip()}\n```"
    assert json.loads(problems[1].answer or "") == {"dataset": "humaneval"} | {
        key: ROOT[key] for key in code_execution.COLUMNS
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"task_id": "a"}\n', r"tasks\.jsonl:1: is no task of EvalPlus: it has no prompt"),
        ("[1]\n", r"tasks\.jsonl:1: is no task"),
        ("nonsense\n", "cannot be read as JSON Lines"),
        ("", "holds no problems"),
    ],
)
def test_a_file_that_holds_no_tasks_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(OpdctlError, match=told) as caught:
        find("mbpp_plus", Eval()).problems(None, path)
    assert caught.value.code == ExitCode.BAD_DATA
