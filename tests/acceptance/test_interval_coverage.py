"""The coverage of the intervals of an evaluation, by simulation. unit/evaluation/test_statistics.py tests them by
hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from opdctl.evaluation import statistics
from opdctl.evaluation.statistics import combine_independent, compare_paired, problem_bootstrap, sampling_interval

SIMULATIONS = 2000
COVERAGE = (0.935, 0.965)  # 95 % ± 1.5 %


@pytest.mark.parametrize(
    ("problems", "samples", "a", "b"),
    [(30, 32, 0.3, 0.5), (30, 4, 0.3, 0.5), (256, 1, 0.3, 0.5), (100, 8, 0.3, 0.5), (30, 32, 0.2, 2)],
)
def test_problem_bootstrap_covers_95_percent(problems: int, samples: int, a: float, b: float) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(SIMULATIONS):
        accuracies = rng.binomial(samples, rng.beta(a, b, problems)) / samples
        estimate = problem_bootstrap(accuracies, seed=seed)
        covered += estimate.low <= a / (a + b) <= estimate.high
    assert COVERAGE[0] <= covered / SIMULATIONS <= COVERAGE[1]


@pytest.mark.parametrize(("problems", "accuracy"), [(30, 0.05), (60, 0.9), (100, 0.05), (256, 0.01), (256, 0.98)])
def test_problem_bootstrap_covers_if_few_problems_differ(problems: int, accuracy: float) -> None:
    # a plain bootstrap covers 66 to 86 %
    num_correct = np.random.default_rng(15).binomial(problems, accuracy, SIMULATIONS)
    estimates = {k: problem_bootstrap(np.arange(problems) < k) for k in set(num_correct.tolist())}
    coverage = np.mean([estimates[k].low <= accuracy <= estimates[k].high for k in num_correct.tolist()])
    assert 0.925 <= coverage <= 0.99
    one_wrong = problem_bootstrap(np.arange(256) < 255)
    assert one_wrong.low < 0.99 < one_wrong.value < one_wrong.high < 1


@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (30, 4), (30, 2), (100, 8)])
def test_sampling_interval_covers_95_percent(problems: int, samples: int) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(SIMULATIONS):
        truth = rng.beta(0.3, 0.5, problems)
        estimate = sampling_interval(list(rng.random((problems, samples)) < truth[:, None]))
        assert estimate is not None
        covered += estimate.low <= truth.mean() <= estimate.high
    assert COVERAGE[0] <= covered / SIMULATIONS <= COVERAGE[1]


def test_interval_of_pooled_samples_does_not_cover() -> None:
    # 960 samples of 30 problems, treated as independent
    rng = np.random.default_rng(13)
    covered = 0
    for _ in range(500):
        num_correct = rng.binomial(32, rng.beta(0.3, 0.5, 30)).sum()
        interval = binomtest(int(num_correct), 960).proportion_ci(0.95)
        covered += interval.low <= 0.375 <= interval.high
    assert covered / 500 < 0.6


@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (30, 4), (100, 4)])
def test_comparison_of_equal_models_covers_0_and_rejects_5_percent(
    problems: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    rng = np.random.default_rng(17)
    covered = rejected = 0
    for _ in range(SIMULATIONS):
        truth = rng.beta(0.3, 0.5, problems)
        comparison = compare_paired(rng.binomial(samples, truth) / samples, rng.binomial(samples, truth) / samples)
        covered += comparison.ci[0] <= 0 <= comparison.ci[1]
        rejected += comparison.p_value <= 0.05
    assert COVERAGE[0] <= covered / SIMULATIONS <= COVERAGE[1]
    assert rejected / SIMULATIONS <= 0.065


def test_average_over_benchmarks_covers_95_percent() -> None:
    # three benchmarks of 30 problems, 32 samples each: a hard one, a medium one, and one with few problems in between
    rng = np.random.default_rng(19)
    benchmarks = [(0.3, 2), (1, 1), (0.5, 0.7)]
    truth = np.mean([a / (a + b) for a, b in benchmarks])
    covered = 0
    for seed in range(SIMULATIONS):
        accuracies = [rng.binomial(32, rng.beta(a, b, 30)) / 32 for a, b in benchmarks]
        average = combine_independent([problem_bootstrap(each, seed=seed) for each in accuracies], [1 / 3] * 3)
        covered += average.low <= truth <= average.high
    assert COVERAGE[0] <= covered / SIMULATIONS <= 0.97
