"""Programs that try to pass without the right values, in the real sandbox: none does."""

import json
import textwrap
from typing import Any

import pytest
from helpers.code_sandbox import needs_sandbox

from opdctl.evaluation.code_execution import CODE_GRADER, SELF_TEST_TASK
from opdctl.evaluation.graders import Grade

pytestmark = needs_sandbox

NUMBER = SELF_TEST_TASK | {
    "task_id": "number",
    "prompt": "def number(x):\n",
    "entry_point": "number",
    "canonical_solution": "    return (x * 7919 + 12345) % 1000003\n",
    "base_input": [[1], [2]],
    "plus_input": [[3]],
}
RATIO = NUMBER | {"canonical_solution": "    return (x * 7919 + 12345) % 1000003 / 1000003\n"}
ZERO = NUMBER | {  # EvalPlus accepts any zero of the polynomial that it finds in the input after the call
    "prompt": "def find_zero(xs):\n",
    "entry_point": "find_zero",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "base_input": [[[1, 2]]],
    "plus_input": [[[3, 2]]],
    "atol": 1e-4,
}
SHARED = SELF_TEST_TASK | {  # EvalPlus compares the sets of the elements
    "dataset": "mbpp",
    "task_id": "Mbpp/769",
    "prompt": "",
    "entry_point": "Diff",
    "canonical_solution": "def Diff(a, b):\n    return list(set(a) ^ set(b))\n",
    "base_input": [[[1, 2], [2, 3]]],
    "plus_input": [[[5], [6]]],
}
EQUALS_ALL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    {extra}
"""
FRAMES = """
import sys
frame = sys._getframe()
found = []
while frame:
    for name, value in frame.f_locals.items():
        if name in ("expected", "exp", "reference"):
            found.append(value)
    frame = frame.f_back
return found[-1][x - 1] if found and isinstance(found[-1], list) else found[-1]
"""
SHARED_MEMORY = """
import os, sys
frame = sys._getframe()
while frame:
    if "stat" in frame.f_locals and "details" in frame.f_locals:
        frame.f_locals["stat"].value = 0
        details, progress = frame.f_locals["details"], frame.f_locals["progress"]
        for i in range(len(details)):
            details[i] = True
        progress.value = len(details)
        os._exit(0)
    frame = frame.f_back
"""
MAPPED_MEMORY = """
import gc, mmap, os
for each in gc.get_objects():
    for value in gc.get_referents(each):
        if isinstance(value, mmap.mmap):
            value[:] = b"\\x01" * len(value)
            value[0:8] = b"\\0" * 8
os._exit(0)
"""
GARBAGE = """
import gc
lists = [each for each in gc.get_objects() if isinstance(each, list) and each and all(type(i) is int for i in each)]
right = [each for each in lists if each[0] > 5000]
return right[0][x - 1]
"""
TRACE = """
import sys
def trace(frame, event, argument):
    for name in ("exact_match", "is_equal"):
        if name in frame.f_locals:
            frame.f_locals[name] = True
    return trace
frame = sys._getframe().f_back
while frame:
    frame.f_trace = trace
    frame = frame.f_back
sys.settrace(trace)
return 0
"""
NUMPY = """
import numpy
numpy.allclose = numpy.isclose = numpy.array_equal = lambda *arguments, **options: True
return 0.5
"""
BUILTINS = """
import builtins
for name in ("all", "any", "bool", "isinstance"):
    setattr(builtins, name, lambda *arguments: True)
builtins.type = lambda value: int
builtins.abs = lambda value: 0
builtins.set = lambda value: 0
builtins.len = lambda value: 1
return 0
"""
ENCODER = """
import json, sys
main = sys.modules["__main__"]
main.encode = lambda value: ["object"]
json.dumps = lambda message: '["value", 0.0, true]'
return 0
"""
DESCRIPTORS = """
import os
lines = ['["value", 0.0, true]', '["end", "ended", 0]', '["end", "ended"]', '["pass"]']
lines += ['{"status": "pass", "code": ""}', '["value", 0, NaN]']
for descriptor in range(64):
    for line in lines:
        try:
            os.write(descriptor, b"\\n" + line.encode() + b"\\n")
        except OSError:
            pass
os._exit(0)
"""
EXECUTED = '''
import os, sys
program = """
import os
for fd in range(9):
    try: os.write(fd, b'["end", "ended", 0]\\n' * 9)
    except OSError: pass
"""
os.execv(sys.executable, [sys.executable, "-c", program])
'''
PROCESSES = """
import io, os
found = []
for process in os.listdir("/proc"):
    for name in ("cmdline", "environ"):
        try:
            found.append(io.open("/proc/" + process + "/" + name).read())
        except OSError:
            pass
assert any("canonical" in text or "opdctl" in text or "pytest" in text for text in found)
return 0
"""
PARENT_MEMORY = """
import io, re
for line in io.open("/proc/1/maps"):
    first, last = (int(text, 16) for text in line.split()[0].split("-"))
    memory = io.open("/proc/1/mem", "rb", buffering=0)
    memory.seek(first)
    try:
        found = re.search(rb"canonical_solution.{0,9}(return[^\\"]*)", memory.read(last - first))
    except (OSError, OverflowError):
        continue
    if found:
        return eval(found[1].decode().removeprefix("return").split("\\\\n")[0])
"""
FILES = f"""
import io, os
for root, folders, names in os.walk("/"):
    folders[:] = [name for name in folders if name not in ("usr", "lib", "proc")]
    for name in names:
        if name.endswith((".jsonl", ".jsonl.gz")) or name == os.path.basename({__file__!r}):
            text = io.open(os.path.join(root, name)).read()
            if "7919" in text:
                return (x * 7919 + 12345) % 1000003
"""
LAZY = """
class Lazy(list):
    def __iter__(self): return iter([])
    def __len__(self): return 1
    def __eq__(self, other): return True
return Lazy()
"""
GENERATOR = """
import sys
def lazy():
    frame = sys._getframe()
    while frame:
        if "exp" in frame.f_locals:
            yield from frame.f_locals["exp"]
            return
        frame = frame.f_back
return lazy()
"""
THREAD = """
import threading
def change(values):
    while True:
        values[:] = [lambda other: True]
values = [0]
threading.Thread(target=change, args=(values,), daemon=True).start()
return values
"""
AT_EXIT = """
import atexit, os
atexit.register(lambda: os._exit(0))
raise SystemExit(0)
"""
SIGNALS = """
import os, signal
for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
    signal.signal(number, lambda *arguments: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.01)
while True: pass
"""
KILLS = """
import ctypes
libc = ctypes.CDLL(None)
for process in range(-1, 40):
    libc.kill(process, 9)
return 0
"""
ARRAY = """
class Array:
    def __array__(self, *arguments, **options):
        import numpy
        return numpy.array(numpy.nan)
    def __array_ufunc__(self, *arguments, **options): return True
    def __array_function__(self, *arguments, **options): return True
    def __eq__(self, other): return True
    __class__ = float
return Array()
"""
SUBCLASSED_ARRAY = """
import numpy
class Array(numpy.ndarray):
    def __eq__(self, other): return True
    def tolist(self): return [True]
return numpy.zeros(1).view(Array)
"""
NONSENSE = """
import os
for descriptor in range(9):
    try:
        os.write(descriptor, b"[" * 100000 + b"\\n")
    except OSError:
        pass
os._exit(0)
"""
FLOOD = """
import os
while True:
    os.write(3, b"[" * 2**16)
"""


def equal(base: str = "", extra: str = "", value: str = "Equal()") -> str:
    return EQUALS_ALL.format(base=base, extra=extra) + f"return {value}\n"


CHEATS: dict[str, tuple[dict[str, Any], str]] = {
    "object that equals all": (NUMBER, equal()),
    "object that claims a type": (RATIO, equal(extra="__class__ = float")),
    "int that equals all": (NUMBER, equal("(int)", value="Equal(0)")),
    "float that equals all": (RATIO, equal("(float)", value="Equal(0)")),
    "text that equals all": (NUMBER, equal("(str)", value="Equal('')")),
    "metaclass": (NUMBER, equal("(type)", value="Equal('T', (), {})")),
    "array protocol": (RATIO, ARRAY),
    "subclassed array": (RATIO, SUBCLASSED_ARRAY),
    "lazy list": (NUMBER, LAZY),
    "lazy set of elements": (SHARED, GENERATOR),
    "elements that equal all": (SHARED, equal(value="[Equal()]")),
    "changed input": (ZERO, "xs.clear()\nreturn 0\n"),
    "object with arithmetic": (ZERO, equal(extra="__float__ = __rmul__ = __abs__ = lambda *_: 0.0")),
    "frames": (NUMBER, FRAMES),
    "shared memory of EvalPlus": (NUMBER, SHARED_MEMORY),
    "mapped memory": (NUMBER, MAPPED_MEMORY),
    "garbage collector": (NUMBER, GARBAGE),
    "trace function": (NUMBER, TRACE),
    "patched numpy": (RATIO, NUMPY),
    "patched builtins": (NUMBER, BUILTINS),
    "patched encoder": (NUMBER, ENCODER),
    "inherited descriptors": (NUMBER, DESCRIPTORS),
    "another program": (NUMBER, EXECUTED),
    "exit code 0": (NUMBER, "import os\nos._exit(0)\n"),
    "SystemExit": (NUMBER, "raise SystemExit(0)\n"),
    "exit handler": (NUMBER, AT_EXIT),
    "signal handlers": (NUMBER, SIGNALS),
    "kills": (NUMBER, KILLS),
    "thread": (NUMBER, THREAD),
    "other processes": (NUMBER, PROCESSES),
    "memory of the parent": (NUMBER, PARENT_MEMORY),
    "files": (NUMBER, FILES),
    "nonsense in the output": (NUMBER, NONSENSE),
    "endless output": (NUMBER, FLOOD),
}


@pytest.fixture(scope="module")
def grades() -> dict[str, Grade]:
    """The grade of each cheat and, as `honest`, of each task's reference solution."""
    pairs = {name: (task, _program(task, body)) for name, (task, body) in CHEATS.items()}
    for task in (NUMBER, RATIO, ZERO, SHARED):
        pairs[f"honest {task['canonical_solution']}"] = (task, task["prompt"] + task["canonical_solution"])
    graded = CODE_GRADER.grade([(json.dumps(task), code) for task, code in pairs.values()])
    return dict(zip(pairs, graded, strict=True))


def _program(task: dict[str, Any], body: str) -> str:
    parameters = {"find_zero": "xs", "Diff": "a, b"}.get(task["entry_point"], "x")
    return f"def {task['entry_point']}({parameters}):\n" + textwrap.indent(body, "    ")


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_fails(grades: dict[str, Grade], name: str) -> None:
    assert grades[name].extracted, "the code did not run"
    assert not grades[name].correct


def test_honest_code_beside_cheats_passes(grades: dict[str, Grade]) -> None:
    honest = [grade for name, grade in grades.items() if name.startswith("honest")]
    assert [(grade.correct, grade.verdict) for grade in honest] == [(True, "ok")] * 4
