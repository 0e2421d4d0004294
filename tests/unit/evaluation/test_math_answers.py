"""Mathematical answers: equal and different ones, and the benchmarks' gold answers, as the grader compares them."""

import re

import pytest
from helpers.commands import ROOT

from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.graders import MATH_GRADER
from opdctl.evaluation.math_answers import normalize
from opdctl.recipe.schema import Eval

# ── Equal and different answers ──────────────────────────────────────────────────────────────────────────────────────

EQUAL = {
    "whole numbers": [
        ("7", "7"),
        ("70", "070"),
        ("70", "+70"),
        ("-7", "\N{MINUS SIGN}7"),
        ("7", "7."),
        ("7", "7.0"),
        ("7", r"7\ "),
        ("7", "$7$"),
        ("1000", "1,000"),
        ("1000", "1{,}000"),
        ("1000", r"1\,000"),
        ("1500000", "1.5e6"),
        ("1500000", r"1.5 \times 10^6"),
        ("1024", "2^{10}"),
        ("3628800", "10!"),
        ("10", r"\binom{5}{2}"),
        ("5", "x = 5"),
    ],
    "fractions and decimals": [
        (r"\frac{1}{2}", r"\frac{2}{4}"),
        (r"\frac{1}{2}", r"\dfrac12"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\frac{7}{2}", r"3\frac{1}{2}"),
        (r"\frac{1}{6}", r"0.1\overline{6}"),
        ("1.25", r"\frac{5}{4}"),
        ("0.5", ".5"),
    ],
    "roots and constants": [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt{2}+1", r"1+\sqrt{2}"),
        (r"\frac{\pi}{4}", r"\pi/4"),
        ("4\\pi", "4π"),
        (r"\log_2 8", "3"),
        (r"\ln 2", r"\ln(2)"),
        ("3+4i", "4i+3"),
    ],
    "expressions": [("x^2-1", "(x-1)(x+1)"), ("2x+3", "3+2x"), ("y=2x+3", "y = 3 + 2x")],
    "several values": [
        ("1,2,3", "3,2,1"),
        (r"\{1,2,3\}", "3, 1, 2"),
        (r"\{1,2,3\}", "{3,1,2}"),
        ("1,2", r"1 \text{ and } 2"),
        ("1,2", "x=1, x=2"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}"),
    ],
    "tuples and matrices": [
        ("(3,4)", r"\left(3, 4\right)"),
        (r"(\frac12, 3)", "(0.5, 3)"),
        ("(3,4)", "3,4"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ],
    "intervals": [
        ("[0,1)", "[0, 1)"),
        (r"(2,\infty)", "x > 2"),
        (r"(2,\infty)", "2 < x"),
        ("[-1,3]", r"-1 \le x \le 3"),
        (r"(-\infty,2]", r"x \leq 2"),
        ("(0,1)", r"x \in (0,1)"),
        (r"(-\infty,-1)\cup(1,\infty)", r"(1,\infty) \cup (-\infty,-1)"),
        (r"\emptyset", r"\varnothing"),
    ],
    "percent and units": [
        (r"10\%", r"10\%"),
        ("10", r"10\%"),
        (r"10\%", "10"),
        ("50", r"50^\circ"),
        ("90", "90 degrees"),
        ("5", "5 dollars"),
        ("5", r"\$5"),
        ("100", "100 km/h"),
        ("5", r"5\text{ cm}"),
        ("3", r"3\text{ cm}^2"),
    ],
    "words and bases": [
        (r"\text{Tuesday}", "Tuesday"),
        ("B", r"\text{(B)}"),
        ("52_8", "52_{8}"),
        ("52_8", "52"),
    ],
}
UNEQUAL = {
    "whole numbers": [
        ("7", "8"),
        ("-7", "7"),
        ("1000", "1,00"),
        ("10!", "10"),
        ("1024", "2^{11}"),
        ("5", "x=6"),
        ("5", "5x"),
    ],
    "fractions and decimals": [
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        (r"\frac{1}{2}", "2"),
        (r"\frac{1}{3}", "0.33"),
        ("1", r"1\frac12"),
        ("5", ".5"),
        ("1.5e6", "1.5e5"),
    ],
    "roots and constants": [(r"2\sqrt{2}", r"\sqrt{2}"), (r"\pi", "3.14"), (r"\sqrt{2}", "1.414"), ("3+4i", "3-4i")],
    "expressions": [("x^2-1", "x^2+1"), ("6 xy", "6"), ("x+1", "y+1"), ("2x", "x^2"), ("y=2x+3", "y=2x-3")],
    "several values": [
        ("5", "5,5"),
        ("5", "5, 6"),
        ("1,2", "1"),
        ("1,2", "1,2,3"),
        ("1,1,2", "1,2,2"),
        ("7", "7 or 8"),
        ("2", r"2 \pm 1"),
    ],
    "tuples and matrices": [
        ("(3,4)", "(4,3)"),
        ("(1,2)", r"\{1,2\}"),
        (r"\{1,2\}", "(1,2)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ],
    "intervals": [
        ("[0,1)", "(0,1]"),
        ("(0,1)", "[0,1]"),
        (r"(2,\infty)", "x < 2"),
        (r"(2,\infty)", r"x \ge 2"),
        ("[-1,3]", "-1 < x < 3"),
        (r"\infty", r"-\infty"),
        ("0", r"\emptyset"),
    ],
    "percent and units": [("0.1", r"10\%"), (r"10\%", "0.1"), ("3:4", "4:3")],
    "words and bases": [
        ("52_8", "52_9"),
        ("B", "(C)"),
        (r"\text{Tuesday}", "Monday"),
        ("5", "seven"),
        ("0", "False"),
        ("1", "True"),
    ],
}


def boxed(answer: str) -> str:
    return f"so \\boxed{{{answer}}}"


def misgraded(pairs: list[tuple[str, str]], *, equal: bool) -> list[tuple[str, str]]:
    """Return the (gold, answer) pairs whose grade is not `equal`."""
    grades = MATH_GRADER.grade([(gold, boxed(answer)) for gold, answer in pairs])
    return [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct is not equal]


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_answers_in_different_notations(kind: str) -> None:
    assert misgraded(EQUAL[kind], equal=True) == []


@pytest.mark.parametrize("kind", UNEQUAL)
def test_different_answers(kind: str) -> None:
    assert misgraded(UNEQUAL[kind], equal=False) == []


# ── Gold answers of benchmarks ───────────────────────────────────────────────────────────────────────────────────────

DATA = ROOT.parent / "shared" / "benchmarks"
LOCAL_BENCHMARKS = ["aime24", "aime25", "hmmt25_feb", "hmmt25_nov", "math500", "gsm8k"]


def rewritten(answer: str) -> str:
    """Return an answer in a different notation."""
    answer = re.sub(r"\\[dt]?frac", r"\\dfrac", answer).replace(r"\left", "").replace(r"\right", "")
    return re.sub(r"([+=,])", r" \1 ", answer) if not re.search(r"\\text|\\!|\d,\d", answer) else answer


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
@pytest.mark.parametrize("name", LOCAL_BENCHMARKS)
def test_gold_answers_equal_themselves(name: str) -> None:
    golds = [problem.answer or "" for problem in find_benchmark(name, Eval()).problems(None, DATA)]
    assert misgraded([(gold, gold) for gold in golds], equal=True) == []
    assert misgraded([(gold, rewritten(gold)) for gold in golds], equal=True) == []
    assert MATH_GRADER.are_parsable(golds) == [True] * len(golds)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
def test_gold_answers_differ_from_one_another() -> None:
    golds = [problem.answer or "" for problem in find_benchmark("math500", Eval()).problems(None, DATA)]
    different = sorted({normalize(gold) for gold in golds})  # 120 and 120 degrees are one value
    assert len(different) > 250
    assert misgraded(list(zip(different, different[1:] + different[:1], strict=True)), equal=False) == []
