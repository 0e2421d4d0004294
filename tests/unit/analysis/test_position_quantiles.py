"""Quantiles by position from histograms: near those of numpy, whatever the batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.analysis.position_quantiles import CohortHistograms, WeightHistogram
from opdctl.analysis.position_sums import Batch, LengthCohort
from opdctl.losses.token_weights import ResponseTokens


def add(histograms: CohortHistograms, weights: list[np.ndarray]) -> CohortHistograms:
    batch = Batch([ResponseTokens(weight_T, weight_T, weight_T) for weight_T in weights], np.arange(len(weights)))
    histograms.add(batch, np.concatenate([np.zeros(0), *weights]))
    return histograms


def histogram_of(weights: list[np.ndarray]) -> WeightHistogram:
    """Return the histogram over all cohorts."""
    histograms = add(CohortHistograms(), weights)
    return histograms.select([*histograms.by_cohort])


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 8.0])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_quantiles_are_near_those_of_all_values(scale, fraction):
    # lognormal weights whose median falls along the response
    rng = np.random.default_rng(0)
    log_RT = scale * (rng.normal(size=(4000, 5)) - np.arange(5) / 2)
    histogram = histogram_of(list(np.exp(log_RT)))
    exact_T = np.quantile(log_RT, fraction, axis=0)
    np.testing.assert_allclose(np.log(histogram.quantile(fraction)), exact_T, rtol=0.1, atol=0.05 * scale + 1e-3)


def test_weight_0_and_weight_1_are_kept():
    histogram = histogram_of([np.array([0.0, np.exp(-400.0), 1.0])] * 3)
    assert histogram.quantile(0.5).tolist() == pytest.approx([0.0, 0.0, 1.0], rel=1e-3)


def test_only_responses_that_reach_a_position_count():
    histogram = histogram_of([np.array([0.5]), np.zeros(0), np.array([2.0, 8.0]), np.array([2.0])])
    assert histogram.count_LH.sum(1).tolist() == [3, 1]
    assert histogram.quantile(0.5) == pytest.approx([2.0, 8.0], rel=0.25)


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(0, 8))
def test_batches_do_not_change_the_counts(lengths, cut):
    rng = np.random.default_rng(1)
    weights = [rng.exponential(size=n) for n in lengths]
    once = histogram_of(weights)
    parts = add(add(CohortHistograms(), weights[:cut]), weights[cut:])
    merged = parts.select([*parts.by_cohort])
    np.testing.assert_array_equal(once.count_LH, merged.count_LH)
    np.testing.assert_allclose(once.moments_L2, merged.moments_L2)


def test_cohorts_are_kept_apart():
    histograms = add(CohortHistograms(), [np.array([0.5]), np.array([2.0, 8.0]), np.array([2.0, 2.0, 2.0])])
    assert sorted(histograms.by_cohort) == [(0, False), (1, False)]
    longer = histograms.select([LengthCohort(1, is_truncated=False)])
    assert longer.count_LH.sum(1).tolist() == [2, 2, 1]
    assert longer.effective_sample_size() == pytest.approx([1.0, 100 / (2 * 68), 1.0])
