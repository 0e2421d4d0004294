"""Curves of a phase: which responses are in them, and that none moves against what holds in each response."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.analysis.phase import Phase
from opdctl.analysis.position_sums import Batch, PositionStats
from opdctl.losses.token_weights import IwOpd, ResponseTokens


def phase_of(advantages: list[np.ndarray], truncated: list[bool] | None = None) -> Phase:
    """A phase of responses to different prompts, with weights iw_opd."""
    responses = [ResponseTokens(np.minimum(a, -1e-3), np.minimum(2 * a, -1e-3), a) for a in advantages]
    batch = Batch(responses, np.arange(len(responses)) % 200, np.array(truncated or [False] * len(responses)))
    return Phase("steps 0–1", PositionStats.of(batch, {"iw_opd": [IwOpd()(tokens) for tokens in responses]}))


def random_responses(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [-rng.exponential(rng.exponential(), size=n) for n in lengths]


LENGTHS = st.lists(st.integers(0, 150), min_size=1, max_size=25).filter(any)


@given(LENGTHS)
def test_cumulative_logp_never_rises(lengths):
    """The log-prob of each token is below 0. The mean over the responses that reach a position could rise."""
    phase = phase_of(random_responses(lengths))
    for model in ("student", "teacher"):
        curve = phase.cumulative_logp(model)
        assert (np.diff(curve.mean_L) <= 0).all()
        assert (curve.low_L[np.isfinite(curve.low_L)] <= 0).all()


def test_mean_of_cumulative_quantities_can_rise_where_the_curve_does_not():
    """The short response has log-probs of -10 and ends; the long one has -1."""
    phase = phase_of([np.full(2, -10.0), np.full(4, -1.0), np.full(4, -1.0)])
    assert phase.cumulative_logp("student").mean_L.tolist() == pytest.approx([-4.0, -8.0, -9.0, -10.0])


@given(LENGTHS)
def test_weights_that_fall_in_each_response_fall_in_the_curves(lengths):
    phase = phase_of(random_responses(lengths))
    for curve in (phase.by_relative_position("iw_opd"), phase.by_position_of_long("iw_opd")):
        assert (np.diff(curve.mean_L) <= 1e-9).all()


@given(LENGTHS, st.integers(0, 2**25 - 1))
def test_a_cohort_has_the_same_responses_at_each_position(lengths, bits):
    truncated = [bool(bits >> number & 1) for number in range(len(lengths))]
    phase = phase_of(random_responses(lengths), truncated)
    for label, cohorts in phase.cohorts.items():
        if label != "all":
            curve = phase.by_position("abs_advantage", label)
            size = sum(phase.numbers.count[cohort] for cohort in cohorts)
            assert curve.responses_L.tolist() == [size] * len(curve)
    long = phase.by_position_of_long("abs_advantage")
    assert len({*long.responses_L.tolist()}) <= 1
    assert 2 * sum(n >= phase.common_length for n in lengths) >= np.count_nonzero(lengths)


def test_cohorts_by_hand():
    lengths, truncated = [3, 5, 6, 7, 7, 40, 40], [False] * 5 + [True] * 2
    phase = phase_of([np.full(n, -float(n)) for n in lengths], truncated)
    assert list(phase.cohorts) == ["all", "4–7 tokens", "truncated"]  # a single response has 2–3 tokens
    cohort = phase.by_position("abs_advantage", "4–7 tokens")
    assert (cohort.mean_L.tolist(), cohort.responses_L.tolist()) == ([6.25] * 5, [4.0] * 5)
    cut = phase.by_position("abs_advantage", "truncated")
    assert cut.last_L[-1] == 40.0  # the last bin ends with the longest response
    assert phase.common_length == 4
    assert phase.by_position_of_long("abs_advantage").mean_L.tolist() == pytest.approx([105 / 6] * 4)
    assert len(phase.by_position("abs_advantage")) == phase.shown_bins() == 36  # two responses reach position 40
    assert phase.omitted_fractions() == pytest.approx((0.0, 0.0))


def test_curves_have_no_interval_for_few_prompts():
    few, many = (phase_of([np.full(4, -1.0)] * count) for count in (9, 10))
    assert np.isnan(few.by_position("abs_advantage").low_L).all()
    assert many.by_position("abs_advantage").low_L == pytest.approx([1.0] * 4)
