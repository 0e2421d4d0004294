"""The tasks of HumanEval+ and MBPP+ in files of EvalPlus. acceptance/test_code_sandbox.py grades real programs."""

import gzip
import json
from pathlib import Path

import pytest

from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.code_execution import SELF_TEST_TASK, TASK_KEYS
from opdctl.recipe.schema import Eval

TASKS = [SELF_TEST_TASK | {"task_id": f"HumanEval/{number}", "atol": 0.1 * number} for number in (900, 901)]


@pytest.mark.parametrize("name", ["HumanEvalPlus.jsonl", "HumanEvalPlus.jsonl.gz"])
def test_problems_of_a_local_evalplus_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = "".join(json.dumps(task | {"contract": "", "test": "…"}) + "\n" for task in TASKS)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    problems = find_benchmark("humaneval_plus", Eval()).problems(None, path)
    assert [problem.id for problem in problems] == ["HumanEval/900", "HumanEval/901"]
    assert problems[0].text == "def echo(x):\n"
    assert json.loads(problems[1].answer or "") == {"dataset": "humaneval"} | {key: TASKS[1][key] for key in TASK_KEYS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task_id": "a"}\n', r"tasks\.jsonl:1: .* prompt, entry_point"),
        ("[1]\n", r"tasks\.jsonl:1: .* task_id, prompt"),
        ("nonsense\n", r"tasks\.jsonl: .*JSON Lines"),
        ("", r"tasks\.jsonl: no problems"),
    ],
)
def test_file_without_tasks_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(OpdctlError, match=message) as caught:
        find_benchmark("mbpp_plus", Eval()).problems(None, path)
    assert caught.value.kind == "invalid_data"
