"""The agents of docs/agents.md: one with a calculator on the toy task calc, and one with Python, also with SmolLM2."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from helpers.commands import QUICKSTART, ROOT, invoke, sets
from helpers.documents import code_blocks

from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows
from opdctl.data.toy import calculator_agent

PAGE = ROOT / "docs" / "agents.md"
CALCULATOR, PYTHON = code_blocks(PAGE, "python")
SMOLLM2 = "OPDCTL_SMOLLM2"


def rewards(run: Path, step: int) -> list[float | None]:
    files = sorted((run / f"step-{step:05d}" / "rollout").glob("*.parquet"))
    return [row.reward for file in files for row in read_rows(file, Response)]


def answer_with(monkeypatch: pytest.MonkeyPatch, module: ModuleType, answers: list[str]) -> list[dict[str, Any]]:
    """Let a student write `answers`; return the list of requests that it gets."""
    requests: list[dict[str, Any]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/chat/completions"
        requests.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": answers[len(requests) - 1]}}]})

    monkeypatch.setattr(module.httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(respond)))
    return requests


# ── The calculator ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_calculator_of_the_page_is_the_module_in_forty_lines() -> None:
    assert Path(str(calculator_agent.__file__)).read_text() == CALCULATOR
    assert len(CALCULATOR.splitlines()) <= 40


@pytest.mark.parametrize(
    ("answers", "outputs", "reward"),
    [
        (["37+48=", "85-15=", ">70"], ["85;", "70;"], 1.0),
        (["37+43=", "80-15=", ">65"], ["80;", "65;"], 0.0),
        (["37+", ">70"], [], 0.0),
        (["="] * 9, ["?;"] * 9, 0.0),
    ],
)
def test_calculator_answers_calls(
    answers: list[str], outputs: list[str], reward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = answer_with(monkeypatch, calculator_agent, answers)
    row = {"id": "0", "prompt": "37+48-15?", "answer": "70"}
    assert calculator_agent.solve(row, "http://127.0.0.1:1/v1") == reward
    messages = requests[-1]["messages"]
    assert [each["content"] for each in messages if each["role"] == "tool"] == outputs[: len(requests) - 1]
    assert len(requests) <= calculator_agent.MAX_TURNS


def test_reward_of_the_calculator_agent_rises(tmp_path: Path) -> None:
    """By 0.5 in eight steps, as a rule. A mean of 64 rewards has a standard error of at most 0.06."""
    recipes = ["--recipe", QUICKSTART, "--recipe", "variants/calculator"]
    result = invoke("train", *recipes, *sets("train.steps=8", "pipeline.threads=1"), "--output", tmp_path / "run")
    assert result.code == 0, result.err
    result = invoke("rollout", "--run", tmp_path / "run", "--step", 8)
    assert result.code == 0, result.err
    before, after = (rewards(tmp_path / "run", step) for step in (0, 8))
    assert {*before, *after} == {0.0, 1.0}
    assert sum(map(float, after)) / len(after) > 0.25 + sum(map(float, before)) / len(before)


# ── Python ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def python_agent(tmp_path: Path) -> ModuleType:
    """The module of the page."""
    path = tmp_path / "python_agent.py"
    path.write_text(PYTHON)
    spec = importlib.util.spec_from_file_location("python_agent", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python_agent_runs_programs(python_agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["```python\nprint(6 * 9)\n```", "It is 54.", "It is 6 or 9.", *["```python\nprint(54)\n```"] * 3]
    requests = answer_with(monkeypatch, python_agent, answers)
    row = {"prompt": "Write a Python program that prints 6 * 9.", "answer": "54"}
    assert python_agent.solve(row, "http://127.0.0.1:1/v1") == 1.0
    assert [each["content"] for each in requests[1]["messages"][-3:]] == [row["prompt"], answers[0], "Output: 54"]
    assert python_agent.solve(row, "http://127.0.0.1:1/v1") == 0.0
    assert python_agent.solve(row, "http://127.0.0.1:1/v1") == 0.0  # it never answers
    assert len(requests) == 6


def test_output_of_a_program(python_agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert python_agent.run_python("print(6)\nprint(7)") == "6\n7"
    assert python_agent.run_python("1 / 0").endswith("ZeroDivisionError: division by zero")
    assert python_agent.run_python("input()").endswith("EOFError: EOF when reading a line")
    assert len(python_agent.run_python("print('7' * 9999)")) == 200
    monkeypatch.setattr(python_agent, "SECONDS", 0.2)
    assert python_agent.run_python("while True: pass") == "no result after 0.2 seconds"


@pytest.mark.skipif(SMOLLM2 not in os.environ, reason=f"needs a model directory in {SMOLLM2}: tests/bench/smollm2.py")
@pytest.mark.timeout(3600)
def test_python_agent_makes_two_steps_with_smollm2(
    python_agent: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    terms = [f"{a} {sign} {b}" for a in range(21, 29) for sign in "+-" for b in (13, 34)]
    rows = [{"prompt": f"Write a Python program that prints {term}.", "answer": str(eval(term))} for term in terms]
    Path("programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (recipe,) = (text for text in code_blocks(PAGE, "toml") if "python_agent" in text)
    Path("python_agent.toml").write_text(recipe)
    model = os.environ[SMOLLM2]
    settings = sets(
        f"student.model={model}", f"teacher.model={model}", "rollout.prompts_per_step=4", "rollout.num_parts=1"
    )
    command = [sys.executable, "-m", "opdctl", "train", "--recipe", "python_agent.toml", *settings, "--output", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = rewards(Path("run"), 0) + rewards(Path("run"), 1)
    assert len(found) == 8
    assert 1.0 in found
