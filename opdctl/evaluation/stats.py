"""The statistics of an evaluation: accuracies over problems, their intervals, and two evaluations compared.

The samples of one problem are not independent, so the unit is the problem. Two intervals answer two questions: what
would other problems of the kind give (problems are resampled, each with all its samples), and what would other samples
of these very problems give (the problems stay).

Shapes: P problems, B resamples.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

CONFIDENCE_LEVEL = 0.95
MIN_PROBLEMS = 5  # problems; fewer that differ from the others cannot be resampled
RESAMPLES = 2000
PERMUTATIONS = 9999


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def format(self, spec: str = ".1%") -> str:
        """Return "value [low, high]", each number by the format `spec`; "–" if the value is NaN."""
        if math.isnan(self.value):
            return "–"
        return f"{self.value:{spec}} {self.format_interval(spec)}".rstrip()

    def format_interval(self, spec: str = ".1%") -> str:
        """Return "[low, high]", or "" without an interval."""
        return "" if math.isnan(self.low) else f"[{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Comparison:
    """The mean difference of two evaluations over the same problems, its 95 % interval, and a two-sided p-value."""

    difference: float
    ci: tuple[float, float]
    p_value: float


def problem_bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of one value in [0, 1] a problem, with the interval for other problems of this kind.

    A studentised bootstrap over problems (Efron and Tibshirani 1993, 12.5) on the scale of log-odds. Of 2,000 simulated
    evaluations of 30 to 500 problems with accuracies of 9 to 80 % it held the truth in 94.5 to 95.3 %, where plain
    percentiles held it in 89 to 95 %. Where but a few problems are not all right, or not all wrong, it is Jeffreys'
    interval: in 1,500 simulated evaluations of 30 to 256 problems, 0.4 to 10 % of them of the one kind, it held the
    truth in 93 to 98 %. A single problem says nothing of others: [0, 1].
    """
    x_P = np.asarray(values, np.float64)
    mean = float(x_P.mean())
    if len(x_P) < 2:
        return Estimate(mean, 0.0, 1.0)
    if np.ptp(x_P) == 0:
        return _all_equal(mean, len(x_P))
    if min(np.count_nonzero(x_P), np.count_nonzero(x_P - 1)) < MIN_PROBLEMS:
        low, high = stats.beta.interval(CONFIDENCE_LEVEL, x_P.sum() + 0.5, (1 - x_P).sum() + 0.5)
        return Estimate(mean, float(low), float(high))
    x_BP = x_P[np.random.default_rng(seed).integers(0, len(x_P), (RESAMPLES, len(x_P)))]
    mean_B, error_B = x_BP.mean(1), x_BP.std(1, ddof=1) / math.sqrt(len(x_P))
    spread_B = (error_B > 0) & (mean_B > 0) & (mean_B < 1)
    mean_B, error_B = mean_B[spread_B], error_B[spread_B]
    t_B = (_logit(mean_B) - _logit(mean)) * mean_B * (1 - mean_B) / error_B
    error = float(x_P.std(ddof=1)) / math.sqrt(len(x_P)) / (mean * (1 - mean))
    low, high = np.quantile(t_B, [(1 + CONFIDENCE_LEVEL) / 2, (1 - CONFIDENCE_LEVEL) / 2])
    return Estimate(mean, _share(_logit(mean) - low * error), _share(_logit(mean) - high * error))


def _all_equal(share: float, problems: int) -> Estimate:
    """Resampling equal values gives no spread, which is not to say that there is none: all right or all wrong has an
    exact interval; any other share, the same for all, is left without one."""
    if share not in (0, 1):
        return Estimate(share, share, share)
    exact = stats.binomtest(int(share * problems), problems).proportion_ci(CONFIDENCE_LEVEL)
    return Estimate(share, float(exact.low), float(exact.high))


def _logit(p: float | np.ndarray) -> float | np.ndarray:
    return np.log(p) - np.log1p(-p)


def _share(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def sampling_interval(correct: Sequence[Sequence[bool]]) -> Estimate | None:
    """Return Avg@n with the interval for other samples of these very problems; None where a problem has one sample.

    Normal, with each problem's unbiased binomial variance, and that of one sample more: where no problem's samples
    differ, the next one still may. From two samples a problem on, it held the truth in 95 % of 4,000 simulated
    evaluations.
    """
    n_P = np.array([len(samples) for samples in correct])
    x_P = np.array([np.mean(samples) for samples in correct])
    if n_P.min() < 2:
        return None
    variance = float((x_P * (1 - x_P) / (n_P - 1)).sum()) / len(n_P) ** 2 + 1 / float(n_P.sum()) ** 2
    half = float(stats.norm.ppf((1 + CONFIDENCE_LEVEL) / 2)) * math.sqrt(variance)
    mean = float(x_P.mean())
    return Estimate(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def k_values(samples: int) -> list[int]:
    """Return the k of pass@k and maj@k: 1, 2, 4 … and the number of samples itself."""
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Return the probability that any of k samples, drawn without replacement, is right (arXiv 2107.03374, eq. 1)."""
    n, right = len(correct), sum(correct)
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Return the probability that the vote of k samples, drawn without replacement, is right.

    The class with most votes wins, one of several by lot. A sample without an answer, None, has no vote; where none has
    one, the vote is wrong. All right samples are one class.
    """
    wrong = Counter(vote for vote, right in zip(votes, correct, strict=True) if vote is not None and not right)
    silent = sum(vote is None and not right for vote, right in zip(votes, correct, strict=True))
    return _majority(sum(correct), tuple(sorted(wrong.values())), silent, k)


@lru_cache(maxsize=100_000)
def _majority(right: int, wrong: tuple[int, ...], silent: int, k: int) -> float:
    """Return the share of the k-subsets in which the right class wins; a tie with t others counts 1 / (t + 1).

    For each number r of right votes, ways[d, t] counts the ways of drawing d samples from the other classes, none more
    than r times, t of them exactly r times. One class after another is added.
    """
    total = 0.0
    for r in range(1, min(right, k) + 1):
        ways = np.zeros((k - r + 1, len(wrong) + 1))
        ways[0, 0] = 1
        for size in wrong:
            added = np.zeros_like(ways)
            for drawn in range(min(size, r, k - r) + 1):
                tied = int(drawn == r)
                added[drawn:, tied:] += math.comb(size, drawn) * ways[: k - r + 1 - drawn, : ways.shape[1] - tied]
            ways = added
        others = ways @ (1 / np.arange(1, ways.shape[1] + 1))
        total += math.comb(right, r) * sum(others[d] * math.comb(silent, k - r - d) for d in range(k - r + 1))
    return float(total / math.comb(right + sum(wrong) + silent, k))


def compare(one: Sequence[float], other: Sequence[float]) -> Comparison:
    """Return `other` minus `one`, two shares a problem, paired by problem.

    The interval is Student's t of the differences, which held the truth in 94 to 96 % of 2,000 simulated pairs; the
    p-value is that of the signs of the differences, were they drawn by lot. A single problem tells nothing.
    """
    x_P = np.asarray(other, np.float64) - np.asarray(one, np.float64)
    difference = float(x_P.mean())
    if len(x_P) < 2:
        return Comparison(difference, (-1.0, 1.0), 1.0)
    if np.ptp(x_P) == 0:
        ci = (difference, difference)
    else:
        interval = stats.ttest_1samp(x_P, 0).confidence_interval(CONFIDENCE_LEVEL)
        ci = (max(float(interval.low), -1.0), min(float(interval.high), 1.0))
    return Comparison(difference, ci, _p_value(x_P))


def _p_value(x_P: np.ndarray) -> float:
    moved_P = x_P[x_P != 0]
    if not len(moved_P):
        return 1.0
    found = stats.permutation_test(
        (moved_P,), _mean, permutation_type="samples", n_resamples=PERMUTATIONS, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    return x.mean(axis=axis)
