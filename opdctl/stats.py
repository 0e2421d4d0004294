"""Averages and their intervals, over problems: samples of one problem are not independent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, all shares in [0, 1]."""

    mean: float
    low: float
    high: float


def average(correct: Sequence[Sequence[bool]], seed: int = 0) -> Estimate:
    """Return Avg@n: the mean over problems of the share of right samples, with a percentile bootstrap over problems.

    correct: one sequence a problem. The interval answers "what of other problems of this kind"; with a single problem
    there is none, and it is the whole of [0, 1].
    """
    shares = np.array([np.mean(samples) for samples in correct])
    if len(shares) < 2:
        return Estimate(float(shares.mean()), 0.0, 1.0)
    if np.ptp(shares) == 0:
        # Resampling equal shares gives no spread, which is not to say that there is none: all right or all wrong has an
        # exact interval; any other share, the same for all, is left without one.
        share = float(shares[0])
        if share not in (0, 1):
            return Estimate(share, share, share)
        exact = binomtest(int(share * len(shares)), len(shares)).proportion_ci(0.95)
        return Estimate(share, float(exact.low), float(exact.high))
    rng = np.random.default_rng(seed)
    found = bootstrap((shares,), np.mean, n_resamples=2000, method="percentile", rng=rng).confidence_interval
    return Estimate(float(shares.mean()), float(found.low), float(found.high))
