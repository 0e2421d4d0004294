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


# ── Benchmarks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
@pytest.mark.parametrize("name", ["aime24", "aime25"])
def test_every_gold_answer_is_right_by_its_own_measure(name: str) -> None:
    benchmark = BENCHMARKS.get(name)()
    problems = benchmark.problems(None, DATA)
    assert len({problem.id for problem in problems}) == 30
    grades = benchmark.grade([(problem.answer, boxed(problem.answer)) for problem in problems])
    assert [problem.id for problem, grade in zip(problems, grades, strict=True) if not grade.correct] == []


def test_a_file_and_the_folder_it_lies_in_give_the_same_problems(tmp_path: Path) -> None:
    (tmp_path / "aime24.jsonl").write_text(
        '{"id": "a", "problem": "1+1?", "answer": 2}\n{"problem_idx": 9, "question": "?", "answer": "3"}\n'
    )
    benchmark = BENCHMARKS.get("aime24")()
    problems = benchmark.problems(None, tmp_path)
    assert [(p.id, p.text, p.answer) for p in problems] == [("a", "1+1?", "2"), ("9", "?", "3")]
    assert benchmark.problems(None, tmp_path / "aime24.jsonl") == problems
    assert benchmark.problems(1, tmp_path) == problems[:1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no problems"),
        ('{"problem": "1+1?", "anser": "2"}\n', "it has problem, anser"),
        ('{"problem": "1+1?", "answer": null}\n', "answer"),
        ("1\n", "must be a JSON object"),
        ('{"id": 1, "problem": "a", "answer": "2"}\n{"id": 1, "problem": "b", "answer": "3"}\n', "1"),
    ],
)
def test_bad_benchmark_data_are_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(OpdctlError) as caught:
        BENCHMARKS.get("aime24")().problems(None, path)
    assert caught.value.code == ExitCode.DATA
    assert told in caught.value.message


def test_the_embedded_benchmark_is_held_out() -> None:
    problems = BENCHMARKS.get("sort12")().problems(10, None)
    assert {sort12.split_of(problem.text[:-1]) for problem in problems} == {"test"}
    assert len(BENCHMARKS.get("sort12")().problems(None, None)) == 256


# ── Averages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_average_is_over_problems_not_samples() -> None:
    # shares 1/4 and 1: the mean is 5/8, where pooling the five samples would give 2/5
    assert average([[True, False, False, False], [True]]).mean == pytest.approx(0.625)


def test_the_interval_agrees_with_a_plain_bootstrap_over_problems() -> None:
    rng = np.random.default_rng(1)
    correct = rng.random((30, 8)) < rng.random((30, 1))
    found = average([list(map(bool, row)) for row in correct])
    shares = correct.mean(axis=1)
    means = shares[rng.integers(0, 30, (20_000, 30))].mean(axis=1)
    assert found.mean == pytest.approx(shares.mean())
    # 2,000 resamples leave a standard error below 0.004 on a 2.5 % quantile here
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.015)


def test_the_interval_is_repeatable_and_holds_the_mean() -> None:
    correct = [[True, False], [False, False], [True, True], [False, True]]
    first = average(correct)
    assert first == average(correct)
    assert 0 <= first.low < first.mean < first.high <= 1


def test_five_problems_all_right_or_all_wrong_have_the_exact_binomial_interval() -> None:
    # by Clopper and Pearson: the share at which five of five have probability 2.5 %
    bound = 0.025 ** (1 / 5)
    right, wrong = average([[True] * 4] * 5), average([[False] * 4] * 5)
    assert (right.mean, right.low, right.high) == pytest.approx((1.0, bound, 1.0))
    assert (wrong.mean, wrong.low, wrong.high) == pytest.approx((0.0, 0.0, 1 - bound))


def test_a_single_problem_says_nothing_of_others() -> None:
    found = average([[True, False]])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
