"""GPQA: prompts with four choices in an order that depends on the problem alone."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.gpqa import CHOICES, read_gpqa
from opdctl.recipe.schema import Eval

ROWS = [
    {"Record ID": f"rec{n}", "Question": f"What is {n}?\n", CHOICES[0]: f"right {n}"}
    | {column: f"wrong {n}{letter}" for column, letter in zip(CHOICES[1:], "abc", strict=True)}
    for n in range(400)
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "Subdomain"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_prompt_asks_for_the_letter(tmp_path: Path) -> None:
    benchmark = find_benchmark("gpqa_diamond", Eval(grader="text"))
    problem, *_ = benchmark.problems(None, write(tmp_path / "gpqa_diamond.csv", ROWS))
    choices = problem.text.splitlines()[-4:]
    assert "before answering.\n\nWhat is 0?\n\nA) " in problem.text
    assert problem.text.startswith("Answer the following multiple choice question. The last line")
    assert "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD." in problem.text
    assert [choice[:3] for choice in choices] == ["A) ", "B) ", "C) ", "D) "]
    assert {choice[3:] for choice in choices} == {ROWS[0][column] for column in CHOICES}
    assert f"{problem.answer}) right 0" in choices
    assert (problem.id, benchmark.prompt_suffix(Eval()), benchmark.grader.name) == ("rec0", "", "choice")


def test_order_depends_on_the_problem_alone(tmp_path: Path) -> None:
    benchmark = find_benchmark("gpqa_diamond", Eval())
    problems = benchmark.problems(None, write(tmp_path / "gpqa_diamond.csv", ROWS))
    assert benchmark.problems(5, tmp_path) == problems[:5]
    assert list(read_gpqa(iter(ROWS[::-1]), "here"))[::-1] == problems
    counts = Counter(problem.answer for problem in problems)
    assert set(counts) == set("ABCD")
    assert max(counts.values()) < 140  # of 400, 100 expected: 4.6 standard deviations
    orders = Counter(tuple(line[3:8] for line in problem.text.splitlines()[-4:]) for problem in problems)
    assert len(orders) == 4  # the right choice at each place; of the wrong ones the first five characters are equal


def test_gold_letter_is_that_of_the_correct_answer() -> None:
    for problem in read_gpqa(iter(ROWS[:50]), "here"):
        assert f"\n{problem.answer}) right " in problem.text


def test_gated_data_set_says_how_to_get_it() -> None:
    with pytest.raises(OpdctlError) as caught:
        find_benchmark("gpqa_diamond", Eval()).problems(None, None)
    assert caught.value.kind == "failed_download"
    assert "--data FILE_OR_DIR, such as gpqa_diamond.jsonl" in str(caught.value.hint)
    assert "accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, set HF_TOKEN" in str(caught.value.hint)


def test_row_without_a_choice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", [{"Question": "Why?", "Record ID": "a"}])
    with pytest.raises(OpdctlError, match=r"row 1: no column `Correct Answer`"):
        find_benchmark("gpqa_diamond", Eval()).problems(None, path)
    with pytest.raises(OpdctlError, match=r"row 1: `Question` is null"):
        list(read_gpqa(iter([ROWS[0] | {"Question": None}]), "here"))
