"""Sums by position: equal to plain loops, whatever the batches."""

from collections.abc import Callable

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
    position_bins,
    position_bounds,
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


def plain_sums(batch: Batch, bin_of: Callable[[int, int], int]) -> dict[tuple[int, int], tuple[float, float]]:
    """Σ|A| and the tokens by group and bin, token by token. bin_of: the bin of a position, from 1, and a length."""
    sums: dict[tuple[int, int], tuple[float, float]] = {}
    for tokens, group in zip(batch.responses, batch.group_R.tolist(), strict=True):
        for position, advantage in enumerate(tokens.advantage_T, start=1):
            key = group, bin_of(position, len(tokens))
            total, count = sums.get(key, (0.0, 0.0))
            sums[key] = total + abs(advantage), count + 1
    return sums


def plain_bin(position: int) -> int:
    """Positions below 32 have a bin each, the others 16 for each power of two."""
    if position < 32:
        return position - 1
    octave = position.bit_length() - 1
    return 31 + 16 * (octave - 5) + (position - 2**octave) * 16 // 2**octave


@given(st.integers(1, 100_000))
def test_bins_of_positions(position):
    number = int(position_bins(np.array([position]))[0])
    assert number == plain_bin(position)
    first_L, last_L = position_bounds(number + 1)
    assert first_L[number] <= position <= last_L[number]
    assert last_L[number] - first_L[number] + 1 <= max(1, position / 16)
    assert first_L[1:].tolist() == (last_L[:-1] + 1).tolist()


@given(LENGTHS)
def test_sums_by_position_equal_plain_loops(lengths):
    batch = random_batch(lengths)
    sums = PositionStats.of(batch, iw_opd_weights(batch)).by_position()
    plain = plain_sums(batch, lambda position, length: plain_bin(position))
    value_GL, tokens_GL = np.zeros_like(sums.tokens_GL), np.zeros_like(sums.tokens_GL)
    for (group, number), (total, count) in plain.items():
        value_GL[group, number], tokens_GL[group, number] = total, count
    np.testing.assert_allclose(sums.tokens_GL, tokens_GL)
    if lengths and max(lengths):
        np.testing.assert_allclose(sums.values["abs_advantage"], value_GL, atol=1e-12)
        reach = [sum(n >= first for n in lengths) for first in position_bounds(len(sums.responses_L))[0]]
        assert sums.responses_L.tolist() == reach


@given(LENGTHS)
def test_sums_by_relative_position_cut_tokens_among_bins(lengths):
    batch = random_batch(lengths)
    relative = PositionStats.of(batch, {}).relative
    expected = np.zeros(BINS)
    for tokens in batch.responses:
        for t, advantage in enumerate(tokens.advantage_T):
            for number in range(BINS):
                low, high = max(t / len(tokens), number / BINS), min((t + 1) / len(tokens), (number + 1) / BINS)
                expected[number] += abs(advantage) * max(high - low, 0) * len(tokens)
    np.testing.assert_allclose(relative.values["abs_advantage"].sum(0), expected, atol=1e-9)
    np.testing.assert_allclose(relative.tokens_L, np.full(BINS, sum(lengths) / BINS))
    assert relative.responses_L.tolist() == [np.count_nonzero(lengths)] * BINS


@given(LENGTHS, st.integers(0, 2**12 - 1))
def test_cohorts_have_similar_lengths_and_one_end(lengths, bits):
    whole = random_batch(lengths)
    truncated = np.array([bool(bits >> number & 1) for number in range(len(lengths))], bool)
    stats = PositionStats.of(Batch(whole.responses, whole.group_R, truncated), {})
    for cohort, sums in stats.position.items():
        own = [n for n, cut in zip(lengths, truncated, strict=True) if n and cohort == (n.bit_length() - 1, cut)]
        assert stats.count[cohort] == len(own)
        assert stats.shortest[cohort] == min(own)
        assert sums.tokens_L.sum() == sum(own)
        assert 2**cohort.octave <= min(own) <= max(own) < 2 ** (cohort.octave + 1)
    assert sum(stats.count.values()) == np.count_nonzero(lengths)


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
    assert (merged.count, merged.shortest) == (once.count, once.shortest)
    for sums, expected in (
        (merged.overall, once.overall),
        (merged.relative, once.relative),
        (merged.by_position(), once.by_position()),
    ):
        np.testing.assert_array_equal(sums.responses_L, expected.responses_L)
        for name, value_GL in expected.values.items():
            np.testing.assert_allclose(sums.values[name], value_GL, rtol=1e-9, atol=1e-9)
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
    np.testing.assert_allclose(batch.by_fraction(np.ones(length), PERCENT), length / PERCENT, rtol=1e-9)


def test_token_is_divided_among_bins():
    # three tokens with values 1, 2 and 3: the first 30% contain 0.9 of the first
    batch = batch_of([response(np.array([1.0, 2.0, 3.0]))])
    percent = batch.by_fraction(np.array([1.0, 2.0, 3.0]), PERCENT)[0]
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
    expected = batch.by_fraction(np.concatenate(weighted), PERCENT)
    np.testing.assert_allclose(profile.signals["iw_opd"][: len(expected)], expected, atol=1e-9)


@given(LENGTHS, st.integers(1, 60))
def test_split_keeps_responses_complete_and_in_order(lengths, budget):
    batch = random_batch(lengths)
    parts = list(split_by_tokens(batch.responses, budget))
    assert [tokens for part in parts for tokens in batch.responses[part]] == list(batch.responses)
    for part in parts:
        assert sum(lengths[part][1:]) < budget
