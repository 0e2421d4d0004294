"""Token weights: pure functions of what is stored of one whole response. No model, no torch, float64 inside.

Shapes: T tokens of one response. The advantage is A_t = log p_teacher(y_t) - log p_student(y_t), in nats.
A weight takes the advantages of one whole response, never of a micro-batch or a packed row: `iw_opd` needs the
response's total before it can weigh the first token.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from opdctl.registry import WEIGHTS

Floats = npt.NDArray[np.float64]


class Weight(Protocol):
    """What a token weight must be: advantages in, one weight a token out."""

    def __call__(self, advantage_T: Floats) -> Floats: ...


@WEIGHTS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Every token weighs 1: standard on-policy distillation."""

    def __call__(self, advantage_T: Floats) -> Floats:
        return np.ones_like(advantage_T, dtype=np.float64)


@WEIGHTS.register("iw_opd")
@dataclass(frozen=True)
class IwOpd:
    """w_t = 1 + gamma (1 - F_{t-1}), F the share of the response's sum of |A| that earlier tokens have spent.

    Source: arXiv 2606.22600. The first token weighs 1 + gamma, later ones fall towards 1 as the prefix drifts from the
    teacher; the weights are not brought back to mean 1. A response without any discrepancy weighs 1 + gamma throughout.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma must be a finite number >= 0, got {self.gamma}")

    def __call__(self, advantage_T: Floats) -> Floats:
        discrepancy_T = np.abs(np.asarray(advantage_T, dtype=np.float64))
        spent_T = np.cumsum(discrepancy_T) - discrepancy_T
        total = discrepancy_T.sum()
        share_T = spent_T / total if total > 0 else np.zeros_like(spent_T)
        # cumsum and sum round differently, so the share can pass 1 by an ulp.
        return 1.0 + self.gamma * (1.0 - np.clip(share_T, 0.0, 1.0))
