"""Quantiles of a token weight at each position, from histograms that can be added up. No files, no model, no torch.

Shape suffixes: see Notation in CONTRIBUTING.md. H are the bins of the histogram, L the token positions.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from opdctl.analysis.position_sums import Batch
from opdctl.losses.token_weights import Floats

_ABS_LOG_EDGES = np.geomspace(1e-3, 30.0, 40)  # narrow near weight 1, where the ratios of a small alpha are
LOG_WEIGHT_EDGES = np.concatenate([-_ABS_LOG_EDGES[::-1], _ABS_LOG_EDGES])
"""The edges of the bins in ln w. Values in a bin differ by less than a third of |ln w|, or by 0.2% near weight 1."""
NUM_BINS = len(LOG_WEIGHT_EDGES) + 1


@dataclass
class PositionHistogram:
    """The number of responses by token position and by bin of a weight."""

    count_LH: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, NUM_BINS), np.int32))

    def add(self, batch: Batch, weight_N: Floats) -> None:
        """Add the weights of complete responses, at least 0."""
        with np.errstate(divide="ignore"):
            bin_N = np.searchsorted(LOG_WEIGHT_EDGES, np.log(weight_N))
        size = max(len(self.count_LH), int(batch.length_R.max(initial=0)))
        count = np.bincount(batch.position_N * NUM_BINS + bin_N, minlength=size * NUM_BINS).astype(np.int32)
        total_LH = count.reshape(size, NUM_BINS)
        total_LH[: len(self.count_LH)] += self.count_LH
        self.count_LH = total_LH

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
