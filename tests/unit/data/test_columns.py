"""Columns of the user's data, found by their usual names, in training and in evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from opdctl import console
from opdctl.data.columns import PROMPT_COLUMNS
from opdctl.data.prompts import load_problems
from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.recipe.prompts import Prompts
from opdctl.recipe.schema import Eval

CHAT = [{"role": "user", "content": "1+1?"}]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def training_texts(source: str, **settings: Any) -> list[str]:
    return [problem.text for problem in load_problems(Prompts(source=source, **settings))]


def evaluation_texts(source: str, **settings: Any) -> list[str]:
    return [problem.text for problem in find_benchmark(source, Eval(**settings)).problems(None, None)]


@pytest.mark.parametrize("read", [training_texts, evaluation_texts])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        *(({name: "1+1?"}, "1+1?") for name in PROMPT_COLUMNS),
        *(({name: CHAT}, "1+1?") for name in PROMPT_COLUMNS),
        ({"instruction": "Add.", "input": "1, 1"}, "Add.\n\n1, 1"),
        ({"instruction": "Add 1, 1.", "input": ""}, "Add 1, 1."),
        ({"instruction": "Add 1, 1.", "input": None}, "Add 1, 1."),
        ({"prompt": "1+1?", "input": "2+2?"}, "1+1?"),  # `input` belongs to `instruction`
        ({"question": "2+2?", "problem": "3+3?", "messages": CHAT}, "1+1?"),
        ({"messages": [{"role": "user", "content": "3?"}], "prompt": "1+1?"}, "1+1?"),
        ({"question": "2+2?", "problem": "3+3?", "prompt": None}, "3+3?"),
    ],
)
def test_usual_column_is_found(tmp_path: Path, read: Any, row: dict[str, Any], text: str) -> None:
    assert read(write(tmp_path / "p.jsonl", {**row, "answer": "2"})) == [text]


def test_named_column_comes_first_and_stands_alone(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "instruction": "Add.", "input": "1", "nested": {"text": "2+2?"}, "answer": "2"}
    source = write(tmp_path / "p.jsonl", row)
    assert training_texts(source, prompt_column="instruction") == ["Add."]
    assert training_texts(source, prompt_column="nested.text") == ["2+2?"]
    assert evaluation_texts(source, problem_column="instruction") == ["Add."]
    assert evaluation_texts(source, problem_column="nested.text") == ["2+2?"]


def test_found_column_is_logged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.info_once.cache_clear()
    row = {"instruction": "Add.", "input": "1", "answer": "2"}
    source = write(tmp_path / "p.jsonl", row, row)
    training_texts(source)
    evaluation_texts(source)
    assert capsys.readouterr().err.splitlines() == [
        "prompts.prompt_column: instruction and input",
        "eval.problem_column: instruction and input",
    ]
    training_texts(source, prompt_column="instruction")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("read", "key"), [(training_texts, "prompts.prompt_column"), (evaluation_texts, "eval.problem_column")]
)
def test_unusual_columns_are_listed(tmp_path: Path, read: Any, key: str) -> None:
    source = write(tmp_path / "p.jsonl", {"task": "1+1?", "answer": "2"})
    with pytest.raises(OpdctlError, match=r"p.jsonl: row 1: no column `prompt` or `messages` or") as caught:
        read(source)
    assert caught.value.hint == f"set {key} to one of the columns `task`, `answer`"


@pytest.mark.parametrize("read", [training_texts, evaluation_texts])
def test_columns_of_images_are_refused_unless_they_are_empty(tmp_path: Path, read: Any) -> None:
    row = {"prompt": "1+1?", "answer": "2"}
    assert read(write(tmp_path / "p.jsonl", {**row, "images": [], "image": None})) == ["1+1?"]
    source = write(tmp_path / "p.jsonl", {**row, "images": [{"bytes": None, "path": "a.png"}]})
    with pytest.raises(OpdctlError, match=r"row 1: `images` is not empty: images, audio and video are not supported"):
        read(source)
