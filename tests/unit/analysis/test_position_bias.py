"""The test of position bias on planted data: false positives, power, and the coverage of the intervals."""

import numpy as np
import pytest

from opdctl.analysis.position_bias import (
    BIAS_CONFIDENCE_LEVEL,
    PositionBias,
    assess_bias,
    effective_sample_size,
    find_change_point,
)
from opdctl.analysis.position_sums import GROUPS, Batch, PositionStats, SignalProfile
from opdctl.losses.token_weights import ResponseTokens


def profile_of(signals: list[np.ndarray], samples: int = 1) -> SignalProfile:
    """Return the profile of responses with these |A|, `samples` adjacent ones to each prompt."""
    responses = [ResponseTokens(np.zeros(len(a)), -a, -a) for a in signals]
    return PositionStats.of(Batch(responses, np.arange(len(signals)) // samples % GROUPS), {}).profile


def assess(signals: list[np.ndarray], samples: int = 1) -> PositionBias:
    return assess_bias(profile_of(signals, samples))


def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(5, 150, count)


def even(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    return [rng.exponential(size=n) for n in lengths(rng, count)]


def spiky(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """One token in ten has a signal, and a few of those have most of it."""
    return [rng.lognormal(0, 2, n) * (rng.random(n) < 0.1) for n in lengths(rng, count)]


def levels(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """The mean signal varies among responses and rises with their length."""
    return [rng.exponential(size=n) * rng.lognormal(0, 1.5) * n for n in lengths(rng, count)]


def correlated(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Bursts of some twenty tokens."""
    bursts = [np.convolve(rng.exponential(size=n + 19), np.ones(20), "valid") for n in lengths(rng, count)]
    return [np.maximum(burst - 20, 0) for burst in bursts]


@pytest.mark.parametrize("count", [20, 60, 700])
@pytest.mark.parametrize("kind", [even, spiky, levels, correlated])
def test_at_most_one_false_positive_in_twenty(kind, count):
    rng, runs = np.random.default_rng(count), 300 if count < 700 else 60
    results = [assess(kind(rng, count)) for _ in range(runs)]
    assert sum(each.direction != "none found" for each in results) / runs <= 0.05
    assert sum(each.change_point is not None for each in results) / runs <= 0.05


def slopes(rng: np.random.Generator, prompts: int, samples: int) -> list[np.ndarray]:
    """|A| rises or falls along the response, alike in all responses to a prompt; on average it is constant."""
    slope = np.repeat(rng.uniform(-1, 1, prompts), samples)
    return [np.maximum(1 + a * np.linspace(-1, 1, 60), 0) * rng.exponential(size=60) for a in slope]


def bursts(rng: np.random.Generator, prompts: int, samples: int) -> list[np.ndarray]:
    """One burst of signal, at the same place in all responses to a prompt."""
    start = np.repeat(rng.integers(0, 60, prompts), samples)
    return [np.isin(np.arange(60), (a + np.arange(6)) % 60) * rng.exponential() for a in start]


@pytest.mark.parametrize("samples", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [slopes, bursts])
def test_responses_to_one_prompt_are_no_independent_evidence(kind, samples):
    rng, runs = np.random.default_rng(samples), 150
    results = [assess(kind(rng, 30, samples), samples) for _ in range(runs)]
    assert sum(each.direction != "none found" for each in results) / runs <= 0.04
    assert sum(each.change_point is not None for each in results) / runs <= 0.04


@pytest.mark.parametrize(("late", "direction"), [(0.7, "early"), (1.5, "late")])
def test_planted_bias_is_found(late, direction):
    """|A| has mean 1 before 60% of the response and mean `late` after it."""
    rng, true = np.random.default_rng(0), 0.3 / (0.6 + 0.4 * late)
    results = []
    for _ in range(60):
        profiles = [np.where(np.arange(n) < 0.6 * n, 1.0, late) for n in rng.integers(2, 9, 150) * 20]
        results.append(assess([rng.exponential(profile) for profile in profiles]))
    assert all(each.direction == direction for each in results)
    assert sum(each.prefix_fraction.low <= true <= each.prefix_fraction.high for each in results) >= 54
    changes = [each.change_point for each in results]
    assert sum(change.position.low <= 0.6 <= change.position.high for change in changes) >= 54
    assert np.mean([change.position.value for change in changes]) == pytest.approx(0.6, abs=0.02)
    assert np.mean([change.before for change in changes]) == pytest.approx(1.0, rel=0.02)
    assert np.mean([change.after for change in changes]) == pytest.approx(late, rel=0.03)


def test_interval_of_the_prefix_fraction_covers_it_if_the_signal_is_heavy_tailed():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        signals = [signal * np.where(np.arange(len(signal)) < 0.3 * len(signal), 1, 2) for signal in spiky(rng, 60)]
        tokens = np.array([len(signal) for signal in signals])
        prefix = np.ceil(0.3 * tokens)  # tokens with the lower signal; the last one may be divided
        true = (0.3 * tokens).sum() / (prefix + 2 * (tokens - prefix)).sum()
        fraction = assess(signals).prefix_fraction
        covered += fraction.low <= true <= fraction.high
    assert covered / 300 >= 0.92


def test_interval_is_unbounded_if_one_response_has_most_of_the_signal():
    signals = [np.ones(10)] * 19 + [np.array([1e6] + [0.0] * 9)]
    bias = assess(signals)
    assert (bias.direction, bias.prefix_fraction.low, bias.prefix_fraction.high) == ("none found", 0.0, 1.0)


@pytest.mark.parametrize("place", [0.04, 0.403, 0.97])
def test_interval_of_the_change_point_is_wider_than_the_grid(place):
    """A sharp change is found at the same cut by all bootstrap samples."""
    rng = np.random.default_rng(5)
    steps = [np.where(np.arange(1000) < 1000 * place, 1.0, 6.0) * rng.gamma(50, size=1000) for _ in range(40)]
    position = assess(steps).change_point.position
    assert 0 <= position.low <= place <= position.high <= 1
    assert position.high - position.low >= 0.02
    assert position.low == (0 if place < 0.05 else pytest.approx(position.value - 0.01))
    assert position.high == (1 if place > 0.95 else pytest.approx(position.value + 0.01))


def test_uniform_signal_has_no_change_point():
    uniform = profile_of([np.ones(50)] * 30)
    nonempty = uniform.responses_G > 0
    assert find_change_point(uniform.signals["signal"][nonempty], uniform.tokens_G[nonempty]) is None
    assert assess_bias(uniform).direction == "none found"
    assert assess_bias(uniform).p_value == 1.0
    assert BIAS_CONFIDENCE_LEVEL > 0.95


@pytest.mark.parametrize(
    ("signals", "reason"),
    [([np.zeros(5)] * 30, "no signal"), ([np.ones(5)] * 19, "to 19 prompts"), ([np.ones(1)] * 30, "single token")],
)
def test_bias_is_unknown(signals, reason):
    bias = assess(signals)
    assert bias.direction == "unknown"
    assert reason in bias.reason


def test_bias_of_many_responses_to_few_prompts_is_unknown():
    assert "to 10 prompts" in assess([np.ones(5)] * 80, samples=8).reason


def test_effective_sample_size_by_hand():
    # weights 1, 1, 1, 3 in two groups: (Σ w)² / (N Σ w²) = 36 / (4 · 12)
    tokens_G, moments_G2 = np.array([2.0, 2.0]), np.array([[2.0, 2.0], [4.0, 10.0]])
    size = effective_sample_size(tokens_G, moments_G2)
    assert size.value == pytest.approx(0.75)
    assert np.isnan(size.low)  # two prompts
    many = effective_sample_size(np.tile(tokens_G, 10), np.tile(moments_G2, (10, 1)))
    assert many.value == pytest.approx(0.75)
    assert 0.74 < many.low <= 0.75 < many.high < 0.8  # 0.75 is nearly the least that any sample can have


# ── Two quantities, with and without truncated responses ─────────────────────────────────────────────────────────────


def test_estimates_by_hand():
    """Shares 0.6 of a signal of 10 and 0.1 of a signal of 90; the second response is truncated."""
    first, second = np.array([2.0] * 3 + [4 / 7] * 7), np.array([3.0] * 3 + [81 / 7] * 7)
    responses = [ResponseTokens(np.zeros(10), -a, -a) for a in (first, second)]
    batch = Batch(responses, np.arange(2), np.array([False, True]))
    found = assess_bias(PositionStats.of(batch, {}).profile).estimates
    values = {(each.of, each.responses): each.fraction.value for each in found}
    assert values == pytest.approx(
        {
            ("signal", "all"): (6 + 9) / 100,
            ("response", "all"): 0.35,
            ("signal", "complete"): 0.6,
            ("response", "complete"): 0.6,
        }
    )
    assert {each.p_value for each in found} == {None}  # two prompts


def test_a_few_responses_with_most_of_the_signal_do_not_decide_alone():
    """585 responses are even; 15 have a thousand times the signal, in their last part."""
    rng = np.random.default_rng(0)
    late = [np.where(np.arange(50) < 25, 0.0, 1000.0) * rng.exponential(size=50) for _ in range(15)]
    bias = assess([*even(rng, 585), *late])
    assert bias.direction == "mixed"
    by_quantity = {each.of: each for each in bias.estimates}
    assert by_quantity["signal"].direction == "late"
    assert by_quantity["response"].direction == "none found"
    assert by_quantity["response"].fraction.value == pytest.approx(585 / 600 * 0.3, abs=0.02)


def test_bias_of_truncated_responses_alone_is_not_that_of_the_run():
    rng = np.random.default_rng(1)
    cut = [np.where(np.arange(60) < 30, 0.1, 1.0) * rng.exponential(size=60) for _ in range(100)]
    whole = [rng.exponential(size=60) for _ in range(100)]
    responses = [ResponseTokens(np.zeros(60), -a, -a) for a in (*cut, *whole)]
    batch = Batch(responses, np.arange(200), np.arange(200) < 100)
    bias = assess_bias(PositionStats.of(batch, {}).profile)
    assert bias.direction == "mixed"
    assert {each.direction for each in bias.estimates if each.responses == "all"} == {"late"}
    assert {each.direction for each in bias.estimates if each.responses == "complete"} == {"none found"}


def test_test_and_interval_have_one_level():
    """An estimate has a direction if and only if its interval does not contain 30%."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        for each in assess(slopes(rng, 30, 1)).estimates:
            contains = each.fraction.low <= 0.3 <= each.fraction.high
            assert contains == (each.direction == "none found")
