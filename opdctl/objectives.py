"""Objectives: per-token losses as sums, with the sums that their metrics need.

Shapes: N response tokens of a micro-batch, in any order. An objective never divides: `train` divides once, by the
global number of response tokens, so that the gradient does not depend on how the batch was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opdctl.registry import OBJECTIVES

if TYPE_CHECKING:  # tensors come in from the caller, so a recipe is checked without importing torch
    from torch import Tensor


class Objective(Protocol):
    """What an objective must be: see `PolicyGradient.__call__` for the arguments."""

    def __call__(
        self, *, logp_N: Tensor, old_logp_N: Tensor, rollout_logp_N: Tensor, teacher_logp_N: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@OBJECTIVES.register("policy_gradient")
@dataclass(frozen=True)
class PolicyGradient:
    """Policy gradient on the sampled tokens, the advantage being w_t A_t. Source: arXiv 2606.22600.

    A is the teacher's log-prob less that of the policy the step starts from, by the trainer's own numbers. The weights
    come from what the rollout engine stored, since they must be known before anything is batched; both name the same
    policy and differ by the engines' rounding.

    With ratio = p_student / p_old, a token's loss is that of PPO: the greater of -w A ratio and -w A clip(ratio), for
    negative advantages at most -w A dual_clip. It is multiplied by the truncated importance weight
    min(p_old / p_rollout, rollout_correction_cap) that corrects for the rollout engine's own log-probs.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    rollout_correction_cap: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low must lie between 0 and 1, got {self.clip_low}")
        if not (math.isfinite(self.clip_high) and self.clip_high > 0):
            raise ValueError(f"clip_high must be a finite number > 0, got {self.clip_high}")
        if not (math.isfinite(self.dual_clip) and self.dual_clip > 1):
            raise ValueError(f"dual_clip must be a finite number > 1, got {self.dual_clip}")
        if not (math.isfinite(self.rollout_correction_cap) and self.rollout_correction_cap > 0):
            raise ValueError(f"rollout_correction_cap must be a finite number > 0, got {self.rollout_correction_cap}")

    def __call__(
        self, *, logp_N: Tensor, old_logp_N: Tensor, rollout_logp_N: Tensor, teacher_logp_N: Tensor, weight_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the tokens' losses and the sums of their metrics, all scalars.

        logp_N: the student's log-probs, with gradient. old_logp_N: those of the policy that this batch's first update
        starts from, by the trainer; rollout_logp_N: the same policy's by the rollout engine; teacher_logp_N: the
        teacher's; weight_N: the token weights. All in nats, and all but logp_N are constants.
        """
        # Detached: the gradient of the reverse KL is the policy gradient; through A itself the teacher gives none.
        advantage_N = (teacher_logp_N - old_logp_N).detach()
        weighted_N = weight_N * advantage_N
        ratio_N = (logp_N - old_logp_N).exp()
        plain_N = -weighted_N * ratio_N
        clipped_N = -weighted_N * ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss_N = plain_N.maximum(clipped_N)
        bound_N = -weighted_N * self.dual_clip
        loss_N = loss_N.minimum(bound_N).where(weighted_N < 0, loss_N)
        # A capped exponent: exp overflows to inf before min could cut it.
        correction_N = (old_logp_N - rollout_logp_N).clamp(max=math.log(self.rollout_correction_cap)).exp().detach()
        loss_N = loss_N * correction_N
        return loss_N.sum(), {
            "k1": -advantage_N.sum(),
            "abs_advantage": advantage_N.abs().sum(),
            "weight": weight_N.sum(),
            "clip_share": (clipped_N > plain_N).float().sum(),
            "dual_clip_share": ((plain_N > bound_N) & (weighted_N < 0)).float().sum(),
            "ratio": ratio_N.detach().sum(),
            "rollout_correction": correction_N.sum(),
        }
