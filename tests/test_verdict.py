"""The verdict on planted data: no bias where there is none, and the planted numbers where there is one."""

import numpy as np
import pytest

from opdctl.analysis.position_bias import BIAS_CONFIDENCE_LEVEL, PositionBias, assess_bias, find_change_point, share
from opdctl.analysis.position_sums import Batch, PositionStats
from opdctl.losses.token_weights import IwOpd, PrefixBoost, ResponseTokens, Weight


def numbers(signals: list[np.ndarray], weight: Weight | None = None) -> PositionStats:
    """The numbers of responses whose |A| are those given."""
    responses = [ResponseTokens(np.zeros(len(a)), -a, -a) for a in signals]
    weights = {"weight": [weight(tokens) for tokens in responses]} if weight else {}
    return PositionStats.of(Batch(responses), weights)


def judged(signals: list[np.ndarray]) -> PositionBias:
    return assess_bias(numbers(signals).shares)


def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(5, 150, count)


def even(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    return [rng.exponential(size=n) for n in lengths(rng, count)]


def spiky(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """One token in ten holds all, and a few of those hold most."""
    return [rng.lognormal(0, 2, n) * (rng.random(n) < 0.1) for n in lengths(rng, count)]


def levels(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Responses far apart from one another, the long ones the hotter."""
    return [rng.exponential(size=n) * rng.lognormal(0, 1.5) * n for n in lengths(rng, count)]


def correlated(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Bursts of some twenty tokens."""
    bursts = [np.convolve(rng.exponential(size=n + 19), np.ones(20), "valid") for n in lengths(rng, count)]
    return [np.maximum(burst - 20, 0) for burst in bursts]


@pytest.mark.parametrize("count", [20, 60, 700])
@pytest.mark.parametrize("kind", [even, spiky, levels, correlated])
def test_flat_data_are_called_biased_at_most_one_time_in_twenty(kind, count):
    rng, runs = np.random.default_rng(count), 300 if count < 700 else 60
    found = [judged(kind(rng, count)) for _ in range(runs)]
    assert sum(each.bias != "none found" for each in found) / runs <= 0.05
    assert sum(each.drift is not None for each in found) / runs <= 0.05


@pytest.mark.parametrize(("late", "bias"), [(0.7, "early"), (1.5, "late")])
def test_a_planted_bias_is_found_with_its_size_and_its_place(late, bias):
    """|A| of mean 1 before 60 % of the response and `late` after it."""
    rng, true = np.random.default_rng(0), 0.3 / (0.6 + 0.4 * late)
    found = []
    for _ in range(60):
        profiles = [np.where(np.arange(n) < 0.6 * n, 1.0, late) for n in rng.integers(2, 9, 150) * 20]
        found.append(judged([rng.exponential(profile) for profile in profiles]))
    assert all(each.bias == bias for each in found)
    assert sum(each.share.low <= true <= each.share.high for each in found) >= 54
    assert sum(each.drift.at.low <= 0.6 <= each.drift.at.high for each in found) >= 54
    assert np.mean([each.drift.at.value for each in found]) == pytest.approx(0.6, abs=0.02)
    assert np.mean([each.drift.before for each in found]) == pytest.approx(1.0, rel=0.02)
    assert np.mean([each.drift.after for each in found]) == pytest.approx(late, rel=0.03)


def test_the_interval_of_the_share_holds_it_whatever_the_tails():
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        signals = [signal * np.where(np.arange(len(signal)) < 0.3 * len(signal), 1, 2) for signal in spiky(rng, 60)]
        tokens = np.array([len(signal) for signal in signals])
        head = np.ceil(0.3 * tokens)  # the tokens of the lower level, of which the last may be cut
        true = (0.3 * tokens).sum() / (head + 2 * (tokens - head)).sum()
        found = judged(signals).share
        held += found.low <= true <= found.high
    assert held / 300 >= 0.92


@pytest.mark.parametrize("f", [0.25, 0.28])
def test_under_the_gamma_and_the_multiplier_that_are_suggested_the_signal_is_even(f):
    """The first 30 % hold the share f. In the limit of many tokens gamma is (0.3 - f) / (f - f²/2 - 0.15) and the
    multiplier 0.3 (1 - f) / (0.7 f)."""
    rng, gamma, multiplier = np.random.default_rng(0), (0.3 - f) / (f - f**2 / 2 - 0.15), 0.3 / 0.7 * (1 - f) / f
    profile, held = np.where(np.arange(400) < 120, 1.0, multiplier), np.zeros(2)
    for _ in range(40):
        signals = [rng.gamma(4, profile / 4) for _ in range(100)]
        found = judged(signals)
        assert found.bias == "late"
        for weight in (IwOpd(found.gamma.value), PrefixBoost(0.3, found.multiplier.value)):
            weighted = numbers(signals, weight).shares.signals["weight"]
            assert share(weighted).value == pytest.approx(0.3, abs=1e-9)
        held += [found.gamma.low < gamma < found.gamma.high, found.multiplier.low < multiplier < found.multiplier.high]
    assert held.min() >= 34


def test_where_no_gamma_is_enough_it_is_infinite_and_none_in_json():
    rng = np.random.default_rng(0)
    found = judged([rng.exponential(np.where(np.arange(100) < 30, 1.0, 3.0)) for _ in range(100)])
    assert found.gamma.value == np.inf
    assert found.as_dict()["gamma"]["value"] is None
    assert found.multiplier.value == pytest.approx(3.0, rel=0.1)


def test_an_early_bias_suggests_no_further_weight():
    rng = np.random.default_rng(0)
    found = judged([rng.exponential(np.where(np.arange(100) < 30, 3.0, 1.0)) for _ in range(100)])
    assert (found.bias, found.gamma.value, found.multiplier.value) == ("early", 0.0, 1.0)


def test_a_response_that_holds_nearly_all_leaves_the_share_open():
    signals = [np.ones(10)] * 19 + [np.array([1e6] + [0.0] * 9)]
    found = judged(signals)
    assert (found.bias, found.share.low, found.share.high) == ("none found", 0.0, 1.0)


def test_an_even_signal_has_no_place_where_it_changes():
    flat = numbers([np.ones(50)] * 30).shares
    used = flat.responses_G > 0
    assert find_change_point(flat.signals["signal"][used], flat.tokens_G[used]) is None
    assert assess_bias(flat).bias == "none found"
    assert assess_bias(flat).p_value == 1.0
    assert BIAS_CONFIDENCE_LEVEL > 0.95
