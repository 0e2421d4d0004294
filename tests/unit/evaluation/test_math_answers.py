"""Mathematical answers: equal and different ones, and the benchmarks' gold answers, as the grader compares them."""

import json
import re
from pathlib import Path
from random import Random

import pytest
from helpers.commands import ROOT

from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.graders import MATH_GRADER
from opdctl.evaluation.math_values import clean, parse_answer
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
        ("5", r"\mathbf{x} = 5"),
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
        ("3/2", "1 1/2"),
        ("1/2", "½"),
        ("7/2", "3½"),
        ("15", "１５"),
        ("0.0000672", r"6.72 \times 10^{-5}"),
        (r"\frac{1}{3}", r"0.\bar{3}"),
        (r"\frac{1}{6}", r"0.1666\ldots"),
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
        (r"-8-8 \sqrt{3} i", r"-8 - 8i\sqrt{3}"),
        ("(1+i)^2", "2i"),
        (r"2\sqrt{3}", "2√3"),
        (r"\tan 15^\circ", r"2-\sqrt{3}"),
    ],
    "expressions": [
        ("x^2-1", "(x-1)(x+1)"),
        ("2x+3", "3+2x"),
        ("y=2x+3", "y = 3 + 2x"),
        (r"E_{1}+\frac{E_2}{2}", r"\frac{2E_1+E_2}{2}"),
    ],
    "several values": [
        ("1,2,3", "3,2,1"),
        (r"\{1,2,3\}", "3, 1, 2"),
        (r"\{1,2,3\}", "{3,1,2}"),
        ("1,2", r"1 \text{ and } 2"),
        ("1,2", "x=1, x=2"),
        ("1,2,3", "1, 2, and 3"),
        ("2,3", "2 or 3"),
        ("5,1", "(5,1)"),
        ("100, 200", "100,200"),
        ("(1,1), (3,2)", r"(m,n) \in \{(1,1),(3,2)\}"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt{2}, 1-\sqrt{2}"),
    ],
    "tuples and matrices": [
        ("(3,4)", r"\left(3, 4\right)"),
        (r"(\frac12, 3)", "(0.5, 3)"),
        ("(3,4)", "3,4"),
        ("(3,2)", "(x,y)=(3,2)"),
        ("(3,2)", "y=2, x=3"),
        ("(100,200)", r"\left( 100,200 \right)"),
        ("(3,4)", r"\langle 3,4\rangle"),
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
        (r"12\pi", r"12\pi\text{ cm}^2"),
        ("9e11", r"9 \times 10^{11}\,\mathrm{cm\,s^{-1}}"),
        ("4000000", "4 million"),
    ],
    "words and bases": [
        (r"\text{Tuesday}", "Tuesday"),
        ("B", r"\text{(B)}"),
        ("52_8", "52_{8}"),
        ("52_8", "(52)_8"),
        ("52_8", r"52_{\text{eight}}"),
        ("C", r"\textbf{(C)}\ 5"),
        (r"\text{ellipse}", "an ellipse"),
    ],
}
UNEQUAL = {
    "whole numbers": [
        ("7", "8"),
        ("-7", "7"),
        ("1000", "1,00"),
        ("1,000", "1,00"),
        ("10!", "10"),
        ("1024", "2^{11}"),
        ("5", "x=6"),
        ("5", "x=6=5"),
        ("5", "3+3=5"),
        ("5", "5x"),
    ],
    "fractions and decimals": [
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        (r"\frac{1}{2}", "2"),
        (r"\frac{1}{3}", "0.33"),
        ("1", r"1\frac12"),
        ("5", ".5"),
        ("1.5e6", "1.5e5"),
        ("11/2", "1 1/2"),
        ("12", "1 2"),
        (r"\frac{1}{3}", "0.333333"),
        ("1e-8", "0.0"),
        (r"\frac{1}{2^{55}}", r"\frac{1}{2^{54}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("3^{100}+0.5", "3^{100}"),
    ],
    "roots and constants": [(r"2\sqrt{2}", r"\sqrt{2}"), (r"\pi", "3.14"), (r"\sqrt{2}", "1.414214"), ("3+4i", "3-4i")],
    "expressions": [
        ("x^2-1", "x^2+1"),
        ("6 xy", "6"),
        ("x+1", "y+1"),
        ("2x", "x^2"),
        ("y=2x+3", "y=2x-3"),
        ("x", "X"),
        ("f(x)", "f'(x)"),
        (r"\frac{1}{3}E_1", "1/3"),
    ],
    "several values": [
        ("5", "5,5"),
        ("5", "5, 6"),
        ("1,2", "1"),
        ("1,2", "1,2,3"),
        ("1,1,2", "1,2,2"),
        ("7", "7 or 8"),
        ("2", r"2 \pm 1"),
        ("2,3", "x=2, y=3"),
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
        ("x > 2", "y > 2"),
        ("0", r"\emptyset"),
    ],
    "percent and units": [
        ("0.1", r"10\%"),
        (r"10\%", "0.1"),
        ("3:4", "4:3"),
        (r"\$5", "5 cents"),
        ("90^\\circ", r"90\%"),
        (r"15\text{ cm}^2", r"15\text{ m}^2"),
        ("5", "5 hundred"),
        ("5", r"5\text{ or more}"),
        ("7", r"7\text{ squared}"),
        ("5", r"5\text{ hours }30\text{ minutes}"),
    ],
    "words and bases": [
        ("52_8", "52_9"),
        ("52_8", "52"),
        ("101", "101_2"),
        ("b", "B"),
        ("5", "five"),
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


def test_examples_of_the_documented_rules() -> None:
    lines = (ROOT / "docs/eval.md").read_text(encoding="utf-8").partition("| kind of value |")[2].split("\n\n")[0]
    columns = [[cell.strip() for cell in line.strip("| ").split(" | ")][2:] for line in lines.splitlines()[2:]]
    equal, different = (
        [re.findall("`([^`]+)` and `([^`]+)`", cell) for cell in cells] for cells in zip(*columns, strict=True)
    )
    assert len(columns) == len([*filter(None, equal)]) == len([*filter(None, different)]) == 13
    assert misgraded([pair for pairs in equal for pair in pairs], equal=True) == []
    assert misgraded([pair for pairs in different for pair in pairs], equal=False) == []


# ── Pairs written before the rules ───────────────────────────────────────────────────────────────────────────────────

DATA = ROOT.parent / "shared" / "benchmarks"
PERCENT_IS_A_UNIT = [("0.15", r"15\%"), (r"\dfrac{17}{50}", r"34\%"), ("204", r"204\%")]
"""Pairs of tests/data/grading-pairs.jsonl that the rule of percent signs decides the other way."""


def misgraded_rows(path: Path) -> tuple[list[tuple[str, str]], int]:
    """Return the pairs of a file whose grade is not the wanted one, and the number of its pairs."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_verdict = [[(row["gold"], row["answer"]) for row in rows if row["equal"] is equal] for equal in (True, False)]
    return misgraded(by_verdict[0], equal=True) + misgraded(by_verdict[1], equal=False), len(rows)


def test_grading_pairs() -> None:
    assert misgraded_rows(ROOT / "tests/data/grading-pairs.jsonl")[0] == PERCENT_IS_A_UNIT


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
def test_difficult_pairs() -> None:
    failures, count = misgraded_rows(DATA / "grading_pairs.jsonl")
    assert len(failures) < 0.025 * count


# ── Gold answers of benchmarks ───────────────────────────────────────────────────────────────────────────────────────

LOCAL_BENCHMARKS = ["aime24", "aime25", "hmmt25_feb", "hmmt25_nov", "math500", "gsm8k"]
RESPELLED_GOLDS = 40  # of each benchmark
FULL_WIDTH_DIGITS = str.maketrans("0123456789-", "０１２３４５６７８９−")


def respellings(gold: str) -> list[str]:
    """Return ten spellings of a gold answer."""
    value = parse_answer(clean(gold))
    is_list = value.kind in ("list", "set")
    is_single = value.kind in ("number", "expression") and not value.name
    members = [] if r"\pm" in gold else clean(gold).removeprefix(r"\{").removesuffix(r"\}").split(",")
    return [
        re.sub(r"([+=]|,(?!\\|\d{3}))", r" \1 ", gold),
        re.sub(r"\\[dt]?frac", r"\\dfrac", gold),
        re.sub(r"\\[dt]?frac", r"\\tfrac", gold).replace(r"\left", "").replace(r"\right", ""),
        f"${gold}$.",
        rf"\displaystyle {gold} ",
        rf"\boxed{{{gold}}}",
        gold.translate(FULL_WIDTH_DIGITS),
        f"x = {gold}" if is_single or (is_list and "{" not in gold) else f"{gold}\\,",
        rf"{gold} \text{{ units}}" if is_single else rf"{gold}\quad",
        ", ".join(reversed(members))
        if is_list and members
        else rf"\mathbf{{{gold}}}"
        if "{" not in gold
        else f" {gold}",
    ]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
@pytest.mark.parametrize("name", LOCAL_BENCHMARKS)
def test_gold_answers_equal_themselves(name: str) -> None:
    golds = [problem.answer or "" for problem in find_benchmark(name, Eval()).problems(None, DATA)]
    assert misgraded([(gold, gold) for gold in golds], equal=True) == []
    sample = Random(0).sample(golds, min(RESPELLED_GOLDS, len(golds)))
    assert misgraded([(gold, spelling) for gold in sample for spelling in respellings(gold)], equal=True) == []
    assert MATH_GRADER.are_parsable(golds) == [True] * len(golds)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
def test_gold_answers_differ_from_one_another() -> None:
    golds = [problem.answer or "" for problem in find_benchmark("math500", Eval()).problems(None, DATA)]
    different = sorted({re.sub(r"(?<=[\d}])\s*\\text.*", "", clean(gold)) for gold in golds})  # without units
    assert len(different) > 250
    assert misgraded(list(zip(different, different[1:] + different[:1], strict=True)), equal=False) == []
