"""The statistics of an evaluation, by hand and by brute force. acceptance/test_interval_coverage.py simulates them."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from opdctl.evaluation import statistics
from opdctl.evaluation.statistics import (
    Estimate,
    combine_independent,
    compare_paired,
    compare_runs,
    estimate_ratio,
    k_values,
    maj_at_k,
    mean_of_runs,
    pass_at_k,
    problem_bootstrap,
    sampling_interval,
)

# ── Averages and intervals ───────────────────────────────────────────────────────────────────────────────────────────


def test_average_is_over_problems() -> None:
    # accuracies 1/4 and 1 have the mean 5/8; pooling the five samples would give 2/5
    assert problem_bootstrap([0.25, 1.0]).value == pytest.approx(0.625)


def test_bootstrap_is_deterministic_and_contains_the_mean() -> None:
    accuracies = np.random.default_rng(2).beta(0.3, 0.5, 30)
    assert problem_bootstrap(accuracies) == problem_bootstrap(accuracies)
    assert problem_bootstrap(accuracies) != problem_bootstrap(accuracies, seed=1)
    found = problem_bootstrap(accuracies)
    assert 0 < found.low < found.value < found.high < 1


def test_correct_and_incorrect_are_symmetric() -> None:
    rng = np.random.default_rng(3)
    accuracies = rng.beta(0.3, 0.5, 30)
    found, mirrored = problem_bootstrap(accuracies), problem_bootstrap(1 - accuracies)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_equal_values_have_the_exact_binomial_interval() -> None:
    # Clopper and Pearson: the accuracy at which five of five have probability 2.5 %
    bound = 0.025 ** (1 / 5)
    correct, incorrect = problem_bootstrap([1.0] * 5), problem_bootstrap([0.0] * 5)
    assert (correct.value, correct.low, correct.high) == pytest.approx((1.0, bound, 1.0))
    assert (incorrect.value, incorrect.low, incorrect.high) == pytest.approx((0.0, 0.0, 1 - bound))


def test_single_problem_has_the_widest_interval() -> None:
    assert problem_bootstrap([0.5]) == Estimate(0.5, 0.0, 1.0)


def test_one_correct_problem_of_many_has_an_interval() -> None:
    found = problem_bootstrap([1.0] + [0.0] * 255)
    assert 0 < found.low < 1 / 256 < found.high < 0.1


def test_sampling_interval_by_hand() -> None:
    # accuracies 1/2 and 1; variance (1/4 / 3 + 0) / 2² + 1 / 8²
    found = sampling_interval([[True, False, True, False], [True] * 4])
    assert found is not None
    half = 1.959964 * (1 / 48 + 1 / 64) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75 - half, 1.0), abs=1e-6)


def test_one_sample_per_problem_has_no_sampling_interval() -> None:
    assert sampling_interval([[True], [False]]) is None
    assert sampling_interval([[True, True], [False]]) is None


def test_agreeing_samples_have_a_sampling_interval() -> None:
    found = sampling_interval([[True] * 4] * 5 + [[False] * 4] * 5)
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.959964 / 40, abs=1e-6)


# ── pass@k and maj@k ─────────────────────────────────────────────────────────────────────────────────────────────────

samples = st.lists(st.sampled_from(["right", "a", "b", "c", None]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("n", "ks"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_k_values(n: int, ks: list[int]) -> None:
    assert k_values(n) == ks


def test_pass_at_k_by_hand() -> None:
    # of the 6 pairs of 4 samples, 3 contain the correct one
    assert pass_at_k([True, False, False, False], 2) == pytest.approx(0.5)
    assert pass_at_k([False] * 4, 4) == 0
    assert pass_at_k([True, True, True, False], 2) == 1


@given(samples, st.data())
def test_pass_at_k_by_brute_force(sampled: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(sampled)))
    correct = [each == "right" for each in sampled]
    subsets = [any(subset) for subset in combinations(correct, k)]
    assert pass_at_k(correct, k) == pytest.approx(np.mean(subsets))


def vote(subset: tuple[str | None, ...]) -> float:
    """Return the probability that the majority vote of these samples is correct."""
    counts = {name: subset.count(name) for name in {*subset} - {None}}
    winners = [name for name, count in counts.items() if count == max(counts.values())]
    return ("right" in winners) / len(winners) if winners else 0.0


@given(samples, st.data())
def test_maj_at_k_by_brute_force(sampled: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(sampled)))
    correct = [each == "right" for each in sampled]
    assert maj_at_k(sampled, correct, k) == pytest.approx(
        np.mean([vote(subset) for subset in combinations(sampled, k)])
    )


@given(samples)
def test_pass_at_1_and_maj_at_1_are_the_average(sampled: list[str | None]) -> None:
    correct = [each == "right" for each in sampled]
    assert pass_at_k(correct, 1) == pytest.approx(np.mean(correct))
    assert maj_at_k(sampled, correct, 1) == pytest.approx(np.mean(correct))


@given(samples)
def test_pass_at_k_increases_with_k(sampled: list[str | None]) -> None:
    correct = [each == "right" for each in sampled]
    passed = [pass_at_k(correct, k) for k in range(1, len(sampled) + 1)]
    assert passed == sorted(passed)


def test_maj_at_k_of_many_samples() -> None:
    sampled = ["right"] * 10 + ["a"] * 9 + [f"wrong {i}" for i in range(12)] + [None]
    correct = [each == "right" for each in sampled]
    assert maj_at_k(sampled, correct, 32) == 1  # 10 against 9
    assert 0.5 < maj_at_k(sampled, correct, 16) < 1


@pytest.mark.parametrize("k", [1, 256, 1024, 2000])
def test_maj_at_k_of_thousands_of_samples(k: int) -> None:
    # exchangeable classes win equally often; so do the votes of a single sample
    sampled = [name for name in ("right", "a", "b", "c") for _ in range(500)]
    assert maj_at_k(sampled, [name == "right" for name in sampled], k) == pytest.approx(1 / 4)


def test_maj_at_k_of_two_classes_is_hypergeometric() -> None:
    # 1,000 of 2,050 samples are correct; of 51 votes at least 26 are; no ties
    sampled = ["right"] * 1000 + ["a"] * 1050
    expected = stats.hypergeom.sf(25, 2050, 1000, 51)
    assert maj_at_k(sampled, [name == "right" for name in sampled], 51) == pytest.approx(expected)


def test_correct_answers_in_different_notations_are_one_class() -> None:
    assert maj_at_k(["0.5", "1/2", "7", "7", "8"], [True, True, False, False, False], 5) == pytest.approx(0.5)


# ── Two evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_paired_comparison_by_hand() -> None:
    found = compare_paired([0.5, 0.0, 1.0, 0.0], [1.0, 0.5, 1.0, 1.0])
    # differences 1/2, 1/2, 0, 1; their standard error is 0.204124, t with 3 degrees of freedom 3.182446
    assert found.difference == pytest.approx(0.5)
    assert found.ci == pytest.approx((0.5 - 0.204124 * 3.182446, 1.0), abs=1e-5)
    assert found.p_value == pytest.approx(2 / 8)  # of the 8 signings of three, two are as extreme


def test_equal_evaluations_and_a_single_problem_have_p_1() -> None:
    same = compare_paired([0.5, 0.0, 1.0], [0.5, 0.0, 1.0])
    assert (same.difference, same.ci, same.p_value) == (0, (0, 0), 1)
    assert compare_paired([0.0], [1.0]) == statistics.Comparison(1.0, (-1.0, 1.0), 1.0)


def test_single_differing_problem_has_p_1() -> None:
    found = compare_paired([1, 0, 0, 0], [1, 1, 0, 0])
    # the standard error of 0, 1, 0, 0 is 0.25, t with 3 degrees of freedom 3.182446
    assert (found.difference, found.p_value) == (0.25, 1)
    assert found.ci == pytest.approx((0.25 - 0.25 * 3.182446, 1.0), abs=1e-5)


def test_swapping_the_evaluations_changes_the_sign() -> None:
    rng = np.random.default_rng(5)
    one, other = rng.random(30), rng.random(30)
    found, turned = compare_paired(one, other), compare_paired(other, one)
    assert turned.difference == pytest.approx(-found.difference)
    assert turned.ci == pytest.approx((-found.ci[1], -found.ci[0]))
    assert turned.p_value == pytest.approx(found.p_value, abs=0.02)


# ── Several benchmarks, several training runs ────────────────────────────────────────────────────────────────────────


def test_combined_interval_by_hand() -> None:
    found = combine_independent([Estimate(0.5, 0.3, 0.6), Estimate(0.2, 0.1, 0.6)], [0.5, 0.5])
    # below: sqrt(0.1² + 0.05²) = 0.1118034; above: sqrt(0.05² + 0.2²) = 0.2061553
    assert (found.value, found.low, found.high) == pytest.approx((0.35, 0.35 - 0.1118034, 0.35 + 0.2061553))
    alone = combine_independent([Estimate(0.5, 0.3, 0.6)], [1.0])
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.5, 0.3, 0.6))


def test_mean_of_runs_by_hand() -> None:
    # standard deviation 0.1, t with 2 degrees of freedom 4.302653
    found = mean_of_runs([0.4, 0.5, 0.6])
    half_width = 4.302653 * 0.1 / 3**0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half_width, 0.5 + half_width))


def test_comparison_of_runs_is_welchs() -> None:
    one, other = [0.4, 0.5, 0.6], [0.55, 0.85]
    found = compare_runs(one, other)
    # variances 0.01 / 3 and 0.045 / 2; degrees of freedom 0.0258333² / (0.0033333² / 2 + 0.0225² / 1)
    degrees = 0.0258333**2 / (0.0033333**2 / 2 + 0.0225**2)
    half_width = float(stats.t.ppf(0.975, degrees)) * 0.0258333**0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2 - half_width, 0.2 + half_width), abs=1e-4)
    reference = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


def test_runs_without_spread_have_no_width() -> None:
    found = compare_runs([0.5, 0.5], [0.75, 0.75])
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)


# ── Formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ratio_of_estimates_by_hand() -> None:
    ratio = estimate_ratio(Estimate(1.0, 0.8, 1.2), Estimate(2.0, 2.0, 2.0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.4, 0.6))
    ratio = estimate_ratio(Estimate(1.0, 1.0, 1.0), Estimate(2.0, 1.0, 3.0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 1 / 3, 1.0))
    ratio = estimate_ratio(Estimate(-1.0, -1.0, -1.0), Estimate(-2.0, -3.0, -1.0))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 1 / 3, 1.0))


@given(st.floats(-5, 5), st.floats(0.01, 2), st.floats(1, 5), st.floats(0.01, 0.9))
def test_bounds_of_a_ratio_are_where_the_difference_is_barely_significant(b, half_b, a, half_a) -> None:
    ratio = estimate_ratio(Estimate(b, b - half_b, b + half_b), Estimate(a, a - half_a, a + half_a))
    assert ratio.low < ratio.value < ratio.high
    for bound in (ratio.low, ratio.high):
        assert (b - bound * a) ** 2 == pytest.approx(half_b**2 + (bound * half_a) ** 2, rel=1e-6)


def test_ratio_to_an_estimate_that_may_be_0_has_no_interval() -> None:
    assert estimate_ratio(Estimate(1.0, 0.9, 1.1), Estimate(1.0, -0.5, 2.5)).format(".1f") == "1.0"
    assert estimate_ratio(Estimate(1.0, 0.9, 1.1), Estimate(1.0, np.nan, np.nan)).format(".1f") == "1.0"
    assert estimate_ratio(Estimate(1.0, 0.9, 1.1), Estimate(0.0, -1.0, 1.0)).format(".1f") == "–"


def test_estimate_formats_its_interval() -> None:
    assert Estimate(0.5, 0.25, 0.751).format() == "50.0% [25.0%, 75.1%]"
    assert Estimate(1.0, -0.5, 2.5).format_interval("+.1f") == "[-0.5, +2.5]"
    assert Estimate(0.5, float("nan"), float("nan")).format(".2f") == "0.50"
    assert Estimate(*[float("nan")] * 3).format() == "–"
