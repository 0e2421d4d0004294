"""The statistics of evaluations: accuracies with their intervals, and comparisons of evaluations and of training runs.

The samples of one problem are not independent, so the unit is the problem. There are two intervals. That of
`problem_interval` covers the accuracy on other problems of the same kind. That of `sampling_interval` covers new
samples of the same problems. docs/eval.md has their coverage, by simulation.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from opdctl.losses.token_weights import Floats

CONFIDENCE_LEVEL = 0.95
Z = float(special.ndtri((1 + CONFIDENCE_LEVEL) / 2))
FEW = (1.0, 5.0)  # problems: up to the first number their variance is not used, from the second one on it is
PERMUTATIONS = 9999
NEGLIGIBLE = 1e-20  # a probability; the sum of all such terms of maj@k is far below its rounding error
ROUNDING = 1e-12  # accuracies that differ by less are equal


def student_t_quantile(degrees: float) -> float:
    """Return the quantile of Student's t that bounds the central interval of CONFIDENCE_LEVEL."""
    return float(special.stdtrit(degrees, (1 + CONFIDENCE_LEVEL) / 2))


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. A low bound of NaN means that there is no interval."""

    value: float
    low: float
    high: float

    def format(self, spec: str = ".1%") -> str:
        """Return "value [low, high]", each number by the format `spec`; "–" if the value is NaN."""
        if math.isnan(self.value):
            return "–"
        return f"{self.value:{spec}} {self.format_interval(spec)}".rstrip()

    def clip(self, low: float, high: float) -> "Estimate":
        """Return the estimate with an interval within these bounds."""
        return Estimate(self.value, max(self.low, low), min(self.high, high))

    def format_interval(self, spec: str = ".1%") -> str:
        """Return "[low, high]", or "" without an interval."""
        return "" if math.isnan(self.low) else f"[{self.low:{spec}}, {self.high:{spec}}]"


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of the problems' accuracies, None for one problem.

    It is that of lm-evaluation-harness and Inspect, with n - 1 in the denominator of the variance.
    """
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def estimate_ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Return the ratio of two independent estimates with symmetric intervals, and its interval (Fieller 1954).

    A ratio f is in the interval if numerator - f denominator is 0 within its own interval. There is no interval if that
    of the denominator contains 0, and no value if the denominator is 0.
    """
    b, a = numerator.value, denominator.value
    half_b, half_a = ((each.high - each.low) / 2 for each in (numerator, denominator))
    if not a:
        return Estimate(math.nan, math.nan, math.nan)
    if not a**2 > half_a**2:  # also without an interval
        return Estimate(b / a, math.nan, math.nan)
    root = math.sqrt((a * half_b) ** 2 + (b * half_a) ** 2 - (half_a * half_b) ** 2)
    low, high = ((a * b + sign * root) / (a**2 - half_a**2) for sign in (-1, 1))
    return Estimate(b / a, low, high)


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two evaluations on the same problems, its 95 % interval, and a two-sided p-value."""

    difference: float
    ci: tuple[float, float]
    p_value: float


def problem_interval(values: Sequence[float], samples: float) -> Estimate:
    """Return the mean of one value in [0, 1] per problem, with the interval for other problems of the same kind.

    samples: the mean number of samples per problem. One problem has the interval [0, 1].
    """
    x_JP = np.asarray([values], np.float64)
    low_J, high_J = problem_bounds(x_JP, samples) if len(values) > 1 else (np.zeros(1), np.ones(1))
    return Estimate(float(x_JP.mean()), float(low_J[0]), float(high_J[0]))


def problem_bounds(x_JP: Floats, samples: float) -> tuple[Floats, Floats]:
    """Return the bounds of `problem_interval`, [J], for J evaluations of at least two problems.

    Agresti and Coull's interval with the effective number of trials (Korn and Graubard 1998): that of a binomial
    variable with the variance between problems, multiplied by the squared ratio of Student's t to the normal quantile.
    It is at least the number of problems and at most that of all samples. If the problems are worth few correct ones,
    or few incorrect ones, the next one may be of a kind that none of them is; then each counts as a single trial.
    """
    problems, mean_J = x_JP.shape[-1], x_JP.mean(-1)
    t_ratio = student_t_quantile(problems - 1) / Z
    variance_J, binomial_J = x_JP.var(-1, ddof=1) * t_ratio**2, mean_J * (1 - mean_J)
    ratio_J = np.divide(variance_J, binomial_J, out=np.ones_like(mean_J), where=binomial_J > 0).clip(1 / samples, 1)
    few_J = _weight_of_few(_problems_worth(x_JP))
    return _binomial_bounds(mean_J, problems / (few_J + (1 - few_J) * ratio_J))


def _binomial_bounds(mean: Floats, trials: Floats) -> tuple[Floats, Floats]:
    """Return the interval of Agresti and Coull (1998): Z² / 2 successes and failures are added to the trials."""
    center = (mean * trials + Z**2 / 2) / (trials + Z**2)
    half_width = Z * np.sqrt(center * (1 - center) / (trials + Z**2))
    return np.maximum(center - half_width, 0), np.minimum(center + half_width, 1)


def _problems_worth(x_JP: Floats) -> Floats:
    """Return the sum of the values or of their complements, whichever is smaller: 32 values of 1/32 are worth one."""
    sum_J = x_JP.sum(-1)
    return np.minimum(sum_J, x_JP.shape[-1] - sum_J)


def _weight_of_few(count: Floats) -> Floats:
    """Return 1 up to FEW[0], 0 from FEW[1] on, and linear values in between, so that no interval jumps."""
    return ((FEW[1] - count) / (FEW[1] - FEW[0])).clip(0, 1)


def sampling_interval(correct: Sequence[Sequence[bool]]) -> Estimate | None:
    """Return Avg@n with the interval for new samples of the same problems; None if a problem has one sample only."""
    samples_P = np.array([len(samples) for samples in correct])
    if samples_P.min() < 2:
        return None
    x_JP = np.array([[np.mean(samples) for samples in correct]])
    low_J, high_J = sampling_bounds(x_JP, samples_P)
    return Estimate(float(x_JP.mean()), float(low_J[0]), float(high_J[0]))


def sampling_bounds(x_JP: Floats, samples_P: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the bounds of `sampling_interval`, [J], for J evaluations with at least two samples per problem.

    Agresti and Coull's interval with the effective number of trials: that of a binomial variable with the unbiased
    variance within problems, plus the variance of one further sample: if all samples of every problem agree, the next
    one may still differ. It is at least the number of samples.
    """
    problems, mean_J = x_JP.shape[-1], x_JP.mean(-1)
    variance_J = (x_JP * (1 - x_JP) / (samples_P - 1)).sum(-1) / problems**2 + 1 / float(samples_P.sum()) ** 2
    samples = problems**2 / float((1 / samples_P).sum())
    return _binomial_bounds(mean_J, np.maximum(mean_J * (1 - mean_J) / variance_J, samples))


def k_values(samples: int) -> list[int]:
    """Return the k of pass@k and maj@k: the powers of 2 below the number of samples, and that number."""
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Return the probability that any of k samples, without replacement, is correct (arXiv 2107.03374, eq. 1)."""
    n, num_correct = len(correct), sum(correct)
    return 1 - math.comb(n - num_correct, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Return the probability that the majority vote of k samples, without replacement, is correct.

    All correct samples are one class. The largest class wins; ties are broken at random. A sample whose vote is None
    does not vote; if no sample votes, the result is incorrect.
    """
    incorrect = Counter(vote for vote, right in zip(votes, correct, strict=True) if vote is not None and not right)
    abstentions = sum(vote is None and not right for vote, right in zip(votes, correct, strict=True))
    return _majority_probability(sum(correct), tuple(sorted(incorrect.values())), abstentions, k)


@lru_cache(maxsize=100_000)
def _majority_probability(correct: int, incorrect: tuple[int, ...], abstentions: int, k: int) -> float:
    """Return the fraction of the k-subsets in which the correct class wins; a tie with t others counts 1 / (t + 1).

    correct, incorrect: sizes of the classes, ascending. If each sample is chosen independently with the probability
    k / n, all subsets of k are equally likely; given their size, the numbers of chosen samples are those of a k-subset.
    No binomial coefficient of a large number occurs. For each number r of correct votes, ways[d, t] is the probability
    of d chosen samples in the classes that have at least r, with at most r of each and exactly r of t of them.
    """
    from scipy import stats  # its import takes a second, so only where it is needed

    n = correct + sum(incorrect) + abstentions
    total = 0.0
    probability_of_r = stats.binom.pmf(np.arange(min(correct, k) + 1), correct, k / n)
    for r in range(1, min(correct, k) + 1):
        if probability_of_r[r] < NEGLIGIBLE:
            continue
        large = [size for size in incorrect if size >= r]
        ways = np.zeros((k - r + 1, min(len(large), k // r - 1) + 1))
        ways[0, 0] = 1
        for size in large:
            p = stats.binom.pmf(np.arange(r + 1), size, k / n)
            added = np.zeros_like(ways)
            for chosen in range(min(r, k - r) + 1):
                tied = int(chosen == r)
                added[chosen:, tied:] += p[chosen] * ways[: k - r + 1 - chosen, : ways.shape[1] - tied]
            ways = added
        by_size = ways @ (1 / np.arange(1, ways.shape[1] + 1))
        others = stats.binom.pmf(np.arange(k - r, -1, -1), n - correct - sum(large), k / n)
        total += float(probability_of_r[r] * (by_size @ others))
    return min(total / float(stats.binom.pmf(k, n, k / n)), 1.0)


def compare_paired(one: Sequence[float], other: Sequence[float]) -> Comparison:
    """Return the mean of `other` minus `one`, two accuracies per problem, paired by problem.

    The p-value is that of a permutation test with random signs of the differences. A single problem has the interval
    [-1, 1] and p-value 1.
    """
    one_JP, other_JP = np.asarray([one], np.float64), np.asarray([other], np.float64)
    difference = float((other_JP - one_JP).mean())
    if len(one) < 2:
        return Comparison(difference, (-1.0, 1.0), 1.0)
    low_J, high_J = paired_bounds(one_JP, other_JP)
    return Comparison(difference, (float(low_J[0]), float(high_J[0])), _permutation_p_value((other_JP - one_JP)[0]))


def paired_bounds(one_JP: Floats, other_JP: Floats) -> tuple[Floats, Floats]:
    """Return the bounds of the differences of J pairs of evaluations, [J], on at least two problems.

    Student's t of the differences x. If few problems differ, or both evaluations are worth few correct or few incorrect
    problems, a difference of 1 and one of -1 are added (Bonett and Price 2012), as for binary outcomes; also if all
    problems differ equally. The effective number of problems that differ is (Σ|x|)² / Σx².
    """
    x_JP = other_JP - one_JP
    square_J, absolute_J = (x_JP**2).sum(-1), np.abs(x_JP).sum(-1)
    differing_J = np.divide(absolute_J**2, square_J, out=np.zeros_like(square_J), where=square_J > 0)
    worth_J = np.maximum(_problems_worth(one_JP), _problems_worth(other_JP))
    added_J = np.where(np.ptp(x_JP, -1) < ROUNDING, 1, _weight_of_few(np.minimum(differing_J, worth_J)))
    n_J = x_JP.shape[-1] + 2 * added_J
    mean_J = x_JP.sum(-1) / n_J
    variance_J = ((square_J + 2 * added_J) / n_J - mean_J**2).clip(0) / (n_J - 1)
    half_width_J = student_t_quantile(x_JP.shape[-1] - 1) * np.sqrt(variance_J)
    return np.maximum(mean_J - half_width_J, -1), np.minimum(mean_J + half_width_J, 1)


def _permutation_p_value(x_P: np.ndarray) -> float:
    changed_P = x_P[x_P != 0]
    if len(changed_P) < 2:  # both signs of a single difference are equally extreme
        return 1.0
    from scipy import stats

    test = stats.permutation_test(
        (changed_P,), _mean, permutation_type="samples", n_resamples=PERMUTATIONS, rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis=axis)


# ── Several benchmarks, several training runs ────────────────────────────────────────────────────────────────────────


def combine_independent(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted sum of independent estimates, such as those on different benchmarks.

    The interval combines the squared distances of each estimate to its bounds (Zou and Donner 2008, "MOVER"). It needs
    no standard errors, and keeps the asymmetry of intervals near 0 and 1. One estimate of weight 1 is unchanged.
    """
    value = sum(weight * each.value for weight, each in zip(weights, estimates, strict=True))
    below, above = (
        math.sqrt(sum((weight * distance) ** 2 for weight, distance in zip(weights, distances, strict=True)))
        for distances in ([e.value - e.low for e in estimates], [e.high - e.value for e in estimates])
    )
    return Estimate(value, value - below, value + above)


def mean_of_runs(values: Sequence[float]) -> Estimate:
    """Return the mean over at least two training runs, with Student's t interval. The unit is the run.

    Equal values have no interval: they are equal because accuracies are rounded, and do not show that runs are alike.
    """
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return _t_interval(float(np.mean(values)), error, len(values) - 1)


def mean_accuracy(runs: Sequence[Estimate]) -> Estimate:
    """Return the mean accuracy of training runs, with Student's t interval; that of the first if all are equal."""
    if max(run.value for run in runs) - min(run.value for run in runs) < ROUNDING:
        return runs[0]
    return mean_of_runs([run.value for run in runs]).clip(0, 1)


def compare_runs(one: Sequence[float], other: Sequence[float]) -> Estimate:
    """Return the mean of `other` minus that of `one`, each at least two unpaired runs, with Welch's interval.

    There is no interval if the values do not differ within `one` and within `other`.
    """
    variance_one, variance_other = (float(np.var(values, ddof=1)) / len(values) for values in (one, other))
    variance = variance_one + variance_other
    difference = float(np.mean(other) - np.mean(one))
    if math.sqrt(variance) < ROUNDING:
        return Estimate(difference, math.nan, math.nan)
    degrees = variance**2 / (variance_one**2 / (len(one) - 1) + variance_other**2 / (len(other) - 1))
    return _t_interval(difference, math.sqrt(variance), degrees)


def _t_interval(value: float, error: float, degrees: float) -> Estimate:
    if error < ROUNDING:
        return Estimate(value, math.nan, math.nan)
    half_width = student_t_quantile(degrees) * error
    return Estimate(value, value - half_width, value + half_width)
