"""The summary of continuations, and the benchmarks that can grade them."""

import numpy as np
import pytest
from helpers.commands import small_recipe

from opdctl.analysis import continuations
from opdctl.analysis.continuations import PrefixLength
from opdctl.analysis.phase_tables import CONTINUATION_COLUMNS, continuation_rows
from opdctl.artifacts.records import GradedResponse, Response
from opdctl.errors import OpdctlError
from opdctl.runs.open import open_run


def graded(name: str, problem: str, correct: bool, finish_reason: str = "stop") -> GradedResponse:
    return GradedResponse(name, problem, np.zeros(0, np.int32), "", finish_reason, "", None, correct, "ok", None)


def test_accuracies_are_means_over_problems_and_separate_by_prefix():
    # At 50%, problem a is right in 1 of 2 samples and b always. Its prefix has gone wrong. Only b is longer than 64.
    rows = {
        "teacher": [
            graded("a/0/0/50/0", "a", True),
            graded("a/0/0/50/1", "a", False),
            graded("b/0/0/64-tokens/0", "b", False, "length"),
            graded("b/0/0/8-tokens/0", "b", True),
            graded("b/0/0/50/0", "b", True),
        ]
    }
    on_track = {"a/0/0/50": True, "b/0/0/50": False, "b/0/0/8-tokens": True}
    summary = continuations.summarize_continuations(rows, on_track)
    places = [(row["model"], row["percent"], row["tokens"]) for row in summary["accuracy"]]
    assert places == [("teacher", 50, None), ("teacher", None, 8), ("teacher", None, 64)]
    relative, _, absolute = summary["accuracy"]
    assert (relative["responses"], relative["problems"], relative["accuracy"]) == (2, 2, 0.75)
    assert (absolute["responses"], absolute["problems"], absolute["accuracy"]) == (1, 1, 0.0)
    assert [row["truncated_fraction"] for row in summary["accuracy"]] == [0.0, 0.0, 1.0]
    assert [(row["percent"], row["tokens"], row["prefix"], row["accuracy"]) for row in summary["by_prefix"]] == [
        (50, None, "right so far", 0.5),
        (50, None, "gone wrong", 1.0),
        (None, 8, "right so far", 1.0),
    ]
    assert continuations.summarize_continuations(rows, {})["by_prefix"] == []


def response(tokens: int) -> Response:
    prompt_ids, ids = np.array([7], np.int32), np.arange(tokens, dtype=np.int32)
    return Response(
        response_ids=ids,
        logprobs=np.zeros(tokens, np.float32),
        finish_reason="stop",
        sample_id="a/0/0",
        prompt_id="a",
        prompt_ids=prompt_ids,
        policy_version=0,
        source="file",
        teacher="teacher",
        answer="x",
    )


@pytest.mark.parametrize(
    ("unit", "value", "length"),
    [
        ("percent", 0, 0),
        ("percent", 90, 4),  # 4.5, rounded down
        ("percent", 99, 4),
        ("tokens", 0, 0),
        ("tokens", 4, 4),
        ("tokens", 5, None),  # the response is not longer
        ("tokens", 6, None),
    ],
)
def test_prefix_of_a_response_of_five_tokens(unit, value, length):
    prefix_ids = PrefixLength(unit, value).prefix(response(5))
    assert prefix_ids is None if length is None else prefix_ids.tolist() == list(range(length))


@pytest.mark.parametrize(("unit", "label"), [("percent", "50"), ("tokens", "50-tokens")])
def test_label_of_a_prefix_length_is_read_back(unit, label):
    length = PrefixLength(unit, 50)
    assert length.label == label
    assert PrefixLength.parse(label) == length


def test_rows_of_an_older_summary_have_all_columns():
    numbers = {"problems": 4, "accuracy": 0.5, "low": 0.2, "high": 0.8}
    summary = {
        "step": 3,
        "accuracy": [{"model": "teacher", "percent": 50, **numbers}],
        "by_prefix": [{"model": "teacher", "percent": 50, "prefix": "gone wrong", **numbers}],
    }
    rows = continuation_rows(summary)
    assert [tuple(row) for row in rows] == [CONTINUATION_COLUMNS] * 2
    assert [(row["step"], row["prefix"], row["percent"], row["tokens"]) for row in rows] == [
        (3, "any", 50, None),
        (3, "gone wrong", 50, None),
    ]
    assert rows[0]["responses"] is None


def test_benchmark_that_runs_code_is_rejected(tmp_path):
    run = open_run(small_recipe("eval.bench=['humaneval_plus']"), tmp_path / "run")
    with pytest.raises(OpdctlError) as error:
        continuations.run_continuations(run, 0, None)
    assert error.value.kind == "unsupported_setting"
    assert "eval.bench" in error.value.message
    assert "humaneval_plus" in error.value.message
