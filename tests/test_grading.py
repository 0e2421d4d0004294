"""Grades: the answer that is read, the verdict on it, the benchmarks' gold answers, and averages with intervals."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from opdctl import grading
from opdctl.errors import ExitCode, OpdctlError
from opdctl.grading import Grade, last_boxed, mathematics
from opdctl.registry import BENCHMARKS
from opdctl.stats import average
from opdctl.tasks import sort12

DATA = ROOT.parent / "shared" / "benchmarks"

# ── What is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{1}, then \boxed{2} and no more", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{a} then \boxed{b", "a"),
        (r"\boxed{b", None),
        (r"\boxed{}", ""),
        ("no box", None),
        ("", None),
        (r"<think>\boxed{1}</think> so \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so 2", None),
        (r"<think>a</think>\boxed{1}</think>\boxed{2}", "2"),
        (r"<think>never ends \boxed{1}", "1"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{5.}", "5"),
        (r"\boxed{5\ }", "5"),
        (r"\boxed{$5$}", "5"),
        (r"\boxed{5.$}", "5"),
        (r"\boxed{$5$.}", "5"),
        (r"\boxed{0.5}", "0.5"),
        ("\\boxed{x\n+ 1}", "x\n+ 1"),
    ],
)
def test_the_last_whole_box_after_the_thinking_is_the_answer(response: str, answer: str | None) -> None:
    assert last_boxed(response) == answer


# ── How it is judged ─────────────────────────────────────────────────────────────────────────────────────────────────


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def test_integers_are_compared_as_integers() -> None:
    pairs = [("70", boxed("70")), ("70", boxed("070")), ("70", boxed("+70")), ("70", boxed("71")), ("-7", boxed("7"))]
    assert [grade.correct for grade in mathematics(pairs)] == [True, True, True, False, False]


def test_right_and_wrong_answers_are_told_apart() -> None:
    right = [
        (r"\frac{1}{2}", r"\frac{2}{4}"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "1/2"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x^2-1", "(x-1)(x+1)"),
        ("(3,4)", "(3, 4)"),
        ("1000", "1,000"),
        ("7", "7."),
    ]
    wrong = [
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        (r"\frac{1}{2}", "2"),
        (r"2\sqrt{2}", r"\sqrt{2}"),
        ("x^2-1", "x^2+1"),
        ("(3,4)", "(4,3)"),
    ]
    grades = mathematics([(gold, f"so {boxed(answer)}") for gold, answer in right + wrong])
    assert [grade.correct for grade in grades] == [True] * len(right) + [False] * len(wrong)
    assert {grade.verdict for grade in grades} == {"ok"}
    assert grades[0].extracted == r"\frac{2}{4}"


def test_no_answer_and_one_that_cannot_be_read_are_wrong_and_say_why() -> None:
    grades = mathematics([("7", "seven"), ("7", boxed("")), ("7", boxed("7"))])
    assert grades == [Grade(None, False, "no_answer"), Grade("", False, "unparsable"), Grade("7", True, "ok")]


def test_no_responses_get_no_grades() -> None:
    assert mathematics([]) == []


def test_an_answer_that_hangs_or_dies_costs_no_other_its_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "SECONDS", 3)
    poison = ["9^{9^{9^{9^9}}}", "((9!)!)!"]
    good = [(r"\frac{1}{2}", boxed("0.5")), (r"\frac{3}{4}", boxed("0.75"))]
    pairs = [("7", boxed(poison[0])), good[0], ("7", boxed(poison[1])), good[1], good[0], ("7", boxed("7"))]
    grades = mathematics(pairs)
    assert [grade.correct for grade in grades] == [False, True, False, True, True, True]
    assert [grade.extracted for grade in grades[::2]] == [poison[0], poison[1], "0.5"]
    assert all(grades[i].verdict in ("timeout", "crash", "unparsable") for i in (0, 2))


def test_the_embedded_task_is_compared_as_text() -> None:
    grade = grading.exact(sort12.extract)
    assert grade([("ab", "a:b;b:;>ab"), ("ab", "b>a>ba"), ("ab", "ab")]) == [
        Grade("ab", True, "ok"),
        Grade("ba", False, "ok"),
        Grade(None, False, "no_answer"),
    ]
