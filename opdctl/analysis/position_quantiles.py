"""Quantiles of a token weight by position, from histograms that can be added up. No files, no model, no torch.

Shape suffixes: see Notation in CONTRIBUTING.md. H are the bins of the histogram, L those of the position.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from opdctl.analysis.position_sums import Batch, Ints, LengthCohort, position_bins
from opdctl.losses.token_weights import Floats

_ABS_LOG_EDGES = np.geomspace(1e-3, 30.0, 40)  # narrow near weight 1, where the ratios of a small alpha are
LOG_WEIGHT_EDGES = np.concatenate([-_ABS_LOG_EDGES[::-1], _ABS_LOG_EDGES])
"""The edges of the bins in ln w. Values in a bin differ by less than a third of |ln w|, or by 0.2% near weight 1."""
NUM_BINS = len(LOG_WEIGHT_EDGES) + 1


@dataclass
class WeightHistogram:
    """The tokens by position and by bin of their weight, and the sums of w and w² by position."""

    count_LH: Ints
    moments_L2: Floats

    def quantile(self, fraction: float) -> Floats:
        """Return a quantile of the weights at each position, [L], by linear interpolation of ln w within a bin.

        fraction: in (0, 1). Weights below exp(-30) count as 0.
        """
        cumulative_LH = np.cumsum(self.count_LH, axis=1)
        rank_L = fraction * cumulative_LH[:, -1]
        bin_L = (cumulative_LH < rank_L[:, None]).sum(1)
        row = np.arange(len(bin_L))
        count_L = self.count_LH[row, bin_L]
        part_L = 1 - (cumulative_LH[row, bin_L] - rank_L) / np.maximum(count_L, 1)
        inner_L = np.clip(bin_L, 1, NUM_BINS - 2)
        low_L, high_L = LOG_WEIGHT_EDGES[inner_L - 1], LOG_WEIGHT_EDGES[inner_L]
        return np.where(bin_L > 0, np.exp(low_L + part_L * (high_L - low_L)), 0.0)

    def effective_sample_size(self) -> Floats:
        """Return (Σ w)² / (n Σ w²) over the n tokens at each position, [L]."""
        tokens_L, (total_L, square_L) = self.count_LH.sum(1), self.moments_L2.T
        return np.divide(total_L**2, tokens_L * square_L, out=np.zeros(len(total_L)), where=square_L > 0)


@dataclass
class CohortHistograms:
    """The histogram of a weight in each cohort of responses."""

    by_cohort: dict[LengthCohort, WeightHistogram] = field(default_factory=dict)

    def add(self, batch: Batch, weight_N: Floats) -> None:
        """Add the weights of complete responses, at least 0."""
        bin_N = position_bins(batch.position_N + 1)
        with np.errstate(divide="ignore"):
            weight_bin_N = np.searchsorted(LOG_WEIGHT_EDGES, np.log(weight_N))
        cohorts = batch.cohorts()
        for cohort in {cohort for cohort in cohorts if cohort}:
            is_own_N = np.array([each == cohort for each in cohorts])[batch.response_N]
            self._add(cohort, bin_N[is_own_N], weight_bin_N[is_own_N], weight_N[is_own_N])

    def _add(self, cohort: LengthCohort, bin_N: Ints, weight_bin_N: npt.NDArray[np.intp], weight_N: Floats) -> None:
        size = int(bin_N.max()) + 1
        count = np.bincount(bin_N * NUM_BINS + weight_bin_N, minlength=size * NUM_BINS)
        moments = [np.bincount(bin_N, moment_N, minlength=size) for moment_N in (weight_N, weight_N**2)]
        new = WeightHistogram(count.reshape(size, NUM_BINS), np.stack(moments, axis=1))
        self.by_cohort[cohort] = merge_histograms([self.by_cohort[cohort], new] if cohort in self.by_cohort else [new])

    def select(self, cohorts: Collection[LengthCohort]) -> WeightHistogram:
        """Return the histogram over some cohorts."""
        return merge_histograms([self.by_cohort[cohort] for cohort in cohorts])


def merge_histograms(histograms: Collection[WeightHistogram]) -> WeightHistogram:
    """Return the histogram of all weights."""
    size = max((len(each.count_LH) for each in histograms), default=0)
    total = WeightHistogram(np.zeros((size, NUM_BINS), np.int64), np.zeros((size, 2)))
    for each in histograms:
        total.count_LH[: len(each.count_LH)] += each.count_LH
        total.moments_L2[: len(each.moments_L2)] += each.moments_L2
    return total
