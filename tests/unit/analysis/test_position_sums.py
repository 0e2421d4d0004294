"""Sums by position: equal to plain loops, and intervals with the right coverage although tokens are correlated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.analysis.position_sums import (
    BINS,
    GROUPS,
    PERCENT,
    Batch,
    PositionStats,
    PromptGroups,
    split_by_tokens,
)
from opdctl.losses.token_weights import IwOpd, ResponseTokens

LENGTHS = st.lists(st.integers(0, 45), max_size=12)


def response(advantage: np.ndarray) -> ResponseTokens:
    student = -np.arange(1.0, len(advantage) + 1)
    return ResponseTokens(student, student + advantage, advantage)


def batch_of(responses: list[ResponseTokens]) -> Batch:
    """Return responses to different prompts."""
    return Batch(responses, np.arange(len(responses)) % GROUPS)


def random_batch(lengths: list[int]) -> Batch:
    rng = np.random.default_rng(sum(lengths))
    return batch_of([response(rng.normal(size=n)) for n in lengths])


def iw_opd_weights(batch: Batch) -> dict[str, list[np.ndarray]]:
    return {"iw_opd": [IwOpd()(tokens) for tokens in batch.responses]}


def bins_of(kind: str, length: int) -> np.ndarray:
    return {
        "overall": np.zeros(length, int),
        "position": np.arange(length),
        "relative": np.arange(length) * BINS // max(length, 1),
    }[kind]


def ratio_interval(batch: Batch, kind: str, number: int) -> tuple[float, float]:
    """Mean and standard error of |A| in one bin, by the textbook: from the sum and the count of each response."""
    sums, counts = [], []
    for tokens in batch.responses:
        inside = bins_of(kind, len(tokens)) == number
        if inside.any():
            sums.append(np.abs(tokens.advantage_T[inside]).sum())
            counts.append(inside.sum())
    s, c = np.array(sums), np.array(counts)
    mean = s.sum() / c.sum()
    return mean, np.sqrt(((s - mean * c) ** 2).sum() / c.sum() ** 2 * len(s) / (len(s) - 1)) if len(s) > 1 else np.nan


@given(LENGTHS)
def test_means_and_intervals_equal_plain_loops(lengths):
    batch = random_batch(lengths)
    numbers = PositionStats.of(batch, iw_opd_weights(batch))
    for kind in ("overall", "relative", "position"):
        sums = getattr(numbers, kind)
        assert sums.tokens_L.sum() == sum(lengths)
        for number in np.flatnonzero(sums.tokens_L):
            mean, error = ratio_interval(batch, kind, number)
            assert sums.mean("abs_advantage")[number] == pytest.approx(mean)
            half = sums.half_width("abs_advantage")[number]
            assert np.isnan(half) == np.isnan(error)
            if half > 0 and sums.responses_L[number] == 2:
                assert half == pytest.approx(12.706 * error, rel=1e-3)  # Student's t, one degree of freedom


@given(LENGTHS, LENGTHS)
def test_merged_batches_equal_one_batch(first, second):
    lengths = [*first, *second]
    whole = random_batch(lengths)
    parts = [Batch(whole.responses[part], whole.group_R[part]) for part in (slice(len(first)), slice(len(first), None))]
    merged = PositionStats()
    for part in parts:
        merged.merge(PositionStats.of(part, iw_opd_weights(part)))
    once = PositionStats.of(whole, iw_opd_weights(whole))
    assert (merged.responses, merged.tokens) == (once.responses, once.tokens)
    for kind in ("overall", "relative", "position"):
        for name, sums in getattr(once, kind).values.items():
            np.testing.assert_allclose(getattr(merged, kind).values[name], sums, rtol=1e-9, atol=1e-9)
    for name, sums in once.profile.signals.items():
        np.testing.assert_allclose(merged.profile.signals[name], sums, atol=1e-9)
    np.testing.assert_allclose(merged.profile.moments["iw_opd"], once.profile.moments["iw_opd"])


@given(LENGTHS, st.data())
def test_profile_has_the_sums_of_each_group(lengths, data):
    groups = data.draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    batch = Batch(random_batch(lengths).responses, np.array(groups, int))
    profile = PositionStats.of(batch, iw_opd_weights(batch)).profile
    totals = np.array([np.abs(tokens.advantage_T).sum() for tokens in batch.responses])
    for group in range(GROUPS):
        members = np.flatnonzero(batch.group_R == group)
        assert profile.responses_G[group] == len(members)
        assert profile.tokens_G[group] == sum(lengths[number] for number in members)
        assert profile.signals["signal"][group].sum() == pytest.approx(totals[members].sum())


def test_all_responses_to_a_prompt_are_in_one_group():
    groups = PromptGroups()
    assert groups.assign(["b", "b", "a"]).tolist() == [0, 0, 1]
    assert groups.assign(["a", "c", "b"]).tolist() == [1, 2, 0]  # the next step, or a later epoch
    assert groups.assign(map(str, range(GROUPS))).tolist() == [*range(3, GROUPS), 0, 1, 2]


@given(st.integers(1, 300))
def test_uniform_response_has_a_uniform_profile(length):
    batch = batch_of([response(np.ones(length))])
    np.testing.assert_allclose(batch.by_percent(np.ones(length)), length / PERCENT, rtol=1e-9)


def test_token_is_divided_among_bins():
    # three tokens with values 1, 2 and 3: the first 30% contain 0.9 of the first
    batch = batch_of([response(np.array([1.0, 2.0, 3.0]))])
    percent = batch.by_percent(np.array([1.0, 2.0, 3.0]))[0]
    assert percent[:30].sum() == pytest.approx(0.9)
    assert percent[:50].sum() == pytest.approx(1 + 0.5 * 2)


def test_profile_of_a_weight_is_that_of_the_weighted_signal():
    batch = random_batch([7, 0, 12])
    profile = PositionStats.of(batch, iw_opd_weights(batch)).profile
    weighted = []
    for tokens in batch.responses:
        signal_T = np.abs(tokens.advantage_T)
        remaining_T = 1 - (np.cumsum(signal_T) - signal_T) / max(signal_T.sum(), 1e-9)
        weighted.append((1 + 0.5 * remaining_T) * signal_T)
    expected = batch.by_percent(np.concatenate(weighted))
    np.testing.assert_allclose(profile.signals["iw_opd"][: len(expected)], expected, atol=1e-9)


def test_interval_of_a_mean_covers_it_if_tokens_are_correlated():
    rng, covered, covered_by_token = np.random.default_rng(0), 0, 0
    for _ in range(300):
        levels = rng.exponential(size=40)
        batch = batch_of([response(np.full(50, level)) for level in levels])
        sums = PositionStats.of(batch, {}).overall
        mean, half = sums.mean("abs_advantage")[0], sums.half_width("abs_advantage")[0]
        covered += abs(mean - 1) <= half
        covered_by_token += abs(mean - 1) <= 1.96 * levels.std() / np.sqrt(40 * 50)
    assert covered / 300 > 0.9
    assert covered_by_token / 300 < 0.4  # an interval with tokens as its unit


@given(LENGTHS, st.integers(1, 60))
def test_split_keeps_responses_complete_and_in_order(lengths, budget):
    batch = random_batch(lengths)
    parts = list(split_by_tokens(batch.responses, budget))
    assert [tokens for part in parts for tokens in batch.responses[part]] == list(batch.responses)
    for part in parts:
        assert sum(lengths[part][1:]) < budget
