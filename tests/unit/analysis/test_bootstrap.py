"""Intervals over prompts: their coverage, their bounds, and where there are none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.analysis.bootstrap import MIN_INTERVAL_PROMPTS, interval_of_difference, interval_of_means


def test_interval_of_a_mean_covers_it_if_tokens_are_correlated():
    """Responses of 50 equal tokens, 400 quantities with mean 1: an interval over tokens covers it in 40%."""
    rng = np.random.default_rng(0)
    level_GL = rng.exponential(size=(40, 400))
    low_L, high_L = interval_of_means(50 * level_GL, np.full((40, 400), 50.0))
    assert np.mean((low_L <= 1) & (high_L >= 1)) > 0.9
    half_L = 1.96 * level_GL.std(0) / np.sqrt(40 * 50)
    assert np.mean(np.abs(level_GL.mean(0) - 1) <= half_L) < 0.4


@pytest.mark.parametrize("groups", [MIN_INTERVAL_PROMPTS, 20, 60])
def test_coverage_with_few_prompts(groups):
    values = np.random.default_rng(1).normal(2.0, 1.0, (groups, 2000))
    low_L, high_L = interval_of_means(values, np.ones_like(values))
    assert 0.92 < np.mean((low_L <= 2) & (high_L >= 2)) < 0.98


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_bounds_are_within_the_range_of_the_values(values, random):
    """Quantities of 0 and more have no negative bound; ten prompts at least."""
    tokens_G = np.array([random.randint(1, 9) for _ in values], float)
    value_G = np.array(values)
    low_L, high_L = interval_of_means((value_G * tokens_G)[:, None], tokens_G[:, None])
    if len(values) < MIN_INTERVAL_PROMPTS:
        assert np.isnan([low_L[0], high_L[0]]).all()
    else:
        slack = 1e-9 * max(values)
        assert min(values) - slack <= low_L[0] <= high_L[0] <= max(values) + slack
        mean = (value_G * tokens_G).sum() / tokens_G.sum()
        assert low_L[0] - slack <= mean <= high_L[0] + slack or np.ptp(values) > 0


def test_a_bin_needs_enough_prompts_of_its_own():
    tokens_GL = np.ones((12, 2))
    tokens_GL[9:, 1] = 0  # nine prompts reach the second bin
    value_GL = np.arange(12.0)[:, None] * tokens_GL
    low_L, high_L = interval_of_means(value_GL, tokens_GL)
    assert low_L[0] < 5.5 < high_L[0]
    assert np.isnan([low_L[1], high_L[1]]).all()


def test_cumulated_means_have_the_interval_of_the_sum():
    """Two bins of widths 1 and 3 with the same means in each prompt: the sum has four times the bounds of one."""
    value_GL = np.repeat(np.random.default_rng(2).exponential(size=(20, 1)), 2, axis=1)
    tokens_GL = np.ones((20, 2))
    low_L, high_L = interval_of_means(value_GL, tokens_GL)
    low_sum_L, high_sum_L = interval_of_means(value_GL, tokens_GL, np.array([1.0, 3.0]))
    assert low_sum_L == pytest.approx([low_L[0], 4 * low_L[1]])
    assert high_sum_L == pytest.approx([high_L[0], 4 * high_L[1]])


def test_a_paired_difference_has_the_interval_of_the_differences():
    """The prompts differ much more from each other than the runs: 1,000 pairs of runs with a true difference of 0.1."""
    rng = np.random.default_rng(3)
    prompt_GL = rng.normal(0, 5, (30, 1000))
    first_GL, other_GL = (
        prompt_GL + rng.normal(0, 0.1, prompt_GL.shape),
        prompt_GL + rng.normal(0.1, 0.1, prompt_GL.shape),
    )
    ones_GL = np.ones_like(prompt_GL)
    low_L, high_L = interval_of_difference(first_GL, ones_GL, other_GL, ones_GL)
    assert 0.92 < np.mean((low_L <= 0.1) & (high_L >= 0.1)) < 0.98
    assert np.mean(high_L - low_L) < 0.15  # unpaired about 5
    few = interval_of_difference(
        first_GL, ones_GL, other_GL[:], np.where(np.arange(30) < 9, 1.0, 0.0)[:, None] * ones_GL
    )
    assert np.isnan(few).all()  # nine prompts of the other run
