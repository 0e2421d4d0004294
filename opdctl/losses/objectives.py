"""Objectives: the loss of each token, and what its metrics need. Token weights and means are the trainer's business.

An objective is a frozen dataclass that sees tokens one by one, in any order and cut in any way: the gradient must not
depend on how a batch was cut. Its losses are multiplied by the token weights and summed; the sum is divided once.

Shapes: N response tokens, S tokens of the support: the vocabulary, or the K most probable tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opdctl.losses.token_weights import Settings
from opdctl.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

Support = Literal["sampled", "full", "teacher", "student"]
MAX_LOG_RATIO = 20.0  # beyond both clips, where the loss is flat; an infinite ratio would make NaN of its gradient
MAX_TOP_K_LOG_MASS = -1e-6  # log of the most mass that a top-k may hold: rounding must not leave the rest with none


@dataclass(frozen=True)
class TokenBatch:
    """Some tokens, in nats; only what is the student's carries gradient.

    logp_N: the student's log-prob of the sampled token. old_logp_N: that of the policy that the step's first update
    starts from, by the trainer; rollout_logp_N: by the engine that drew it. target_logp_N: the teacher's, or what it is
    extrapolated to. student_logp_NS, teacher_logp_NS: of every token of the objective's support, where it has one.
    """

    logp_N: Tensor
    old_logp_N: Tensor
    rollout_logp_N: Tensor
    target_logp_N: Tensor
    student_logp_NS: Tensor | None = None
    teacher_logp_NS: Tensor | None = None

    @property
    def advantage_N(self) -> Tensor:
        """A = log p_target - log p_old, detached: through A itself the teacher gives no gradient."""
        return (self.target_logp_N - self.old_logp_N).detach()


class Objective:
    """What an objective must be.

    support: the tokens at each position whose log-probs it wants: the sampled one, the whole vocabulary, or the
    teacher's or the student's most probable ones.
    """

    support: Support = "sampled"

    @property
    def needs(self) -> Settings:
        """Settings of rollout and score that store what this objective asks for."""
        return {}

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return each token's loss and each token's share in the metrics, [N]; a metric is the mean over all tokens."""
        raise NotImplementedError


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low < value < high, or value is finite where there is no upper bound."""
    if not (math.isfinite(value) and low < value < high):
        wanted = f"a finite number > {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


# ── On the sampled token ─────────────────────────────────────────────────────────────────────────────────────────────


@OBJECTIVES.register("policy_gradient", "arXiv 2606.22600")
@dataclass(frozen=True)
class PolicyGradient(Objective):
    """Policy gradient with A as each token's advantage, clipped as in PPO: reverse KL on the sampled tokens.

    With ratio = p_student / p_old, a token's loss is the greater of -A ratio and -A clip(ratio), for negative
    advantages at most -A dual_clip. It is multiplied by the truncated importance weight
    min(p_old / p_rollout, rollout_correction_cap), which corrects for the rollout engine's own log-probs. Advantages
    are held within ± advantage_clip; 0 leaves them as they are.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    rollout_correction_cap: float = 5.0
    advantage_clip: float = 0.0

    def __post_init__(self) -> None:
        _check("clip_low", self.clip_low, 0, 1)
        _check("clip_high", self.clip_high, 0)
        _check("dual_clip", self.dual_clip, 1)
        _check("rollout_correction_cap", self.rollout_correction_cap, 0)
        if not (math.isfinite(self.advantage_clip) and self.advantage_clip >= 0):
            raise ValueError(f"advantage_clip must be a finite number >= 0, got {self.advantage_clip}")

    def advantage(self, tokens: TokenBatch) -> Tensor:
        """Return each token's advantage, [N], taken as a constant. Variants of the policy gradient differ here."""
        return tokens.advantage_N

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        advantage_N = self.advantage(tokens).detach()
        if self.advantage_clip:
            advantage_N = advantage_N.clamp(-self.advantage_clip, self.advantage_clip)
        ratio_N = (tokens.logp_N - tokens.old_logp_N).clamp(max=MAX_LOG_RATIO).exp()
        plain_N = -advantage_N * ratio_N
        clipped_N = -advantage_N * ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss_N = plain_N.maximum(clipped_N)
        bound_N = -advantage_N * self.dual_clip
        loss_N = loss_N.minimum(bound_N).where(advantage_N < 0, loss_N)
        # A capped exponent: exp overflows to inf before min could cut it.
        log_correction_N = (tokens.old_logp_N - tokens.rollout_logp_N).clamp(max=math.log(self.rollout_correction_cap))
        correction_N = log_correction_N.exp().detach()
        return loss_N * correction_N, {
            "advantage": advantage_N,
            "clip_fraction": (clipped_N > plain_N).float(),
            "dual_clip_fraction": ((plain_N > bound_N) & (advantage_N < 0)).float(),
            "ratio": ratio_N,
            "rollout_correction": correction_N,
        }


@OBJECTIVES.register("power", "PowerOPD, arXiv 2606.17199")
@dataclass(frozen=True)
class Power(PolicyGradient):
    """Policy gradient with the bounded advantage p_T^alpha - p_S^alpha."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("alpha", self.alpha, 0)

    def advantage(self, tokens: TokenBatch) -> Tensor:
        return (self.alpha * tokens.target_logp_N).exp() - (self.alpha * tokens.old_logp_N).exp()


@OBJECTIVES.register("top_d", "TOP-D, arXiv 2607.04751")
@dataclass(frozen=True)
class TopD(PolicyGradient):
    """Policy gradient with the advantage log(alpha p_T/p_S + 1 - alpha): bounded below, alpha 1 is A itself."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}")

    def advantage(self, tokens: TokenBatch) -> Tensor:
        if self.alpha == 1:
            return tokens.advantage_N
        advantage_N = tokens.advantage_N
        return _log_mix(advantage_N, advantage_N.new_zeros(()), self.alpha)


@OBJECTIVES.register("control", "OPSA, arXiv 2608.31046")
@dataclass(frozen=True)
class ConstantPenalty(PolicyGradient):
    """Policy gradient with the same negative advantage on every token: a placebo that any method should beat."""

    penalty: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("penalty", self.penalty, 0)

    def advantage(self, tokens: TokenBatch) -> Tensor:
        return tokens.advantage_N.new_full(tokens.advantage_N.shape, -self.penalty)


@OBJECTIVES.register("sampled_kl", "Schulman, Approximating KL divergence, 2020")
@dataclass(frozen=True)
class SampledKl(Objective):
    """An estimator of the reverse KL from the sampled token: k1 = -A, k2 = A²/2 or k3 = exp(A) - 1 - A.

    k1 is never differentiated itself: its gradient would not know the teacher. It takes the policy gradient, which k2
    has by itself on-policy; k3's is that of a forward KL. Beyond `cap` nats exp(A) goes on as a straight line: exp
    overflows. There is no ratio and no clip, so it is meant for one update a step.
    """

    estimator: Literal["k1", "k2", "k3"] = "k2"
    cap: float = 10.0

    def __post_init__(self) -> None:
        _check("cap", self.cap, 0, 80)

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        advantage_N = tokens.target_logp_N - tokens.logp_N
        if self.estimator == "k1":
            fixed_N = advantage_N.detach()
            loss_N = -fixed_N - fixed_N * (tokens.logp_N - tokens.logp_N.detach())
        elif self.estimator == "k2":
            loss_N = advantage_N.square() / 2
        else:
            held_N = advantage_N.clamp(max=self.cap)
            # exp(A) - 1 as expm1(A): near 0 the difference would have no digits left.
            loss_N = held_N.expm1() + held_N.exp() * (advantage_N - held_N) - advantage_N
        return loss_N, {self.estimator: loss_N}


# ── On a distribution ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Divergence(Objective):
    """A divergence of the whole next-token distributions, exact on the vocabulary, or on a top-k and one for the rest.

    support "teacher" and "student" take the `top_k` tokens most probable to the one at scoring or to the other at
    rollout; all other tokens are one, so that mass cannot leave the support unpunished. "full" takes the vocabulary,
    from the teacher's stored hidden states and its output matrix.
    """

    support: Literal["full", "teacher", "student"] = "teacher"
    top_k: int = 64

    def __post_init__(self) -> None:
        _check("top_k", self.top_k, 0)

    @property
    def needs(self) -> Settings:
        if self.support == "full":
            return {"score.hidden_states": True}
        if self.support == "teacher":
            return {"score.top_k": self.top_k}
        return {"rollout.top_k": self.top_k, "score.student_top_k": True}

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        """Return the divergence of two distributions, given by log-probs, [N], in nats."""
        raise NotImplementedError

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert tokens.student_logp_NS is not None
        assert tokens.teacher_logp_NS is not None
        student_NS, teacher_NS = tokens.student_logp_NS, tokens.teacher_logp_NS
        if self.support != "full":
            student_NS, teacher_NS = append_tail_logprob(student_NS), append_tail_logprob(teacher_NS)
        loss_N = self.divergence(student_NS, teacher_NS)
        return loss_N, {"divergence": loss_N}


@OBJECTIVES.register("forward_kl", "Hinton et al., arXiv 1503.02531")
@dataclass(frozen=True)
class ForwardKl(Divergence):
    """KL(teacher || student): covers all that the teacher might say."""

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        return _kl(teacher_NS, student_NS)


@OBJECTIVES.register("reverse_kl", "MiniLLM, arXiv 2306.08543")
@dataclass(frozen=True)
class ReverseKl(Divergence):
    """KL(student || teacher): leaves what the teacher would not say."""

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        return _kl(student_NS, teacher_NS)


@OBJECTIVES.register("jsd", "GKD, arXiv 2306.13649")
@dataclass(frozen=True)
class Jsd(Divergence):
    """beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("beta", self.beta, 0, 1)

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        mixed_NS = _log_mix(teacher_NS, student_NS, self.beta)
        return self.beta * _kl(teacher_NS, mixed_NS) + (1 - self.beta) * _kl(student_NS, mixed_NS)


def _kl(p_NS: Tensor, q_NS: Tensor) -> Tensor:
    """Return KL(p || q) of distributions given by log-probs, [N]."""
    return (p_NS.exp() * (p_NS - q_NS)).sum(-1)


def _log_mix(p: Tensor, q: Tensor, share: float) -> Tensor:
    """Return log(share exp(p) + (1 - share) exp(q)), without overflow."""
    return (p + math.log(share)).logaddexp(q + math.log1p(-share))


def append_tail_logprob(logp_NK: Tensor) -> Tensor:
    """Append the log-prob of all tokens that are not among the K: log(1 - exp(logsumexp)), [N, K + 1]."""
    import torch

    held_N = logp_NK.logsumexp(-1).clamp(max=MAX_TOP_K_LOG_MASS)
    # log(1 - e^x) is log1p(-e^x) for small e^x and log(-expm1(x)) for e^x near 1; each loses digits where the other is
    # exact.
    near_one_N = held_N > -math.log(2)
    rest_N = (-held_N.expm1()).log().where(near_one_N, (-held_N.exp()).log1p())
    return torch.cat([logp_NK, rest_N[..., None]], dim=-1)
