"""Model-generated code in the real sandbox: the verdicts of EvalPlus, and the limits of the programs."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.code_sandbox import needs_sandbox

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.evaluation import code_execution, code_processes, code_walls
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
SHARED_FILE = f"""\
import io
try:
    io.open({os.__file__!r}, "a")
except OSError:
    return x
"""
HOME = f"""\
import os
paths = ({__file__!r}, {str(Path.home() / ".ssh")!r}, "/etc/passwd", "/sys", "/run")
return None if any(map(os.path.exists, paths)) else x
"""
PROCESSES = """\
import os
processes = [name for name in os.listdir("/proc") if name.isdecimal()]
return x if len(processes) <= 2 else None  # this one, and the one that waits for it
"""
OTHER_ROOT = """\
import ctypes, os
libc = ctypes.CDLL(None)
calls = [libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp")]
return x if set(calls) == {-1} and os.getuid() != 0 else None
"""
SPACE = """\
import io
for folder in ("/tmp", "/dev/shm"):
    names = [f"{folder}/opdctl-code-{number}" for number in range(99)]
    written = 0
    try:
        for name in names:
            with io.open(name, "wb", buffering=0) as file:
                written += file.write(b"x" * 2**20)
    except OSError as error:
        assert error.errno == 28  # no space left
    for name in names:
        io.open(name, "wb").close()
    if not 0 < written <= 64 * 2**20:
        return None
return x
"""
FORBIDDEN = {
    "network": SOCKET,
    "fork": FORK,
    "thread": THREAD,
    "memory": MEMORY,
    "large file": LARGE_FILE,
    "open files": OPEN_FILES,
    "environment": ENVIRONMENT,
    "file of Python": SHARED_FILE,
    "files of the user": HOME,
    "other processes": PROCESSES,
    "other root": OTHER_ROOT,
    "space": SPACE,
}


def program(body: str) -> str:
    """Return `echo` with this body."""
    return "def echo(x):\n" + "".join(f"    {line}\n" for line in body.splitlines())


@pytest.fixture(scope="module")
def forbidden() -> dict[str, Grade]:
    """The grade of each program in FORBIDDEN, which is correct if the sandbox prevents what it tries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPDCTL_SECRET", "key")
        grades = CODE_GRADER.grade([(json.dumps(SELF_TEST_TASK), program(body)) for body in FORBIDDEN.values()])
    return dict(zip(FORBIDDEN, grades, strict=True))


@needs_sandbox
@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_operation_fails(forbidden: dict[str, Grade], name: str) -> None:
    assert forbidden[name] == Grade(program(FORBIDDEN[name]).strip(), True, "ok")


@needs_sandbox
def test_files_of_the_code_are_gone(forbidden: dict[str, Grade]) -> None:
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        assert not [*folder.glob("opdctl-code-*")]


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
        ("import os\nos._exit(0)\nreturn x", "crash"),  # it exits without a result
        ("import os, signal\nsignal.raise_signal(signal.SIGKILL)", "crash"),
        ("import ctypes\nctypes.string_at(0)\nreturn x", "crash"),
        (FORGED, "crash"),
        ("class Any:\n    def __eq__(self, other): return 1 / 0\nreturn Any()", "ok"),
    ],
)
def test_hostile_code_is_incorrect_and_affects_no_other_grade(body: str, verdict: str) -> None:
    with console.settings(level=1, is_stdout_json=False):  # what ended the code is shown if the test fails
        grades = CODE_GRADER.grade([(json.dumps(SELF_TEST_TASK), program(each)) for each in (body, "return x")])
    assert [(grade.correct, grade.verdict) for grade in grades] == [(False, verdict), (True, "ok")]


@needs_sandbox
@pytest.mark.parametrize("lost", [0, 1])  # the sandbox of the reference solution, or of the response
@pytest.mark.parametrize("messages", [[], [["code", "def add(x):\n    return sum(x)"], ["end", "crash", -9]]])
def test_program_that_the_system_ended_is_run_again(
    lost: int, messages: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code_execution._check_sandbox()
    numbers, run = itertools.count(), code_execution.run_sandbox

    def run_sandbox(*arguments: Any) -> Any:
        return (message for message in messages) if next(numbers) == lost else run(*arguments)

    monkeypatch.setattr(code_execution, "run_sandbox", run_sandbox)
    grade = graded("def add(x):\n    return sum(x)", ADD)
    assert (grade.correct, grade.verdict) == (True, "ok")
    assert next(numbers) == 3


@needs_sandbox
@pytest.mark.parametrize("failures", [2, 3])
def test_sandbox_that_does_not_start_is_started_again_and_no_grade(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_execution._check_sandbox()
    start, numbers = subprocess.Popen, itertools.count()

    def start_or_fail(command: list[str], **options: Any) -> Any:
        failing = [sys.executable, "-c", "import sys; sys.exit('no memory')"]
        return start(failing if next(numbers) < failures else command, **options)

    monkeypatch.setattr(code_processes, "START_WAIT_SECONDS", 0)
    monkeypatch.setattr(subprocess, "Popen", start_or_fail)
    if failures < code_processes.MAX_SANDBOXES:
        assert graded("def add(x):\n    return sum(x)", ADD).correct
    else:
        with pytest.raises(OpdctlError, match="isolate model-generated code: no memory"):
            graded("def add(x):\n    return sum(x)", ADD)


def processes_with(mark: str) -> list[Path]:
    """Return the processes that have `mark` in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            found += [environment.parent] * (mark.encode() in environment.read_bytes())
    return found


@needs_sandbox
def test_timeout_ends_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"/{uuid.uuid4()}"  # other tests have sandboxes at the same time
    monkeypatch.setattr(os, "defpath", f"{os.defpath}:{mark}")
    monkeypatch.setattr(code_execution, "CODE_TIMEOUT_SECONDS", 2)
    task = SELF_TEST_TASK | {"canonical_solution": "    while True: pass\n"}  # the task itself hangs
    with ThreadPoolExecutor(1) as grading:
        grade = grading.submit(graded, program("return x"), task)
        while not processes_with(mark):
            assert not grade.done()
            time.sleep(0.02)
        assert grade.result().verdict == "timeout"
    deadline = time.monotonic() + 10  # the kernel ends the processes after the first one of their namespace
    while processes_with(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ── Walls ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CHECK = """\
from opdctl.errors import OpdctlError
from opdctl.evaluation import code_execution
try:
    code_execution._check_sandbox()
except OpdctlError as error:
    print(error.kind, error.message)
"""


def check_in_namespace(setup: str, *options: str) -> str:
    """Return what the check of the sandbox says in a user namespace in which `setup` has been run."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces")
    command = ["unshare", "--user", *options, "sh", "-euc", f'{setup}; exec "$@"', "sh", sys.executable, "-c", CHECK]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@needs_sandbox
def test_a_user_without_rights_has_the_sandbox_too() -> None:
    assert check_in_namespace("true", "--map-user=1000", "--map-group=1000") == ""


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide a part of /proc")
def test_container_that_hides_a_part_of_proc_is_a_warning() -> None:
    user = ["unshare", "--user", "--map-user=1000", "--map-group=1000", sys.executable, "-c", CHECK]
    command = ["unshare", "--mount", "sh", "-euc", 'mount -t tmpfs none /proc/fs; exec "$@"', "sh", *user]
    checked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert checked.stdout == ""
    assert checked.stderr.count("warning: ") == 1
    assert "an empty /proc" in checked.stderr


@needs_sandbox
@pytest.mark.parametrize(("name", "wall"), [("mnt", "mount"), ("net", "network"), ("pid", "pid"), ("ipc", "ipc")])
def test_missing_wall_is_named_before_code_runs(name: str, wall: str) -> None:
    said = check_in_namespace(f"echo 0 > /proc/sys/user/max_{name}_namespaces", "--map-root-user")
    assert said.startswith("missing_sandbox")
    assert f"a {wall} namespace" in said


def test_no_code_runs_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    code_execution._check_sandbox.cache_clear()
    monkeypatch.setattr(code_walls, "__file__", "/nowhere")
    with pytest.raises(OpdctlError) as caught:
        graded(program("return x"))
    assert caught.value.kind == "missing_sandbox"
    code_execution._check_sandbox.cache_clear()
