"""The summary of continuations, and the benchmarks that can grade them."""

import numpy as np
import pytest
from helpers.commands import small_recipe

from opdctl.analysis import continuations
from opdctl.artifacts.records import GradedResponse
from opdctl.errors import OpdctlError
from opdctl.runs.open import open_run


def graded(name: str, problem: str, correct: bool) -> GradedResponse:
    return GradedResponse(name, problem, np.zeros(0, np.int32), "", "stop", "", None, correct, "ok", None)


def test_accuracies_are_means_over_problems_and_separate_by_prefix():
    # at 50%, problem a is right in 1 of 2 samples and b always; the prefix of b has gone wrong
    rows = {
        "teacher": [
            graded("a/0/0/50/0", "a", True),
            graded("a/0/0/50/1", "a", False),
            graded("b/0/0/50/0", "b", True),
        ]
    }
    summary = continuations.summarize_continuations(rows, {("a/0/0", 50): True, ("b/0/0", 50): False})
    (accuracy,) = summary["accuracy"]
    assert (accuracy["model"], accuracy["percent"]) == ("teacher", 50)
    assert (accuracy["problems"], accuracy["accuracy"]) == (2, 0.75)
    assert [(row["prefix"], row["accuracy"]) for row in summary["by_prefix"]] == [
        ("right so far", 0.5),
        ("gone wrong", 1.0),
    ]
    assert continuations.summarize_continuations(rows, {})["by_prefix"] == []


def test_benchmark_that_runs_code_is_rejected(tmp_path):
    run = open_run(small_recipe("eval.bench=['humaneval_plus']"), tmp_path / "run")
    with pytest.raises(OpdctlError) as error:
        continuations.run_continuations(run, 0, None)
    assert error.value.kind == "unsupported_setting"
    assert "eval.bench" in error.value.message
    assert "humaneval_plus" in error.value.message
