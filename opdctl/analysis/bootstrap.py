"""Intervals by resampling groups of prompts, from sums by group. No files, no model, no torch.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy import stats

from opdctl.analysis.position_sums import Ints
from opdctl.evaluation.statistics import CONFIDENCE_LEVEL
from opdctl.losses.token_weights import Floats

GROUP_RESAMPLES = 2000
"""Bootstrap samples of the groups, and random signs of the test of a change point."""
CURVE_RESAMPLES = 1000
"""Bootstrap samples for the intervals of means."""
MIN_INTERVAL_PROMPTS = 10
"""A mean over fewer prompts has no interval."""


@lru_cache(maxsize=8)
def _resample_counts(groups: int, resamples: int) -> Floats:
    """Return how often each group is in each bootstrap sample, [J, G]."""
    counts_JG = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), resamples)
    return counts_JG.astype(np.float64)


def resample_groups(sums_GX: Floats, resamples: int = GROUP_RESAMPLES) -> Floats:
    """Return the totals of bootstrap samples of the groups, [J, X]."""
    return _resample_counts(len(sums_GX), resamples) @ sums_GX


def interval_of_means(
    value_GL: Floats, tokens_GL: Floats, cumulated_width_L: Floats | None = None
) -> tuple[Floats, Floats]:
    """Return the bounds, [L] each, of the 95% intervals of Σ value / Σ tokens over the groups in each bin.

    The percentiles of the bootstrap samples lie within the range of the groups' means. For few groups they are those of
    a wider level, as Student's t is wider than the normal distribution (Hesterberg 2015, "expanded percentiles"). NaN
    with fewer than MIN_INTERVAL_PROMPTS groups in the bin.

    cumulated_width_L: the bounds are those of the means times these widths, summed over the bins up to each one.
    """
    used_G = tokens_GL.any(1)
    value_GL, tokens_GL = value_GL[used_G], tokens_GL[used_G]

    def resample(kept_L: Ints) -> Floats:
        mean_JL = _resample_means(value_GL[:, kept_L], tokens_GL[:, kept_L])
        if cumulated_width_L is None:
            return mean_JL
        return np.cumsum(mean_JL * cumulated_width_L[kept_L], axis=1)

    return _bound(np.count_nonzero(tokens_GL, axis=0), resample)


def interval_of_difference(
    value_GL: Floats, tokens_GL: Floats, other_value_GL: Floats, other_tokens_GL: Floats
) -> tuple[Floats, Floats]:
    """Return the bounds, [L] each, of the 95% intervals of the other Σ value / Σ tokens minus the first.

    A bootstrap sample has the same groups of both, so their common differences between prompts cancel. NaN with fewer
    than MIN_INTERVAL_PROMPTS groups in the bin of either.
    """
    used_G = tokens_GL.any(1) | other_tokens_GL.any(1)
    pairs = [(v_GL[used_G], t_GL[used_G]) for v_GL, t_GL in ((value_GL, tokens_GL), (other_value_GL, other_tokens_GL))]
    groups_L = np.min([np.count_nonzero(t_GL, axis=0) for _, t_GL in pairs], axis=0)

    def resample(kept_L: Ints) -> Floats:
        first_JL, other_JL = (_resample_means(v_GL[:, kept_L], t_GL[:, kept_L]) for v_GL, t_GL in pairs)
        return other_JL - first_JL

    return _bound(groups_L, resample)


def _bound(groups_L: Ints, resample: Callable[[Ints], Floats]) -> tuple[Floats, Floats]:
    """Return the bounds of bins with enough groups, NaN of others. resample: the samples of these bins, [J, L]."""
    low_L, high_L = np.full((2, len(groups_L)), np.nan)
    (kept_L,) = np.nonzero(groups_L >= MIN_INTERVAL_PROMPTS)
    if len(kept_L):
        low_L[kept_L], high_L[kept_L] = expanded_percentiles(resample(kept_L), groups_L[kept_L])
    return low_L, high_L


def _resample_means(value_GL: Floats, tokens_GL: Floats) -> Floats:
    """Return the means of bootstrap samples, [J, L]; that of all groups where a sample has no token."""
    value_JL, tokens_JL = (resample_groups(sums_GL, CURVE_RESAMPLES) for sums_GL in (value_GL, tokens_GL))
    all_JL = np.tile(value_GL.sum(0) / tokens_GL.sum(0), (len(value_JL), 1))
    return np.divide(value_JL, tokens_JL, out=all_JL, where=tokens_JL > 0)


def expanded_percentiles(value_JL: Floats, groups_L: Ints) -> tuple[Floats, Floats]:
    """Return the bounds, [L] each, of 95% intervals from bootstrap samples of `groups_L` groups."""
    t_L = stats.t.ppf((1 - CONFIDENCE_LEVEL) / 2, groups_L - 1) * np.sqrt(groups_L / (groups_L - 1))
    sorted_JL, rank_L = np.sort(value_JL, axis=0), stats.norm.cdf(t_L) * (len(value_JL) - 1)
    columns, below_L = np.arange(len(rank_L)), rank_L.astype(np.int64)
    part_L = rank_L - below_L
    low_L = (1 - part_L) * sorted_JL[below_L, columns] + part_L * sorted_JL[below_L + 1, columns]
    high_L = (1 - part_L) * sorted_JL[-1 - below_L, columns] + part_L * sorted_JL[-2 - below_L, columns]
    return low_L, high_L
