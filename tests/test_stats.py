"""The statistics of an evaluation: by hand, by brute force, and the coverage of the intervals by simulation."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from opdctl.evaluation import stats
from opdctl.evaluation.stats import (
    Estimate,
    compare,
    k_values,
    maj_at_k,
    pass_at_k,
    problem_bootstrap,
    sampling_interval,
)

DRAWS = 2000
COVERED = (0.935, 0.965)  # 95 % ± 1.5 %

# ── Averages and intervals ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_average_is_over_problems_not_samples() -> None:
    # shares 1/4 and 1: the mean is 5/8, where pooling the five samples would give 2/5
    assert problem_bootstrap([0.25, 1.0]).value == pytest.approx(0.625)


def test_the_interval_is_repeatable_and_holds_the_mean() -> None:
    shares = np.random.default_rng(2).beta(0.3, 0.5, 30)
    assert problem_bootstrap(shares) == problem_bootstrap(shares)
    assert problem_bootstrap(shares) != problem_bootstrap(shares, seed=1)
    found = problem_bootstrap(shares)
    assert 0 < found.low < found.value < found.high < 1


def test_right_and_wrong_are_mirror_images() -> None:
    rng = np.random.default_rng(3)
    shares = rng.beta(0.3, 0.5, 30)
    found, mirrored = problem_bootstrap(shares), problem_bootstrap(1 - shares)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))


def test_five_problems_all_right_or_all_wrong_have_the_exact_binomial_interval() -> None:
    # by Clopper and Pearson: the share at which five of five have probability 2.5 %
    bound = 0.025 ** (1 / 5)
    right, wrong = problem_bootstrap([1.0] * 5), problem_bootstrap([0.0] * 5)
    assert (right.value, right.low, right.high) == pytest.approx((1.0, bound, 1.0))
    assert (wrong.value, wrong.low, wrong.high) == pytest.approx((0.0, 0.0, 1 - bound))


def test_a_single_problem_says_nothing_of_others() -> None:
    assert problem_bootstrap([0.5]) == Estimate(0.5, 0.0, 1.0)


def test_one_right_answer_among_many_problems_has_an_interval() -> None:
    found = problem_bootstrap([1.0] + [0.0] * 255)
    assert 0 < found.low < 1 / 256 < found.high < 0.1


def test_other_samples_of_the_same_problems_by_hand() -> None:
    # shares 1/2 and 1; variance (1/4 / 3 + 0) / 2² + 1 / 8²
    found = sampling_interval([[True, False, True, False], [True] * 4])
    assert found is not None
    half = 1.959964 * (1 / 48 + 1 / 64) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75 - half, 1.0), abs=1e-6)


def test_one_sample_a_problem_says_nothing_of_other_samples() -> None:
    assert sampling_interval([[True], [False]]) is None
    assert sampling_interval([[True, True], [False]]) is None


def test_no_spread_among_the_samples_is_no_certainty() -> None:
    found = sampling_interval([[True] * 4] * 5 + [[False] * 4] * 5)
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.959964 / 40, abs=1e-6)


@pytest.mark.parametrize(
    ("problems", "samples", "a", "b"),
    [(30, 32, 0.3, 0.5), (30, 4, 0.3, 0.5), (256, 1, 0.3, 0.5), (100, 8, 0.3, 0.5), (30, 32, 0.2, 2)],
)
def test_the_interval_over_problems_holds_the_truth_in_95_percent(
    problems: int, samples: int, a: float, b: float
) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for draw in range(DRAWS):
        shares = rng.binomial(samples, rng.beta(a, b, problems)) / samples
        found = problem_bootstrap(shares, seed=draw)
        held += found.low <= a / (a + b) <= found.high
    assert COVERED[0] <= held / DRAWS <= COVERED[1]


@pytest.mark.parametrize(("problems", "share"), [(30, 0.05), (60, 0.9), (100, 0.05), (256, 0.01), (256, 0.98)])
def test_the_interval_holds_the_truth_where_few_problems_differ(problems: int, share: float) -> None:
    # resampling alone held it in 66 to 86 %: no resample has fewer of the one kind than none
    right = np.random.default_rng(15).binomial(problems, share, DRAWS)
    found = {k: problem_bootstrap(np.arange(problems) < k) for k in set(right.tolist())}
    held = np.mean([found[k].low <= share <= found[k].high for k in right.tolist()])
    assert 0.925 <= held <= 0.99
    one_wrong = problem_bootstrap(np.arange(256) < 255)
    assert one_wrong.low < 0.99 < one_wrong.value < one_wrong.high < 1


@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (30, 4), (30, 2), (100, 8)])
def test_the_interval_for_these_problems_holds_the_truth_in_95_percent(problems: int, samples: int) -> None:
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(DRAWS):
        truth = rng.beta(0.3, 0.5, problems)
        found = sampling_interval(list(rng.random((problems, samples)) < truth[:, None]))
        assert found is not None
        held += found.low <= truth.mean() <= found.high
    assert COVERED[0] <= held / DRAWS <= COVERED[1]


def test_pooled_samples_would_not_hold_it() -> None:
    # the trap: 960 samples of 30 problems taken for independent
    rng = np.random.default_rng(13)
    held = 0
    for _ in range(500):
        right = rng.binomial(32, rng.beta(0.3, 0.5, 30)).sum()
        found = binomtest(int(right), 960).proportion_ci(0.95)
        held += found.low <= 0.375 <= found.high
    assert held / 500 < 0.6


# ── pass@k and maj@k ─────────────────────────────────────────────────────────────────────────────────────────────────

samples = st.lists(st.sampled_from(["right", "a", "b", "c", None]), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("n", "ks"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_k_doubles_up_to_the_number_of_samples(n: int, ks: list[int]) -> None:
    assert k_values(n) == ks


def test_pass_at_k_by_hand() -> None:
    # of the 6 pairs of 4 samples, 3 hold the one right one
    assert pass_at_k([True, False, False, False], 2) == pytest.approx(0.5)
    assert pass_at_k([False] * 4, 4) == 0
    assert pass_at_k([True, True, True, False], 2) == 1


@given(samples, st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(drawn: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(drawn)))
    correct = [each == "right" for each in drawn]
    subsets = [any(subset) for subset in combinations(correct, k)]
    assert pass_at_k(correct, k) == pytest.approx(np.mean(subsets))


def vote(subset: tuple[str | None, ...]) -> float:
    """Return the probability that the vote of these samples is right."""
    counts = {name: subset.count(name) for name in {*subset} - {None}}
    winners = [name for name, count in counts.items() if count == max(counts.values())]
    return ("right" in winners) / len(winners) if winners else 0.0


@given(samples, st.data())
def test_maj_at_k_is_the_mean_of_every_subset_s_vote(drawn: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(drawn)))
    correct = [each == "right" for each in drawn]
    assert maj_at_k(drawn, correct, k) == pytest.approx(np.mean([vote(subset) for subset in combinations(drawn, k)]))


@given(samples)
def test_one_sample_passes_votes_and_averages_alike(drawn: list[str | None]) -> None:
    correct = [each == "right" for each in drawn]
    assert pass_at_k(correct, 1) == pytest.approx(np.mean(correct))
    assert maj_at_k(drawn, correct, 1) == pytest.approx(np.mean(correct))


@given(samples)
def test_more_samples_pass_more_often(drawn: list[str | None]) -> None:
    correct = [each == "right" for each in drawn]
    passed = [pass_at_k(correct, k) for k in range(1, len(drawn) + 1)]
    assert passed == sorted(passed)


def test_the_vote_of_many_samples_is_quick_and_exact_at_the_end() -> None:
    drawn = ["right"] * 10 + ["a"] * 9 + [f"wrong {i}" for i in range(12)] + [None]
    correct = [each == "right" for each in drawn]
    assert maj_at_k(drawn, correct, 32) == 1  # 10 against 9
    assert 0.5 < maj_at_k(drawn, correct, 16) < 1


def test_right_answers_in_several_spellings_are_one_class() -> None:
    assert maj_at_k(["0.5", "1/2", "7", "7", "8"], [True, True, False, False, False], 5) == pytest.approx(0.5)


# ── Two evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_comparison_by_hand() -> None:
    found = compare([0.5, 0.0, 1.0, 0.0], [1.0, 0.5, 1.0, 1.0])
    # differences 1/2, 1/2, 0, 1; their standard error is 0.204124, t with 3 degrees of freedom 3.182446
    assert found.difference == pytest.approx(0.5)
    assert found.ci == pytest.approx((0.5 - 0.204124 * 3.182446, 1.0), abs=1e-5)
    assert found.p_value == pytest.approx(2 / 8)  # of the 8 signings of three, two are as extreme


def test_nothing_changed_is_no_evidence_and_one_problem_is_none() -> None:
    same = compare([0.5, 0.0, 1.0], [0.5, 0.0, 1.0])
    assert (same.difference, same.ci, same.p_value) == (0, (0, 0), 1)
    assert compare([0.0], [1.0]) == stats.Comparison(1.0, (-1.0, 1.0), 1.0)


def test_swapping_the_two_turns_the_sign() -> None:
    rng = np.random.default_rng(5)
    one, other = rng.random(30), rng.random(30)
    found, turned = compare(one, other), compare(other, one)
    assert turned.difference == pytest.approx(-found.difference)
    assert turned.ci == pytest.approx((-found.ci[1], -found.ci[0]))
    assert turned.p_value == pytest.approx(found.p_value, abs=0.02)


@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (30, 4), (100, 4)])
def test_of_two_equal_models_5_percent_are_told_apart_and_95_percent_of_the_intervals_hold_0(
    problems: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "PERMUTATIONS", 199)
    rng = np.random.default_rng(17)
    held = rejected = 0
    for _ in range(DRAWS):
        truth = rng.beta(0.3, 0.5, problems)
        found = compare(rng.binomial(samples, truth) / samples, rng.binomial(samples, truth) / samples)
        held += found.ci[0] <= 0 <= found.ci[1]
        rejected += found.p_value <= 0.05
    assert COVERED[0] <= held / DRAWS <= COVERED[1]
    assert rejected / DRAWS <= 0.065
