"""Averages and their intervals, over problems: samples of one problem are not independent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap


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
    if np.ptp(shares) == 0:  # nothing to resample: every bootstrap mean is the mean
        return Estimate(float(shares[0]), float(shares[0]), float(shares[0]))
    rng = np.random.default_rng(seed)
    found = bootstrap((shares,), np.mean, n_resamples=2000, method="percentile", rng=rng).confidence_interval
    return Estimate(float(shares.mean()), float(found.low), float(found.high))
