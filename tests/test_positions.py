"""The sums by position: parity with plain loops, and intervals that hold although tokens are correlated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.analysis.position_sums import BINS, GROUPS, PERCENT, Batch, PositionStats, chunks
from opdctl.losses.token_weights import IwOpd, ResponseTokens

LENGTHS = st.lists(st.integers(0, 45), max_size=12)


def response(advantage: np.ndarray) -> ResponseTokens:
    student = -np.arange(1.0, len(advantage) + 1)
    return ResponseTokens(student, student + advantage, advantage)


def random_batch(lengths: list[int], first: int = 0) -> Batch:
    rng = np.random.default_rng(sum(lengths))
    return Batch([response(rng.normal(size=n)) for n in lengths], first)


def weighed(batch: Batch) -> dict[str, list[np.ndarray]]:
    return {"iw_opd": [IwOpd()(tokens) for tokens in batch.responses]}


def bins_of(kind: str, length: int) -> np.ndarray:
    return {
        "whole": np.zeros(length, int),
        "position": np.arange(length),
        "relative": np.arange(length) * BINS // max(length, 1),
    }[kind]


def ratio_interval(batch: Batch, kind: str, number: int) -> tuple[float, float]:
    """Mean and standard error of |A| in one bin, as the textbook has it: from each response's sum and count there."""
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
def test_means_and_intervals_are_those_of_plain_loops(lengths):
    batch = random_batch(lengths)
    numbers = PositionStats.of(batch, weighed(batch))
    for kind in ("whole", "relative", "position"):
        sums = getattr(numbers, kind)
        assert sums.tokens_P.sum() == sum(lengths)
        for number in np.flatnonzero(sums.tokens_P):
            mean, error = ratio_interval(batch, kind, number)
            assert sums.mean("abs_advantage")[number] == pytest.approx(mean)
            half = sums.half_width("abs_advantage")[number]
            assert np.isnan(half) == np.isnan(error)
            if half > 0 and sums.responses_P[number] == 2:
                assert half == pytest.approx(12.706 * error, rel=1e-3)  # Student's t, one degree of freedom


@given(LENGTHS, LENGTHS)
def test_two_batches_merged_are_one(first, second):
    lengths = [*first, *second]
    whole = random_batch(lengths)
    parts = Batch(whole.responses[: len(first)]), Batch(whole.responses[len(first) :], len(first))
    merged = PositionStats()
    for part in parts:
        merged.merge(PositionStats.of(part, weighed(part)))
    once = PositionStats.of(whole, weighed(whole))
    assert (merged.responses, merged.tokens) == (once.responses, once.tokens)
    for kind in ("whole", "relative", "position"):
        for name, sums in getattr(once, kind).values.items():
            np.testing.assert_allclose(getattr(merged, kind).values[name], sums, rtol=1e-9, atol=1e-9)
    for name, sums in once.shares.signals.items():
        np.testing.assert_allclose(merged.shares.signals[name], sums, atol=1e-9)
    np.testing.assert_allclose(merged.shares.moments["iw_opd"], once.shares.moments["iw_opd"])


@given(LENGTHS, st.integers(0, 3 * GROUPS))
def test_shares_keep_the_sum_and_the_groups(lengths, first):
    batch = random_batch(lengths, first)
    shares = PositionStats.of(batch, weighed(batch)).shares
    totals = [np.abs(tokens.advantage_T).sum() for tokens in batch.responses]
    assert shares.responses_G.sum() == len(lengths)
    for number, total in enumerate(totals):
        assert shares.signals["signal"][(first + number) % GROUPS].sum() == pytest.approx(total)
        assert shares.tokens_G[(first + number) % GROUPS] == lengths[number]


@given(st.integers(1, 300))
def test_a_flat_response_of_any_length_is_flat(length):
    batch = Batch([response(np.ones(length))])
    np.testing.assert_allclose(batch.by_percent(np.ones(length)), length / PERCENT, rtol=1e-9)


def test_a_token_that_is_cut_counts_in_parts():
    # three tokens of 1, 2 and 3: the first 30 % hold 0.9 of the first one
    batch = Batch([response(np.array([1.0, 2.0, 3.0]))])
    percent = batch.by_percent(np.array([1.0, 2.0, 3.0]))[0]
    assert percent[:30].sum() == pytest.approx(0.9)
    assert percent[:50].sum() == pytest.approx(1 + 0.5 * 2)


def test_unspent_is_what_iw_opd_multiplies_by_gamma():
    batch = random_batch([7, 0, 12])
    shares = PositionStats.of(batch, weighed(batch)).shares
    own = shares.signals["signal"] + 0.5 * shares.signals["unspent"]
    np.testing.assert_allclose(shares.signals["iw_opd"], own, atol=1e-9)


def test_the_interval_of_a_mean_holds_it_although_a_response_s_tokens_are_alike():
    rng, held, by_token = np.random.default_rng(0), 0, 0
    for _ in range(300):
        levels = rng.exponential(size=40)
        batch = Batch([response(np.full(50, level)) for level in levels])
        sums = PositionStats.of(batch, {}).whole
        mean, half = sums.mean("abs_advantage")[0], sums.half_width("abs_advantage")[0]
        held += abs(mean - 1) <= half
        by_token += abs(mean - 1) <= 1.96 * levels.std() / np.sqrt(40 * 50)
    assert held / 300 > 0.9
    assert by_token / 300 < 0.4  # what an interval over tokens would hold


@given(LENGTHS, st.integers(1, 60))
def test_chunks_are_whole_responses_in_order_of_little_more_than_the_budget(lengths, budget):
    batch = random_batch(lengths)
    parts = list(chunks(batch.responses, budget))
    assert [tokens for part in parts for tokens in batch.responses[part]] == list(batch.responses)
    for part in parts:
        assert sum(lengths[part][1:]) < budget
