"""Responses to code tasks, graded by opdctl and by EvalPlus' own commands: the verdicts are the same."""

import json
import os
import random
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import code_mutants
from helpers.code_sandbox import needs_sandbox

from opdctl.evaluation import code_execution, code_sandbox
from opdctl.evaluation.code_execution import CODE_GRADER, load_tasks

pytestmark = needs_sandbox

DATA = Path(__file__).parents[1] / "data" / "code-responses"
FILES = {"humaneval": DATA / "HumanEvalPlus.jsonl", "mbpp": DATA / "MbppPlus.jsonl"}
RESPONSES: list[dict[str, Any]] = tomllib.loads((DATA / "responses.toml").read_text("utf-8"))["response"]
COMMANDS = """\
evalplus.sanitize --samples "$2"
evalplus.evaluate --dataset "$1" --samples "${2%.jsonl}-sanitized.jsonl" \\
  --min-time-limit "$3" --gt-time-limit-factor "$4"
"""


def start_evalplus(dataset: str, golds: Mapping[str, str], directory: Path) -> subprocess.Popen[str]:
    """Start EvalPlus' commands on the responses to a data set, without their thinking."""
    samples = [
        {"task_id": each["task"], "solution": each["text"].rpartition("</think>")[2]}
        for each in RESPONSES
        if json.loads(golds[each["task"]])["dataset"] == dataset
    ]
    path = directory / f"{dataset}.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    rules = CODE_GRADER.rules
    limits = [str(rules["min_time_limit_seconds"]), str(rules["gt_time_limit_factor"])]
    program_path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    overrides = {"HUMANEVAL_OVERRIDE_PATH": str(FILES["humaneval"]), "MBPP_OVERRIDE_PATH": str(FILES["mbpp"])}
    return subprocess.Popen(
        ["bash", "-euc", COMMANDS, "bash", dataset, str(path), *limits],
        env={**os.environ, **overrides, "XDG_CACHE_HOME": str(directory), "PATH": program_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def verdicts_of_evalplus(dataset: str, directory: Path) -> Iterator[tuple[str, bool]]:
    """Yield task and verdict of each response, in their order among the responses to that task."""
    evaluated = json.loads((directory / f"{dataset}-sanitized_eval_results.json").read_text())["eval"]
    for task, results in evaluated.items():
        for result in results:
            yield task, result["base_status"] == result["plus_status"] == "pass"


def by_task(verdicts: Sequence[tuple[str, bool]]) -> dict[str, list[bool]]:
    """Return the verdicts of each task."""
    return {task: [correct for name, correct in verdicts if name == task] for task, _ in verdicts}


def test_responses_are_graded_as_by_the_commands_of_evalplus(tmp_path: Path) -> None:
    golds = {problem.id: problem.answer or "" for name in FILES for problem in load_tasks(name, FILES[name])}
    processes = [start_evalplus(dataset, golds, tmp_path) for dataset in FILES]
    grades = CODE_GRADER.grade([(golds[each["task"]], each["text"]) for each in RESPONSES])
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    evalplus = [verdict for dataset in FILES for verdict in verdicts_of_evalplus(dataset, tmp_path)]
    expected = [(each["task"], each["correct"]) for each in RESPONSES]
    wrong = [each["name"] for each, grade in zip(RESPONSES, grades, strict=True) if grade.correct != each["correct"]]
    assert wrong == []
    assert by_task(evalplus) == by_task(expected)
    assert len(RESPONSES) == 40


def test_mutants_are_graded_as_by_evalplus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of `python -m helpers.code_mutants`."""
    monkeypatch.setattr(code_execution, "MIN_TIME_LIMIT_SECONDS", code_mutants.TIME_LIMIT_SECONDS)
    solutions = [code_mutants.Mutant(task, task["canonical_solution"]) for task in code_mutants.TASKS]
    answers = solutions + random.Random(0).sample(code_mutants.mutants(), 30)
    verdicts = code_mutants.grade_by_opdctl(answers)
    assert verdicts == code_mutants.grade_by_evalplus(answers)
    assert all(verdicts[: len(solutions)])
    assert not all(verdicts)


def test_extracted_lines_are_those_of_evalplus() -> None:
    from evalplus.sanitize import code_extract

    lines = ["", "  ", "x = 1", "def f():", "    return x", "if x:", "else:", '"""', "So the sum is", "(", ")", "```"]
    draw = random.Random(0)
    texts = ["\n".join(draw.choices(lines, k=draw.randint(1, 12))) for _ in range(300)]
    for text in [*texts, *(each["text"] for each in RESPONSES)]:
        assert code_sandbox.longest_valid_lines(text) == code_extract(text)


def test_repeated_code_is_parsed_once_per_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from evalplus import syncheck

    parsed = []
    monkeypatch.setattr(syncheck, "syntax_check", lambda code: parsed.append(code) or True)
    text = "\n".join(["x = 1"] * 1600)
    assert code_sandbox.longest_valid_lines(text) == text
    assert len(parsed) == 1599  # EvalPlus parses 1600 * 1599 / 2 runs of lines


def test_sandbox_outlasts_both_checks_of_evalplus(monkeypatch: pytest.MonkeyPatch) -> None:
    from evalplus import eval as evalplus_eval

    class Process:
        seconds = 0.0

        def __init__(self, **arguments: Any): ...

        def start(self) -> None: ...

        def join(self, timeout: float) -> None:
            Process.seconds = timeout

        def is_alive(self) -> bool:
            return False

    monkeypatch.setattr(evalplus_eval.multiprocessing, "Process", Process)
    many = [[1]] * 100
    evalplus_eval.untrusted_check("humaneval", "", many, "f", many, 0, [9.0] * 100, fast_check=True)
    assert Process.seconds == 62
    # The rest is for the extraction and the reference solution.
    assert 2 * Process.seconds + 60 < code_execution.CODE_TIMEOUT_SECONDS
