"""Curves of the analysis: the mean of a quantity by position, with its interval and what it rests on.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from opdctl.analysis.bootstrap import interval_of_means
from opdctl.analysis.position_sums import BINS, PERCENT, BinnedSums
from opdctl.losses.token_weights import Floats


@dataclass(frozen=True)
class PositionCurve:
    """A quantity by bins of the position, [L] each.

    first, last: the bounds of a bin, as token positions from 1 or as percent of the response. low, high: the 95%
    interval; NaN where too few prompts are in the bin. responses: the number of responses with a token in the bin.
    """

    first_L: Floats
    last_L: Floats
    mean_L: Floats
    low_L: Floats
    high_L: Floats
    responses_L: Floats

    @property
    def middle_L(self) -> Floats:
        """The middles of the bins, at which the curve is drawn."""
        return (self.first_L + self.last_L) / 2

    def __len__(self) -> int:
        return len(self.mean_L)

    def select(self, kept_L: npt.NDArray[np.generic] | slice) -> "PositionCurve":
        """Return the bins of these numbers or of this mask."""
        return PositionCurve(*(getattr(self, each.name)[kept_L] for each in fields(self)))


def curve_by_position(sums: BinnedSums, name: str) -> PositionCurve:
    """Return the mean of a quantity by token position."""
    first_L, last_L = (bound_L.astype(np.float64) for bound_L in sums.position_bounds())
    bounds = interval_of_means(sums.values[name], sums.tokens_GL)
    return PositionCurve(first_L, last_L, sums.mean(name), *bounds, sums.responses_L)


def curve_by_relative_position(sums: BinnedSums, name: str) -> PositionCurve:
    """Return the mean of a quantity by position relative to the length, in percent."""
    edge_L = np.arange(BINS + 1, dtype=np.float64) * (PERCENT / BINS)
    bounds = interval_of_means(sums.values[name], sums.tokens_GL)
    return PositionCurve(edge_L[:-1], edge_L[1:], sums.mean(name), *bounds, sums.responses_L)


def cumulative_curve(sums: BinnedSums, name: str) -> PositionCurve:
    """Return the sum of a quantity's means at the positions up to the end of each bin.

    The mean at a position is over the responses that reach it. Responses that end therefore do not change the sum, as
    they would change the mean of the responses' own sums.
    """
    first_L, last_L = (bound_L.astype(np.float64) for bound_L in sums.position_bounds())
    width_L = last_L - first_L + 1
    sum_L = np.cumsum(sums.mean(name) * width_L)
    bounds = interval_of_means(sums.values[name], sums.tokens_GL, width_L)
    return PositionCurve(last_L, last_L, sum_L, *bounds, sums.responses_L)
