"""Graders: the extracted answer, verdicts, votes, and answers that hang or crash a worker."""

import pytest

from opdctl.data.toy import sort12
from opdctl.evaluation import graders
from opdctl.evaluation.graders import CHOICE_GRADER, GRADERS, MATH_GRADER, Grade, Text, last_boxed, last_choice


def boxed(answer: str) -> str:
    return f"so \\boxed{{{answer}}}"


# ── Extracted answers ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{1}, then \boxed{2} and no more", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\boxed{3} + 1}", "3"),
        (r"\boxed{a} then \boxed{b", None),  # the last box decides, even if it is open
        (r"\boxed{a \boxed{b}", "b"),
        (r"\boxed{b} then \boxed", "b"),  # no box without a brace
        (r"\boxed{b} then \fbox{c}", "b"),
        (r"\boxed {b}", "b"),
        (r"\\boxed{b}", None),  # a line break
        (r"\boxed{\left\{ 1 \right.} } } {", r"\left\{ 1 \right"),
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
def test_last_box_after_the_thinking_is_the_answer(response: str, answer: str | None) -> None:
    assert last_boxed(response) == answer


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: C", "C"),
        ("answer: C.", "C"),
        ("**Answer:** C", "C"),
        ("**Answer: C**", "C"),
        ("Answer: $C$", "C"),
        ("Answer: (C) 5 m", "C"),
        ("Answer: C) 5 m", "C"),
        ('{"answer": "C"}', "C"),
        ("The correct answer is option C.", "C"),
        ("So the answer is (C), since it is the largest.", "C"),
        (r"Answer: $\boxed{C}$", "C"),
        (r"\boxed{C}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\textbf{(C)}\ 12}", "C"),
        (r"\boxed{C) 10^{-4}}", "C"),
        ("(C)", "C"),
        ("I choose (A), no, (C).", "C"),
        ("It is\n\nC", "C"),
        ("**C**", "C"),
        ("Answer: A\nOn reflection, Answer: C", "C"),
        ("Answer: A. But \\boxed{C}", "C"),
        ("\\boxed{A}, so Answer: C", "C"),
        ("Answer: C\n(A) and (B) are too small.", "C"),  # a stated answer precedes a mentioned one
        ("<think>Answer: A</think>Answer: C", "C"),
        ("<think>Answer: A", "A"),
        ("<think>Answer: A</think>", None),
        ("The answer is a matter of taste", None),
        ("Answer: I think it is complicated", None),
        ("Answer: Carbon", None),
        (r"\boxed{\alpha}", None),
        (r"\boxed{C_2}", None),
        ("Compound CD and A", None),
        ("", None),
    ],
)
def test_last_stated_choice_after_the_thinking_is_the_answer(response: str, letter: str | None) -> None:
    assert last_choice(response) == letter


def test_choices_are_graded_and_voted_on_by_letter() -> None:
    grades = CHOICE_GRADER.grade([("C", "Answer: C"), ("C", "Answer: B"), ("C", "none")])
    assert grades == [Grade("C", True, "ok"), Grade("B", False, "ok"), Grade(None, False, "no_answer")]
    assert CHOICE_GRADER.votes([("C", grades)]) == [["C", "B", None]]
    assert CHOICE_GRADER.are_parsable(["C", "c", "(C)", "2", ""]) == [True, False, False, False, False]


# ── Grades ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_and_unparsable_answers_are_incorrect() -> None:
    grades = MATH_GRADER.grade([("7", "seven"), ("7", boxed("")), ("7", boxed("7")), (r"\pi", boxed(r"\frac{"))])
    no_answer = Grade(None, False, "no_answer", False)
    assert grades[:3] == [no_answer, Grade("", False, "unparsable", False), Grade("7", True, "ok", True)]
    assert grades[3] == no_answer  # its box is never closed
    assert MATH_GRADER.grade([(r"\pi", boxed(r"\frac{1}"))]) == [Grade(r"\frac{1}", False, "unparsable", False)]


def test_both_verdicts_are_reported() -> None:
    # math-verify reads no digits after \,, and takes x for X and 0.333333 for 1/3.
    pairs = [("10080", r"10\,080"), ("x", "X"), (r"\frac{1}{3}", "0.333333"), ("7", "7")]
    boxes = [(gold, boxed(answer)) for gold, answer in pairs]
    verdicts = [(grade.correct, grade.math_verify) for grade in MATH_GRADER.grade(boxes)]
    assert verdicts == [(True, False), (False, True), (False, True), (True, True)]
    plain = GRADERS["math-verify"]
    assert [(grade.correct, grade.math_verify) for grade in plain.grade(boxes)] == [(b, b) for _, b in verdicts]
    assert plain.votes([("1", plain.grade([("1", boxed("x")), ("1", boxed("X"))]))]) == [["x", "x"]]
    assert MATH_GRADER.votes([("1", MATH_GRADER.grade([("1", boxed("x")), ("1", boxed("X"))]))]) == [["x", "X"]]


def test_no_responses_have_no_grades() -> None:
    assert MATH_GRADER.grade([]) == []


def test_text_grader_compares_characters() -> None:
    grader = Text(sort12.extract)
    assert grader.grade([("ab", "a:b;b:;>ab"), ("ab", "b>a>ba"), ("ab", "ab")]) == [
        Grade("ab", True, "ok"),
        Grade("ba", False, "ok"),
        Grade(None, False, "no_answer"),
    ]


# ── Answers that hang or crash a worker ──────────────────────────────────────────────────────────────────────────────

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


def test_hostile_answers_affect_no_other_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "MATH_TIMEOUT_SECONDS", 3)
    good = (r"\frac{1}{2}", boxed(r"\frac{3}{6}"))
    bad = [("7", boxed(answer)) for answer in HANGING] + [("7", response) for response in HOSTILE]
    grades = MATH_GRADER.grade([each for pair in bad for each in (pair, good)])
    assert [grade.correct for grade in grades] == [False, True] * len(bad)
    assert [grade.extracted for grade in grades[: 2 * len(HANGING) : 2]] == HANGING
    assert {grade.verdict for grade in grades[: 2 * len(HANGING) : 2]} <= {"timeout", "crash", "unparsable"}
    assert "timeout" in {grade.verdict for grade in grades}
    same = MATH_GRADER.grade([(answer, boxed(answer)) for answer in HANGING])
    assert [(grade.correct, grade.verdict) for grade in same] == [(True, "ok")] * len(HANGING)


# ── Votes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def votes(gold: str, *answers: str) -> list[str | None]:
    (found,) = MATH_GRADER.votes([(gold, MATH_GRADER.grade([(gold, boxed(answer)) for answer in answers]))])
    return found


def test_equal_incorrect_answers_have_one_vote() -> None:
    found = votes(r"\frac12", "0.5", "1/3", r"\frac{2}{6}", r"\frac12", "7", "7.0", r"\frac{1}")
    assert found == [r"\frac12", "1/3", "1/3", r"\frac12", "7", "7", r"\frac{1}"]


def test_no_vote_without_an_answer_and_problems_are_separate() -> None:
    grades = MATH_GRADER.grade([("1", "none"), ("1", boxed("2"))])
    assert MATH_GRADER.votes([("1", grades), ("2", MATH_GRADER.grade([("2", boxed("2.0"))]))]) == [[None, "2"], ["2"]]
