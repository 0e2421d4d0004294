"""The sentences of the report contain the numbers that they are written from."""

import numpy as np
import pytest

from opdctl.analysis import captions, verdict
from opdctl.analysis.phase import Phase
from opdctl.analysis.position_bias import ChangePoint, PositionBias, PrefixEstimate
from opdctl.analysis.position_sums import Batch, PositionStats
from opdctl.evaluation.statistics import Estimate
from opdctl.losses.token_weights import ResponseTokens

FRACTION = Estimate(0.1589, 0.1439, 0.1739)


def estimates(p_value: float, *, has_complete: bool = False) -> tuple[PrefixEstimate, ...]:
    """The estimates 15.9%, 28.2% and, without truncated responses, 17.0% and 29.5%."""
    values = {("signal", "all"): 0.159, ("response", "all"): 0.282}
    values |= {("signal", "complete"): 0.17, ("response", "complete"): 0.295} if has_complete else {}
    return tuple(
        PrefixEstimate(of, responses, Estimate(value, value - 0.01, value + 0.01), p_value)
        for (of, responses), value in values.items()
    )


def test_bias_sentence():
    late = PositionBias("late", "", FRACTION, 2e-26, None, estimates(1e-9))
    assert verdict.bias_sentence(late) == (
        "The signal has a late position bias. The first 30% of a response contain 15.9% [14.9%, 16.9%] of the signal, "
        "and on average 28.2% [27.2%, 29.2%] of a response’s own (30% expected without a bias; 99% intervals, "
        "p < 0.001)."
    )
    none = PositionBias("none found", "", FRACTION, 0.25, None, estimates(0.25, has_complete=True))
    assert verdict.bias_sentence(none).startswith("No position bias found. ")
    assert "; without truncated responses 17.0% [16.0%, 18.0%] and 29.5% [" in verdict.bias_sentence(none)
    assert verdict.bias_sentence(none).endswith("p = 0.250).")
    mixed = PositionBias("mixed", "", FRACTION, 0.001, None, estimates(0.001)[:1] + estimates(0.5)[1:])
    assert verdict.bias_sentence(mixed).startswith("The estimates of a position bias disagree. ")
    assert "p " not in verdict.bias_sentence(mixed).partition("(")[2]
    assert verdict.bias_sentence(PositionBias("unknown", "no signal")) == "Position bias not tested: no signal."


def test_change_point_sentence():
    change = ChangePoint(Estimate(0.89, 0.88, 0.9), 0.144, 0.463, 0.001)
    text = verdict.change_point_sentence(PositionBias("late", "", FRACTION, 0.0, change))
    for number in ("89% [88%, 90%]", "0.144", "0.463"):
        assert number in text
    assert verdict.change_point_sentence(PositionBias("none found", "", FRACTION, 0.5)) == "No change point found."
    assert verdict.change_point_sentence(PositionBias("unknown", "no signal")) == ""


@pytest.mark.parametrize(
    ("advantage", "text"),
    [
        (np.zeros(0), "steps 0–1: 1 responses without tokens."),
        (
            np.array([-2.0] * 3 + [-0.5] * 7),
            "steps 0–1: 1 responses, 10 tokens; mean |A| 0.9500 nats per token, reverse KL 0.9500; "
            "the first 30% of the tokens contain 63.2% of the signal.",
        ),
        (
            np.zeros(2),
            "steps 0–1: 1 responses, 2 tokens; mean |A| 0.0000 nats per token, reverse KL 0.0000; no signal.",
        ),
    ],
)
def test_phase_sentence(advantage, text):
    tokens = ResponseTokens(np.zeros(len(advantage)), advantage, advantage)
    assert captions.phase_sentence(Phase("steps 0–1", PositionStats.of(Batch([tokens], np.zeros(1, int)), {}))) == text


def test_continuations_sentence():
    rows = [
        {"model": model, "percent": percent, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
        for model, accuracies in {"student": (0.1, 0.2, 0.3), "teacher": (0.9, 0.5, 0.15)}.items()
        for percent, accuracy in zip((0, 50, 90), accuracies, strict=True)
    ]
    # As 0.2.0 wrote it: without absolute lengths, numbers of responses and the budget.
    summary = {"step": 0, "problems": 64, "student": "step-00000", "accuracy": rows, "by_prefix": []}
    text = captions.continuations_sentence(summary)
    assert "64 problems" in text
    assert "student 10.0% [5.0%, 15.0%] after 0%, 30.0% [25.0%, 35.0%] after 90%" in text
    assert "teacher 90.0% [85.0%, 95.0%] after 0%, 15.0% [10.0%, 20.0%] after 90%" in text
    assert text.endswith("after 90%.")
    relative = [{**row, "tokens": None, "responses": 64} for row in rows]
    absolute = [
        {**rows[0], "percent": None, "tokens": tokens, "responses": responses}
        for tokens, responses in ((0, 64), (512, 9))
    ]
    text = captions.continuations_sentence({**summary, "max_tokens": 256, "accuracy": [*relative, *absolute]})
    assert "30.0% [25.0%, 35.0%] after 90%; student 10.0%" in text
    assert "after 0 tokens (64 responses), 10.0% [5.0%, 15.0%] after 512 tokens (9 responses)" in text
    assert text.endswith("A continuation has at most 256 tokens.")
    only = captions.continuations_sentence({**summary, "accuracy": absolute[1:]})
    assert only.count("512 tokens") == 1


def test_positions_that_are_not_shown_are_reported_with_their_share():
    """19 responses of 4 tokens with |A| 1, and one of 24 with |A| 5 in its last 20 tokens."""
    advantages = [np.full(4, -1.0)] * 19 + [np.array([-1.0] * 4 + [-5.0] * 20)]
    responses = [ResponseTokens(np.zeros(len(a)), a, a) for a in advantages]
    phase = Phase("all", PositionStats.of(Batch(responses, np.arange(20)), {}))
    assert phase.omitted_fractions() == pytest.approx((20 / 100, 100 / 180))
    assert captions.omission_sentence(phase) == (
        "all: tokens after position 4, which fewer than a tenth of the responses or only one reach, are not shown: "
        "20.0% of the tokens with 55.6% of the signal."
    )
    equal = Phase("all", PositionStats.of(Batch(responses[:19], np.arange(19)), {}))
    assert captions.omission_sentence(equal) == ""
