"""Programs for problems of LiveCodeBench in the real sandbox."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.code_sandbox import needs_sandbox
from helpers.commands import invoke, sets
from helpers.evaluations import TRANSFORMERS
from helpers.livecodebench import ADD, SCALE, question, write_questions
from helpers.tokenizers import NUM_IDS, write_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdctl.evaluation import livecodebench
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.graders import Grade
from opdctl.evaluation.results import load_evaluation
from opdctl.recipe.schema import Eval

pytestmark = needs_sandbox
DEEP = question("deep", [("20000", "20000")], [])
ECHO = question("echo", [("x" * 2**21, "x" * 2**21)], [("y", "y")])
SECRET = question("secret", [("a", "swordfish")], [("b", "swordfish")])
SUM = "print(sum(map(int, input().split())))"
SCALED = "class Solution:\n    def scale(self, xs: List[int], k: int):\n        return [x * k for x in xs]"
EQUAL = """\
class Equal(list):
    def __eq__(self, other): return True
class Solution:
    def scale(self, xs, k): return Equal([7])
"""
FORGED = """\
import os
for fd in range(64):
    try:
        os.write(fd, b'["value", 0, "swordfish"]\\n')
    except OSError:
        pass
"""
HANGING = """\
import signal
signal.signal(signal.SIGALRM, signal.SIG_IGN)
while True:
    try:
        pass
    except BaseException:
        pass
"""
SEARCH = """\
import gc, glob, os, sys
found = []
for path in ["/proc/self/environ", "/proc/self/cmdline", *glob.glob("/tmp/*")]:
    try:
        found.append(os.read(os.open(path, os.O_RDONLY), 2**20))
    except OSError:
        pass
for fd in range(3, 64):
    try:
        found.append(os.read(fd, 2**20))
    except OSError:
        pass
frame = sys._getframe()
while frame:
    found += [*frame.f_locals.items(), *frame.f_globals.items()]
    frame = frame.f_back
text = repr([found, [each for each in gc.get_objects() if type(each) in (dict, list, tuple)]])
print("sword" + "fish" if "sword" + "fish" in text else "nothing")
"""
GradeProgram = Callable[[dict[str, Any], str], Grade]


@pytest.fixture(scope="module")
def grade(tmp_path_factory: pytest.TempPathFactory) -> GradeProgram:
    """Grades a program for a question."""
    source = find_benchmark("livecodebench", Eval())
    path = write_questions(tmp_path_factory.mktemp("lcb") / "rows.jsonl", [ADD, SCALE, DEEP, ECHO, SECRET])
    golds = {problem.id: problem.answer or "" for problem in source.problems(None, path)}

    def grade(row: dict[str, Any], code: str) -> Grade:
        (graded,) = source.grader.grade([(golds[row["question_id"]], f"So:\n```python\n{code}\n```\nDone.")])
        return graded

    return grade


CORRECT = {
    "input": (ADD, SUM),
    "stdin": (ADD, "import sys\nprint(sum(map(int, sys.stdin.read().split())))"),
    "bytes": (ADD, "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.readline().split())))"),
    "file descriptors": (ADD, "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))"),
    "opened stdin": (ADD, "print(sum(map(int, open(0).read().split())))"),
    "main": (ADD, f"def main():\n    {SUM}\nif __name__ == '__main__':\n    main()"),
    "exit": (ADD, f"import sys\n{SUM}\nsys.exit(1)"),
    "decimals": (ADD, "print(f'{sum(map(int, input().split())):.3f}  ')"),
    "no imports": (ADD, "print(reduce(add, map(int, input().split())))"),  # functools and operator
    "thread": (ADD, f"import threading\nt = threading.Thread(target=lambda: {SUM})\nt.start()\nt.join()"),
    "deep recursion": (DEEP, "def depth(n):\n    return 1 + depth(n - 1) if n else 0\nprint(depth(int(input())))"),
    "large": (ECHO, "print(input())"),
    "method": (SCALE, SCALED),
    "tuple": (SCALE, SCALED.replace("[x * k for x in xs]", "tuple(x * k for x in xs)")),
    "function": (SCALE, "def scale(xs, k):\n    print('noise')\n    return [x * k for x in xs]"),
}
INCORRECT = {
    "public tests alone": (ADD, "print(3)", "ok"),
    "private tests alone": (ADD, "print(12)", "ok"),
    "exception": (ADD, f"{SUM}\n1 / 0", "ok"),
    "no Python": (ADD, "print(", "ok"),
    "no output": (ADD, "input()", "ok"),
    "global": (ADD, "n = 0\ndef f():\n    global n\n    n = sum(map(int, input().split()))\nf()\nprint(n)", "ok"),
    "other value": (SCALE, SCALED.replace("x * k", "x"), "ok"),
    "no such method": (SCALE, SCALED.replace("scale", "other"), "ok"),
    "equal to all": (SCALE, EQUAL, "ok"),
    "too long": (SECRET, "while True: print('x' * 2**20)", "ok"),
    "exit code": (ADD, "import os\nos._exit(7)", "crash"),
    "segmentation fault": (SCALE, "import ctypes\nctypes.string_at(0)", "crash"),
    "forged messages": (SECRET, FORGED, "ok"),
    "search for the expected output": (SECRET, SEARCH, "ok"),
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_program_passes(grade: GradeProgram, name: str) -> None:
    row, code = CORRECT[name]
    assert grade(row, code) == Grade(code, True, "ok")


@pytest.mark.parametrize("name", INCORRECT)
def test_incorrect_program_fails(grade: GradeProgram, name: str) -> None:
    row, code, verdict = INCORRECT[name]
    assert grade(row, code) == Grade(code, False, verdict)


def test_search_finds_what_is_in_the_sandbox(grade: GradeProgram) -> None:
    assert grade(SECRET, SEARCH.replace("found = []", "found = ['sword' + 'fish']")).correct


@pytest.mark.parametrize("row", [ADD, SCALE], ids=["program", "function"])
def test_time_limit_of_a_test_ends_it(
    grade: GradeProgram, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livecodebench, "TIME_LIMIT_SECONDS", 0.5)
    assert grade(row, HANGING) == Grade(HANGING, False, "ok")


def test_response_without_a_block_of_code_is_no_answer(grade: GradeProgram) -> None:
    assert grade(ADD, "") == Grade(None, False, "no_answer")


def test_model_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model of bytes, whose responses are replaced by one program."""
    model = tmp_path / "model"
    config = {"vocab_size": NUM_IDS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(model)
    stored = (model / "config.json").read_text()
    write_tokenizer(model)
    (model / "config.json").write_text(stored)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(livecodebench, "extract_program", lambda response: SUM)
    old = question("old", [("1", "1")], [], contest_date="2024-02-01")
    write_questions(Path("data/test6.jsonl"), [ADD, old, SECRET])
    settings = ("eval.release_version=v6", "eval.start_date=2025-01-01", "eval.max_tokens=4", "eval.samples=2")
    options = ("--bench", "livecodebench", "--data", "data", *sets(*settings, *TRANSFORMERS[:2]))
    command = ("eval", "--model", model, *options, "--log-samples", "samples.jsonl")
    refused = invoke(*command)
    assert (refused.code, refused.kind) == (2, "code_execution_disabled")
    plan = invoke(*command, "--allow-code-execution", "--dry-run", "--json")
    assert (plan.code, plan.json()["benches"][0]["problems"]) == (0, 2), plan.err
    result = invoke(*command, "--allow-code-execution", "--json")
    assert result.code == 0, result.err
    summary = result.json()
    assert (summary["problems"], summary["avg"], summary["verdicts"]) == (2, 0.5, {"ok": 4})
    assert (summary["protocol"]["release_version"], summary["protocol"]["start_date"]) == ("v6", "2025-01-01")
    rows = load_evaluation(Path("eval/livecodebench") / summary["model"]).rows()
    assert [row.correct for row in rows] == [True, True, False, False]
    assert max(len(row.gold) for row in rows) < 150
    sample = json.loads(Path("samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("<|im_start|>system\nYou are an expert Python programmer.")
    assert "<|im_end|>\n<|im_start|>user\n### Question:\nSolve add.\n\n### Format: Read" in sample["prompt"]
