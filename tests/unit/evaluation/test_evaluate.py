"""The summary of an evaluation, by hand. integration/test_evaluation.py runs evaluations."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from opdctl.artifacts.records import GradedResponse
from opdctl.evaluation.evaluate import MAX_SHOWN_ANSWER_CHARS, external_target, summarize
from opdctl.recipe.schema import Recipe


def row(problem: str, n: int, answer: str | None, *, correct: bool = False, verdict: str = "ok") -> GradedResponse:
    return GradedResponse(
        sample_id=f"mine/{problem}/{n}",
        problem_id=problem,
        response_ids=np.arange(10 * (n + 1), dtype=np.int32),
        text="",
        finish_reason="length" if verdict == "no_answer" else "stop",
        gold="1",
        extracted=answer,
        correct=correct,
        verdict=verdict,
        vote="1" if correct else answer,
    )


ROWS = [
    row("a", 0, "1", correct=True),
    row("a", 1, "2"),
    row("b", 0, "9^" * MAX_SHOWN_ANSWER_CHARS, verdict="timeout"),
    row("b", 1, None, verdict="no_answer"),
]


def test_summary_by_hand() -> None:
    summary = summarize(ROWS)
    assert (summary["problems"], summary["samples"]) == (2, 2)
    assert summary["avg"] == pytest.approx(0.25)
    assert summary["pass_at"]["2"]["mean"] == pytest.approx(0.5)
    assert summary["maj_at"]["2"]["mean"] == pytest.approx(0.25)  # problem a: a tie of 1 and 2
    assert summary["ci"][0] < 0.25 < summary["ci"][1]
    assert summary["stderr"] == pytest.approx(0.25)  # of 0.5 and 0: 0.3536 / √2
    assert summary["truncated_fraction"] == pytest.approx(0.25)
    assert summary["response_length"] == pytest.approx(15)
    assert summary["response_lengths"]["max"] == 20
    assert summary["verdicts"] == {"no_answer": 1, "ok": 2, "timeout": 1}


def test_one_problem_has_no_standard_error() -> None:
    assert summarize(ROWS[:2])["stderr"] is None


def test_math_verify_is_reported_beside_the_grade() -> None:
    assert summarize(ROWS)["avg_math_verify"] is summarize(ROWS)["math_verify_differences"] is None  # older rows
    verdicts = (True, True, False, False)
    summary = summarize([replace(row, math_verify=verdict) for row, verdict in zip(ROWS, verdicts, strict=True)])
    assert (summary["avg_math_verify"], summary["math_verify_differences"]) == (0.5, 1)


def test_grader_failures_are_listed_with_the_start_of_the_answer() -> None:
    (failure,) = summarize(ROWS)["grader_failures"]
    assert (failure["sample_id"], failure["verdict"]) == ("mine/b/0", "timeout")
    assert failure["extracted"] == ("9^" * MAX_SHOWN_ANSWER_CHARS)[:MAX_SHOWN_ANSWER_CHARS]


def test_answers_without_votes_have_no_majority() -> None:
    assert summarize([row("a", 0, None, verdict="no_answer")])["maj_at"] == {}


def test_external_model_has_the_settings_but_not_the_revision_of_the_student(small: Callable[..., Recipe]) -> None:
    recipe = small("student.revision=abc", "student.trust_remote_code=true", "student.tokenizer=file")
    target = external_target("toy:teacher", recipe)
    assert (target.model.trust_remote_code, target.model.tokenizer_source) == (False, "auto")
    assert target.name.startswith("toy-teacher-")
    assert target.name.endswith(target.digest[:8])
    assert (target.options, target.role) == ("--model toy:teacher", "model")
