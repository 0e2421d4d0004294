"""Curves of the analysis: the mean of a quantity by position, with its interval and what it rests on."""

from dataclasses import dataclass, fields

import numpy as np

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

    def select(self, kept_L: np.ndarray) -> "PositionCurve":
        """Return the bins of these numbers or of this mask."""
        return PositionCurve(*(getattr(self, each.name)[kept_L] for each in fields(self)))
