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
    mean_accuracy,
    mean_of_runs,
    paired_bounds,
    pass_at_k,
    problem_bounds,
    problem_interval,
    sampling_interval,
)

# ── Averages and intervals ───────────────────────────────────────────────────────────────────────────────────────────


shares = st.lists(st.integers(0, 4).map(lambda number: number / 4), min_size=2, max_size=40)


def add_successes_and_failures(mean: float, trials: float) -> tuple[float, float]:
    """Return the interval of Agresti and Coull: 1.96² / 2 successes and failures are added to the trials."""
    trials_added = trials + 3.841459
    center = (mean * trials + 1.920729) / trials_added
    half_width = 1.959964 * (center * (1 - center) / trials_added) ** 0.5
    return max(center - half_width, 0), min(center + half_width, 1)


def test_average_is_over_problems() -> None:
    # accuracies 1/4 and 1 have the mean 5/8; pooling the five samples would give 2/5
    assert problem_interval([0.25, 1.0], 4).value == pytest.approx(0.625)


def test_problem_interval_of_single_samples_counts_problems() -> None:
    # 41 of 256: (41 + 1.92) / (256 + 3.84) = 0.16518
    found = problem_interval([1.0] * 41 + [0.0] * 215, 1)
    assert (found.low, found.high) == pytest.approx((0.12003, 0.21033), abs=1e-5)
    assert (found.low, found.high) == pytest.approx(add_successes_and_failures(41 / 256, 256), abs=1e-6)


def test_problem_interval_by_hand() -> None:
    # half of 40 problems at 1/4 and half at 3/4: variance 1/16 · 40/39, t with 39 degrees of freedom 2.022691;
    # that of a binomial variable is 1/4
    found = problem_interval([0.25] * 20 + [0.75] * 20, 16)
    ratio = 1 / 16 * 40 / 39 * (2.022691 / 1.959964) ** 2 / (1 / 4)
    assert (found.low, found.high) == pytest.approx(add_successes_and_failures(0.5, 40 / ratio), abs=1e-6)


def test_equal_values_count_each_sample() -> None:
    found = problem_interval([0.5] * 40, 4)
    assert (found.low, found.high) == pytest.approx(add_successes_and_failures(0.5, 160), abs=1e-6)


@pytest.mark.parametrize(("fourth_count", "few"), [(4, 1), (12, 0.5), (20, 0)])
def test_problems_worth_few_correct_ones_count_as_single_samples(fourth_count: int, few: float) -> None:
    # shares of 1/4 are worth 1, 3 and 5 problems: between 1 and 5 the effective number of trials is interpolated
    values = [0.25] * fourth_count + [0.0] * (64 - fourth_count)
    mean = fourth_count / 256
    ratio = np.var(values, ddof=1) * (1.998341 / 1.959964) ** 2 / (mean * (1 - mean))
    found = problem_interval(values, 4)
    expected = add_successes_and_failures(mean, 64 / (few + (1 - few) * max(ratio, 1 / 4)))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)


def test_single_lucky_samples_do_not_widen_the_interval() -> None:
    # 30 problems of 32 samples, one of which stands out: 4 or 5 problems with a correct sample
    four = problem_interval([29 / 32] + [1 / 32] * 3 + [0.0] * 26, 32)
    five = problem_interval([29 / 32] + [1 / 32] * 4 + [0.0] * 25, 32)
    assert five.high == pytest.approx(four.high, abs=0.01)
    assert five.high < 0.2
    three_easy = problem_interval([29 / 32] * 3 + [1 / 32] * 12 + [0.0] * 15, 32)
    assert three_easy.high < 0.28


@given(shares)
def test_problem_interval_has_a_width_and_contains_the_mean(values: list[float]) -> None:
    found = problem_interval(values, 4)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.05


@given(shares)
def test_correct_and_incorrect_are_symmetric(values: list[float]) -> None:
    found, mirrored = problem_interval(values, 4), problem_interval([1 - value for value in values], 4)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("problems", [2, 5, 20, 30, 64, 256])
@pytest.mark.parametrize("samples", [1, 4, 32])
def test_problem_interval_rises_as_problems_become_correct(problems: int, samples: int) -> None:
    # one sample after another, the samples of each problem in turn
    num_correct = np.arange(problems * samples + 1)
    x_JP = (num_correct[:, None] - samples * np.arange(problems)).clip(0, samples) / samples
    low_J, high_J = problem_bounds(x_JP, samples)
    assert (np.diff(low_J) >= 0).all()
    assert (np.diff(high_J) >= 0).all()


def test_single_problem_has_the_widest_interval() -> None:
    assert problem_interval([0.5], 4) == Estimate(0.5, 0.0, 1.0)


def test_sampling_interval_by_hand() -> None:
    # accuracies 1/2 and 1; variance (1/4 / 15 + 0) / 2² + 1 / 32², that of a binomial variable 3/4 · 1/4 / trials
    found = sampling_interval([[True, False] * 8, [True] * 16])
    assert found is not None
    assert found.value == 0.75
    expected = add_successes_and_failures(0.75, 3 / 16 / (1 / 240 + 1 / 1024))  # 36.5 trials
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)


def test_sampling_interval_counts_at_least_the_samples() -> None:
    found = sampling_interval([[False] * 4] * 10)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(add_successes_and_failures(0, 40), abs=1e-6)


def test_one_sample_per_problem_has_no_sampling_interval() -> None:
    assert sampling_interval([[True], [False]]) is None
    assert sampling_interval([[True, True], [False]]) is None


def test_agreeing_samples_have_a_sampling_interval() -> None:
    # the variance is that of one further sample: 1/4 / (1 / 40²) trials
    found = sampling_interval([[True] * 4] * 5 + [[False] * 4] * 5)
    assert found is not None
    assert (found.low, found.high) == pytest.approx(add_successes_and_failures(0.5, 400), abs=1e-6)


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
    # differences 1/2, 1/2, 0, 1: 2² / 1.5 = 2.67 differ, but the problems are worth 1.5 correct ones and 0.5 incorrect
    # ones, so 1 and -1 are added (5 - 1.5) / 4 times; t with 3 degrees of freedom 3.182446
    n = 4 + 2 * 0.875
    half_width = 3.182446 * (((1.5 + 2 * 0.875) / n - (2 / n) ** 2) / (n - 1)) ** 0.5
    assert found.difference == pytest.approx(0.5)
    assert found.ci == pytest.approx((2 / n - half_width, 1.0), abs=1e-6)
    assert found.p_value == pytest.approx(2 / 8)  # of the 8 signings of three, two are as extreme


def test_many_differing_problems_have_students_t() -> None:
    rng = np.random.default_rng(23)
    one, other = rng.random(30), rng.random(30)
    reference = stats.ttest_rel(other, one).confidence_interval(0.95)
    assert compare_paired(one, other).ci == pytest.approx((reference.low, reference.high))


@pytest.mark.parametrize(("zeros", "ones", "n", "squares"), [(30, 0, 32, 2), (29, 1, 32, 3), (0, 30, 32, 32)])
def test_few_differences_have_one_more_of_each_sign(zeros: int, ones: int, n: int, squares: int) -> None:
    # Bonett and Price: a difference of 1 and one of -1 are added; t with 29 degrees of freedom 2.045230
    found = compare_paired([0.0] * (zeros + ones), [0.0] * zeros + [1.0] * ones)
    half_width = 2.045230 * ((squares / n - (ones / n) ** 2) / (n - 1)) ** 0.5
    assert found.ci == pytest.approx((ones / n - half_width, min(ones / n + half_width, 1)), abs=1e-6)


def test_unequal_differences_count_as_their_effective_number() -> None:
    # |x| of 1 and 12 times 1/8 on 26 problems: (2.5)² / (1 + 12/64) = 5.263 differ, with 11 times 1/8 4.820
    one = np.array([0.0, 1.0] * 13)
    sign = 1 - 2 * one
    added = []
    for number in (11, 12):
        x = sign * np.r_[1.0, np.full(number, 1 / 8), np.zeros(25 - number)]
        low, high = compare_paired(one, one + x).ci
        square = ((high - low) / 2 / 2.059539) ** 2
        added.append(square - x.var(ddof=1) / 26)
    assert added[0] > 1e-5
    assert added[1] == pytest.approx(0, abs=1e-8)


def test_equal_evaluations_and_a_single_problem_have_p_1() -> None:
    same = compare_paired([0.5, 0.0, 1.0], [0.5, 0.0, 1.0])
    assert (same.difference, same.p_value) == (0, 1)
    assert compare_paired([0.0], [1.0]) == statistics.Comparison(1.0, (-1.0, 1.0), 1.0)


@given(shares, st.data())
def test_paired_interval_has_a_width_and_contains_the_difference(one: list[float], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(one), max_size=len(one)))
    low_J, high_J = paired_bounds(np.array([one]), np.array([other]))
    assert -1 <= low_J[0] <= np.mean(other) - np.mean(one) + 1e-12
    assert np.mean(other) - np.mean(one) - 1e-12 <= high_J[0] <= 1
    assert high_J[0] - low_J[0] > 0.01


def test_equal_differences_of_many_problems_have_a_width() -> None:
    low, high = compare_paired([0.1, 0.5] * 20, [0.4, 0.8] * 20).ci
    assert low < 0.25
    assert high > 0.35


def test_single_differing_problem_has_p_1() -> None:
    found = compare_paired([1, 0, 0, 0], [1, 1, 0, 0])
    assert (found.difference, found.p_value) == (0.25, 1)


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


def test_runs_without_spread_have_no_interval() -> None:
    assert compare_runs([0.5, 0.5], [0.75, 0.75]).format(".2f") == "0.25"
    assert mean_of_runs([0.1, 0.3 - 0.2]).format(".2f") == "0.10"
    assert compare_runs([0.5, 0.5], [0.7, 0.8]).format_interval() != ""


def test_mean_of_equal_runs_has_the_interval_over_problems() -> None:
    run = Estimate(0.5, 0.4, 0.6)
    assert mean_accuracy([run]) == run
    assert mean_accuracy([run, Estimate(0.5, 0.3, 0.7)]) == run
    assert mean_accuracy([Estimate(0.4, 0, 1), run, Estimate(0.6, 0, 1)]) == mean_of_runs([0.4, 0.5, 0.6])


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
