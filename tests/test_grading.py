"""Grades: the answer that is read, the verdict on it, votes, and the benchmarks' gold answers."""

import re

import pytest
from helpers.commands import ROOT

from opdctl.data.toy import sort12
from opdctl.evaluation import graders
from opdctl.evaluation.benchmarks import find
from opdctl.evaluation.graders import Grade, Text, last_boxed, mathematics
from opdctl.evaluation.math_answers import normalize
from opdctl.recipe.schema import Eval

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


def mistaken(pairs: list[tuple[str, str]], *, equal: bool) -> list[tuple[str, str]]:
    """Return the pairs of gold and answer that get another verdict than this."""
    grades = mathematics.grade([(gold, boxed(answer)) for gold, answer in pairs])
    return [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct is not equal]


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_answers_in_other_spellings_are_right(kind: str) -> None:
    assert mistaken(EQUAL[kind], equal=True) == []


@pytest.mark.parametrize("kind", UNEQUAL)
def test_answers_that_fool_graders_are_wrong(kind: str) -> None:
    assert mistaken(UNEQUAL[kind], equal=False) == []


def test_no_answer_and_one_that_cannot_be_read_are_wrong_and_say_why() -> None:
    grades = mathematics.grade([("7", "seven"), ("7", boxed("")), ("7", boxed("7")), (r"\pi", boxed(r"\frac{"))])
    assert grades[:3] == [Grade(None, False, "no_answer"), Grade("", False, "unparsable"), Grade("7", True, "ok")]
    assert grades[3] == Grade(None, False, "no_answer")  # its box is never closed
    assert mathematics.grade([(r"\pi", boxed(r"\frac{1}"))]) == [Grade(r"\frac{1}", False, "unparsable")]


def test_no_responses_get_no_grades() -> None:
    assert mathematics.grade([]) == []


def test_the_embedded_task_is_compared_as_text() -> None:
    grader = Text(sort12.extract)
    assert grader.grade([("ab", "a:b;b:;>ab"), ("ab", "b>a>ba"), ("ab", "ab")]) == [
        Grade("ab", True, "ok"),
        Grade("ba", False, "ok"),
        Grade(None, False, "no_answer"),
    ]


# ── Answers that want to kill their grader ───────────────────────────────────────────────────────────────────────────

HANGING = ["9^{9^{9^{9^9}}}", "((9!)!)!", "1000000000!", r"\binom{10^9}{5\cdot 10^8}"]
HOSTILE = [
    boxed("{" * 300 + "1" + "}" * 300),
    boxed(r"\frac{1}{" * 300 + "2" + "}" * 300),
    boxed("(" * 300 + "1" + ")" * 300),
    boxed("9" * 1900),
    boxed("," * 1500),
    boxed(r"\begin{pmatrix}" + "&".join("123456789" * 90) + r"\end{pmatrix}"),
    boxed("\x00\x07\x1b[2J\u202e8"),
    boxed("\ud800"),
    boxed("__import__('os').system('exit')"),
    boxed(r"\frac{1}{0}"),
    boxed("1" * 3_000_000),
    r"\boxed{" + "{" * 100_000,
    r"\boxed{8" + "}" * 100_000,
    r"\boxed{" * 300_000,
    "x" * 5_000_000,
]


def test_an_answer_that_hangs_or_dies_costs_no_other_its_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "TIMEOUT_SECONDS", 3)
    good = (r"\frac{1}{2}", boxed(r"\frac{3}{6}"))
    bad = [("7", boxed(answer)) for answer in HANGING] + [("7", response) for response in HOSTILE]
    grades = mathematics.grade([each for pair in bad for each in (pair, good)])
    assert [grade.correct for grade in grades] == [False, True] * len(bad)
    assert [grade.extracted for grade in grades[: 2 * len(HANGING) : 2]] == HANGING
    assert {grade.verdict for grade in grades[: 2 * len(HANGING) : 2]} <= {"timeout", "crash", "unparsable"}
    assert "timeout" in {grade.verdict for grade in grades}


# ── Votes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def votes(gold: str, *answers: str) -> list[str | None]:
    (found,) = mathematics.votes([(gold, mathematics.grade([(gold, boxed(answer)) for answer in answers]))])
    return found


def test_right_answers_vote_for_the_gold_one_and_equal_wrong_ones_for_the_first_of_them() -> None:
    found = votes(r"\frac12", "0.5", "1/3", r"\frac{2}{6}", r"\frac12", "7", "7.0", r"\frac{1}")
    assert found == [r"\frac12", "1/3", "1/3", r"\frac12", "7", "7", r"\frac{1}"]


def test_one_without_an_answer_has_no_vote_and_problems_do_not_mix() -> None:
    grades = mathematics.grade([("1", "none"), ("1", boxed("2"))])
    assert mathematics.votes([("1", grades), ("2", mathematics.grade([("2", boxed("2.0"))]))]) == [[None, "2"], ["2"]]


# ── Gold answers of real benchmarks ──────────────────────────────────────────────────────────────────────────────────

DATA = ROOT.parent / "shared" / "benchmarks"
REAL = ["aime24", "aime25", "hmmt25_feb", "hmmt25_nov", "math500", "gsm8k"]


def respelled(answer: str) -> str:
    """Return an answer as another hand would set it."""
    answer = re.sub(r"\\[dt]?frac", r"\\dfrac", answer).replace(r"\left", "").replace(r"\right", "")
    return re.sub(r"([+=,])", r" \1 ", answer) if not re.search(r"\\text|\\!|\d,\d", answer) else answer


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
@pytest.mark.parametrize("name", REAL)
def test_every_gold_answer_is_right_by_its_own_measure_and_in_another_spelling(name: str) -> None:
    golds = [problem.answer or "" for problem in find(name, Eval()).problems(None, DATA)]
    assert mistaken([(gold, gold) for gold in golds], equal=True) == []
    assert mistaken([(gold, respelled(gold)) for gold in golds], equal=True) == []
    assert mathematics.readable(golds) == [True] * len(golds)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
def test_a_gold_answer_is_not_right_for_another_problem() -> None:
    golds = [problem.answer or "" for problem in find("math500", Eval()).problems(None, DATA)]
    different = sorted({normalize(gold) for gold in golds})  # 120 and 120 degrees are one value
    assert len(different) > 250
    assert mistaken(list(zip(different, different[1:] + different[:1], strict=True)), equal=False) == []
