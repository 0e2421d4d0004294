"""The coverage of the intervals of an evaluation, by simulation: on problems that are alike, that differ, and of which
few stand out. unit/evaluation/test_statistics.py tests the intervals by hand; bench/interval_coverage.py prints the
table of docs/eval.md.

Shape suffixes: see Notation in CONTRIBUTING.md. J: simulated evaluations. A: accuracies.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from opdctl.evaluation import statistics
from opdctl.evaluation.statistics import (
    combine_independent,
    compare_paired,
    paired_bounds,
    problem_bounds,
    problem_interval,
    sampling_bounds,
)

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]

SIMULATIONS = 4000
COVERAGE = (0.93, 0.97)
NEAR_0_OR_1 = 8  # problems: with fewer correct or incorrect ones expected, an interval may cover more often
PROBLEMS = (20, 30, 64, 256, 500)
SAMPLES = (1, 4, 32)
SAMPLES_OF_SAME_PROBLEMS = (2, 4, 32)


def two_kinds(fraction: float, accuracy: float, other: float) -> Draw:
    return lambda rng, shape: np.where(rng.random(shape) < fraction, accuracy, other)


PROBLEM_SETS: dict[str, tuple[Draw, float]] = {
    "beta(.05, .5)": (lambda rng, shape: rng.beta(0.05, 0.5, shape), 0.05 / 0.55),
    "one in 10 at .9, others at .01": (two_kinds(0.1, 0.9, 0.01), 0.099),
    "one in 20 at .9, others at .03": (two_kinds(0.05, 0.9, 0.03), 0.0735),
    "uniform": (lambda rng, shape: rng.random(shape), 0.5),
    "all at .02": (two_kinds(1, 0.02, 0), 0.02),
    "all at .1": (two_kinds(1, 0.1, 0), 0.1),
    "all at .5": (two_kinds(1, 0.5, 0), 0.5),
}
"""How the true accuracies of problems are drawn, and their mean."""


def cover(bounds: tuple[Floats, Floats], truth: Floats | float) -> float:
    return float(np.mean((bounds[0] - 1e-12 <= truth) & (truth <= bounds[1] + 1e-12)))


def problem_coverage(name: str, problems: int, samples: int) -> float:
    draw, truth = PROBLEM_SETS[name]
    rng = np.random.default_rng([problems, samples])
    x_JP = rng.binomial(samples, draw(rng, (SIMULATIONS, problems))) / samples
    return cover(problem_bounds(x_JP, samples), truth)


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_problem_interval_covers_95_percent(name: str) -> None:
    truth = PROBLEM_SETS[name][1]
    for problems, samples in product(PROBLEMS, SAMPLES):
        coverage = problem_coverage(name, problems, samples)
        assert coverage >= COVERAGE[0], (problems, samples)
        assert coverage <= COVERAGE[1] or problems * min(truth, 1 - truth) < NEAR_0_OR_1, (problems, samples)


@pytest.mark.parametrize("problems", PROBLEMS)
def test_problem_interval_of_single_samples_covers_any_accuracy(problems: int) -> None:
    # exact, not simulated: for each accuracy the sum of the probabilities of the numbers of correct problems
    num_correct_J = np.arange(problems + 1)
    accuracy_A = np.linspace(0.005, 0.995, 991)
    low_J, high_J = problem_bounds(1.0 * (np.arange(problems) < num_correct_J[:, None]), 1)
    probability_JA = stats.binom.pmf(num_correct_J[:, None], problems, accuracy_A)
    is_covered_JA = (low_J[:, None] <= accuracy_A) & (accuracy_A <= high_J[:, None])
    coverage_A = (probability_JA * is_covered_JA).sum(0)
    assert coverage_A.min() >= 0.925  # Jeffreys' interval: 0.88 to 0.91
    assert 0.95 <= coverage_A.mean() <= 0.965
    assert coverage_A[(accuracy_A < 0.4 / problems) | (accuracy_A > 1 - 0.4 / problems)].min(initial=1) >= 0.95


def sampling_coverage(name: str, problems: int, samples: int) -> float:
    rng = np.random.default_rng([problems, samples])
    truth_JP = PROBLEM_SETS[name][0](rng, (SIMULATIONS, problems))
    x_JP = rng.binomial(samples, truth_JP) / samples
    return cover(sampling_bounds(x_JP, np.full(problems, samples)), truth_JP.mean(-1))


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_sampling_interval_covers_95_percent(name: str) -> None:
    for problems, samples in product(PROBLEMS, SAMPLES_OF_SAME_PROBLEMS):
        coverage = sampling_coverage(name, problems, samples)
        assert coverage >= COVERAGE[0], (problems, samples)
        # of the problems at .01, 2 or 4 samples show no variance
        assert coverage <= COVERAGE[1] or samples < 32 or "all at .02" in name, (problems, samples)


def test_sampling_interval_covers_rare_correct_samples() -> None:
    # a normal interval covers 86 to 91 %
    rng = np.random.default_rng(11)
    for problems, samples in ((500, 2), (500, 4), (256, 4), (64, 32)):
        x_JP = rng.binomial(samples, 0.002, (SIMULATIONS, problems)) / samples
        assert 0.95 <= cover(sampling_bounds(x_JP, np.full(problems, samples)), 0.002) <= 0.99


def test_interval_of_pooled_samples_does_not_cover() -> None:
    # 960 samples of 30 problems, treated as independent
    rng = np.random.default_rng(13)
    num_correct_J = rng.binomial(32, rng.beta(0.3, 0.5, (500, 30))).sum(1)
    intervals = [stats.binomtest(int(number), 960).proportion_ci(0.95) for number in num_correct_J]
    assert np.mean([each.low <= 0.375 <= each.high for each in intervals]) < 0.6


# ── Two evaluations ──────────────────────────────────────────────────────────────────────────────────────────────────


def equally_good(draw: Draw) -> Draw:
    return lambda rng, shape: np.stack([draw(rng, shape)] * 2)


def of_which_some_improve(fraction: float, before: float, after: float) -> Draw:
    return lambda rng, shape: np.stack([np.full(shape, before), two_kinds(fraction, after, before)(rng, shape)])


def draw_squares_and_roots(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    root_JP = rng.beta(0.5, 0.5, shape)
    return np.stack([root_JP**2, root_JP])


def draw_changed_answers(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    is_right_JP, is_changed_JP = rng.random(shape) < 0.4, rng.random(shape) < 0.1
    return np.stack([is_right_JP, is_right_JP ^ is_changed_JP]).astype(np.float64)


PAIRS: dict[str, tuple[Draw, float]] = {
    "equally good, beta(.3, .5)": (equally_good(lambda rng, shape: rng.beta(0.3, 0.5, shape)), 0.0),
    "equally good, beta(.05, .5)": (equally_good(PROBLEM_SETS["beta(.05, .5)"][0]), 0.0),
    "better on most": (draw_squares_and_roots, 0.5 - 0.375),
    "one in 20 from .03 to .9": (of_which_some_improve(0.05, 0.03, 0.9), 0.0435),
    "one in 10 from .01 to .9": (of_which_some_improve(0.1, 0.01, 0.9), 0.089),
    "one in 10 right to wrong or back": (draw_changed_answers, 0.1 * 0.2),
}
"""How two true accuracies of problems are drawn, and their mean difference."""


def paired_coverage(name: str, problems: int, samples: int) -> float:
    draw, truth = PAIRS[name]
    rng = np.random.default_rng([problems, samples])
    one_JP, other_JP = rng.binomial(samples, draw(rng, (SIMULATIONS, problems))) / samples
    return cover(paired_bounds(one_JP, other_JP), truth)


@pytest.mark.parametrize("name", PAIRS)
def test_paired_interval_covers_95_percent(name: str) -> None:
    for problems, samples in product(PROBLEMS, SAMPLES):
        coverage = paired_coverage(name, problems, samples)
        assert coverage >= COVERAGE[0], (problems, samples)
        assert coverage <= COVERAGE[1] or problems <= 64, (problems, samples)
        if name in ("equally good, beta(.3, .5)", "better on most") and problems > 20:
            assert coverage <= COVERAGE[1], (problems, samples)


@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (30, 4), (100, 4)])
def test_comparison_of_equal_models_rejects_5_percent(
    problems: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    rng = np.random.default_rng(17)
    rejected = 0
    for _ in range(2000):
        truth = rng.beta(0.3, 0.5, problems)
        comparison = compare_paired(rng.binomial(samples, truth) / samples, rng.binomial(samples, truth) / samples)
        rejected += comparison.p_value <= 0.05
    assert rejected / 2000 <= 0.065


def test_average_over_benchmarks_covers_95_percent() -> None:
    # three benchmarks of 30 problems, 32 samples each: a hard one, a medium one, and one with few problems in between
    rng = np.random.default_rng(19)
    benchmarks = [(0.3, 2), (1, 1), (0.5, 0.7)]
    truth = np.mean([a / (a + b) for a, b in benchmarks])
    covered = 0
    for _ in range(2000):
        accuracies = [rng.binomial(32, rng.beta(a, b, 30)) / 32 for a, b in benchmarks]
        average = combine_independent([problem_interval(each, 32) for each in accuracies], [1 / 3] * 3)
        covered += average.low <= truth <= average.high
    assert COVERAGE[0] <= covered / 2000 <= COVERAGE[1]
