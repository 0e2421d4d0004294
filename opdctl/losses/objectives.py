"""Objectives: the loss and the metrics of each token. The trainer applies token weights and averages.

An objective is a frozen dataclass that treats every token independently of the others: the gradient must not depend on
the micro-batches. The trainer multiplies the losses by the token weights, sums them over the step and divides once.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opdctl.losses.checks import check_range
from opdctl.losses.token_weights import MIN_TAIL_PROB, Settings
from opdctl.registry import OBJECTIVES

if TYPE_CHECKING:
    from torch import Tensor

Support = Literal["sampled", "full", "teacher", "student"]
MAX_LOG_RATIO = 20.0
"""Bound of log(p_student / p_old), in nats. It is beyond both clips, so the loss is constant there; an infinite ratio
would make the gradient NaN."""
MAX_TOP_K_LOG_MASS = -MIN_TAIL_PROB
"""Bound of the log of the probability mass in a top-k, in nats: log(1 - x) is -x for a small x."""


@dataclass(frozen=True)
class TokenBatch:
    """Log-probs of some tokens, in nats. Only those of the student carry gradient.

    logp_N: of the sampled token, under the student. old_logp_N: under the policy before the first update of the step,
    computed by the trainer. rollout_logp_N: under the distribution that the rollout's engine sampled, computed by it:
    the student's own, unless temperature, top-p or other settings of the rollout change it. target_logp_N: under the
    teacher, or its extrapolation. student_logp_NS, teacher_logp_NS: of every token of the support; None for the support
    "sampled". student_tail_logp_N: of all tokens outside a top-k; None for other supports.
    """

    logp_N: Tensor
    old_logp_N: Tensor
    rollout_logp_N: Tensor
    target_logp_N: Tensor
    student_logp_NS: Tensor | None = None
    teacher_logp_NS: Tensor | None = None
    student_tail_logp_N: Tensor | None = None

    @property
    def advantage_N(self) -> Tensor:
        """A = log p_target - log p_old, detached."""
        return (self.target_logp_N - self.old_logp_N).detach()


class Objective:
    """The base class of objectives.

    support: the tokens at each position whose log-probs the objective reads: the sampled token, the full vocabulary, or
    the top-k of the teacher or the student.
    """

    support: Support = "sampled"

    @property
    def needs(self) -> Settings:
        """The recipe settings that store what this objective reads, with the values that it requires."""
        return {}

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss and the metrics of each token, [N] each. The trainer logs the mean of a metric."""
        raise NotImplementedError


# ── On the sampled token ─────────────────────────────────────────────────────────────────────────────────────────────


@OBJECTIVES.register("policy_gradient", "arXiv 2606.22600")
@dataclass(frozen=True)
class PolicyGradient(Objective):
    """Policy gradient with the advantage A of each token, clipped as in PPO: reverse KL on the sampled tokens.

    With ratio = p_student / p_old, the loss is max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)); for a
    negative A it is at most -A dual_clip. The loss is multiplied by the truncated importance weight
    min(p_old / p_rollout, rollout_correction_cap). p_rollout is the probability under the distribution that the
    rollout's engine sampled; it differs from p_old by rounding, staleness, or settings such as the temperature.
    Advantages are clipped to ± advantage_clip; 0 disables this.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    rollout_correction_cap: float = 5.0
    advantage_clip: float = 0.0

    def __post_init__(self) -> None:
        check_range("clip_low", self.clip_low, gt=0, lt=1)
        check_range("clip_high", self.clip_high, gt=0)
        check_range("dual_clip", self.dual_clip, gt=1)
        check_range("rollout_correction_cap", self.rollout_correction_cap, gt=0)
        check_range("advantage_clip", self.advantage_clip, ge=0)

    def advantage(self, tokens: TokenBatch) -> Tensor:
        """Return the advantage of each token, [N]; no gradient flows through it. Subclasses override this method."""
        return tokens.advantage_N

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        advantage_N = self.advantage(tokens).detach()
        if self.advantage_clip:
            advantage_N = advantage_N.clamp(-self.advantage_clip, self.advantage_clip)
        ratio_N = (tokens.logp_N - tokens.old_logp_N).clamp(max=MAX_LOG_RATIO).exp()
        unclipped_N = -advantage_N * ratio_N
        clipped_N = -advantage_N * ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss_N = unclipped_N.maximum(clipped_N)
        bound_N = -advantage_N * self.dual_clip
        loss_N = loss_N.minimum(bound_N).where(advantage_N < 0, loss_N)
        # Clamp the exponent: exp could overflow before a clamp of its result.
        log_correction_N = (tokens.old_logp_N - tokens.rollout_logp_N).clamp(max=math.log(self.rollout_correction_cap))
        correction_N = log_correction_N.exp().detach()
        return loss_N * correction_N, {
            "advantage": advantage_N,
            "clip_fraction": (clipped_N > unclipped_N).float(),
            "dual_clip_fraction": ((unclipped_N > bound_N) & (advantage_N < 0)).float(),
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
        check_range("alpha", self.alpha, gt=0)

    def advantage(self, tokens: TokenBatch) -> Tensor:
        return (self.alpha * tokens.target_logp_N).exp() - (self.alpha * tokens.old_logp_N).exp()


@OBJECTIVES.register("top_d", "TOP-D, arXiv 2607.04751")
@dataclass(frozen=True)
class TopD(PolicyGradient):
    """Policy gradient with the advantage log(alpha p_T/p_S + 1 - alpha), bounded below; alpha 1 gives A."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, gt=0, le=1)

    def advantage(self, tokens: TokenBatch) -> Tensor:
        if self.alpha == 1:
            return tokens.advantage_N
        advantage_N = tokens.advantage_N
        return _log_mix(advantage_N, advantage_N.new_zeros(()), self.alpha)


@OBJECTIVES.register("constant_penalty", "OPSA, arXiv 2608.31046")
@dataclass(frozen=True)
class ConstantPenalty(PolicyGradient):
    """Policy gradient with the constant advantage -penalty for every token: a placebo, the baseline of every method."""

    penalty: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("penalty", self.penalty, gt=0)

    def advantage(self, tokens: TokenBatch) -> Tensor:
        return tokens.advantage_N.new_full(tokens.advantage_N.shape, -self.penalty)


@OBJECTIVES.register("sampled_kl", "Schulman, Approximating KL divergence, 2020")
@dataclass(frozen=True)
class SampledKl(Objective):
    """An estimator of the reverse KL from the sampled token: k1 = -A, k2 = A²/2 or k3 = exp(A) - 1 - A.

    k1 is not differentiated directly, since its gradient does not depend on the teacher. It has the value k1 and the
    gradient of the policy gradient, which is also the on-policy gradient of k2. The gradient of k3 is that of a forward
    KL. Above `cap` nats k3 replaces exp(A) by its tangent, because exp overflows. The loss has no ratio and no clip, so
    use it with one update a step.
    """

    estimator: Literal["k1", "k2", "k3"] = "k2"
    cap: float = 10.0

    def __post_init__(self) -> None:
        check_range("cap", self.cap, gt=0, lt=80)

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        advantage_N = tokens.target_logp_N - tokens.logp_N
        if self.estimator == "k1":
            constant_N = advantage_N.detach()
            loss_N = -constant_N - constant_N * (tokens.logp_N - tokens.logp_N.detach())
        elif self.estimator == "k2":
            loss_N = advantage_N.square() / 2
        else:
            capped_N = advantage_N.clamp(max=self.cap)
            # expm1(A), since exp(A) - 1 loses all digits near 0.
            loss_N = capped_N.expm1() + capped_N.exp() * (advantage_N - capped_N) - advantage_N
        return loss_N, {self.estimator: loss_N}


# ── On a distribution ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Divergence(Objective):
    """A divergence of the next-token distributions: exact on the full vocabulary, or on a top-k and the tail.

    The supports "teacher" and "student" are the `top_k` most probable tokens of that model. All other tokens form one
    outcome, the tail, so that mass outside the support is penalized too. "full" is the vocabulary; it uses the stored
    hidden states of the teacher and its output matrix.
    """

    support: Literal["full", "teacher", "student"] = "teacher"
    top_k: int = 64

    def __post_init__(self) -> None:
        check_range("top_k", self.top_k, gt=0)

    @property
    def needs(self) -> Settings:
        if self.support == "full":
            return {"score.hidden_states": True}
        if self.support == "teacher":
            return {"score.top_k": self.top_k}
        return {"rollout.top_k": self.top_k, "score.student_top_k": True}

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        """Return the divergence of two distributions, given as log-probs, in nats, [N]."""
        raise NotImplementedError

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        import torch

        assert tokens.student_logp_NS is not None
        assert tokens.teacher_logp_NS is not None
        student_NS, teacher_NS = tokens.student_logp_NS, tokens.teacher_logp_NS
        if self.support != "full":
            assert tokens.student_tail_logp_N is not None
            student_NS = torch.cat([student_NS, tokens.student_tail_logp_N[:, None]], dim=-1)
            teacher_NS = append_tail_logprob(teacher_NS)
        loss_N = self.divergence(student_NS, teacher_NS)
        return loss_N, {"divergence": loss_N}


@OBJECTIVES.register("forward_kl", "Hinton et al., arXiv 1503.02531")
@dataclass(frozen=True)
class ForwardKl(Divergence):
    """KL(teacher || student): mode-covering."""

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        return _kl(teacher_NS, student_NS)


@OBJECTIVES.register("reverse_kl", "MiniLLM, arXiv 2306.08543")
@dataclass(frozen=True)
class ReverseKl(Divergence):
    """KL(student || teacher): mode-seeking."""

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        return _kl(student_NS, teacher_NS)


@OBJECTIVES.register("jsd", "GKD, arXiv 2306.13649")
@dataclass(frozen=True)
class Jsd(Divergence):
    """beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("beta", self.beta, gt=0, lt=1)

    def divergence(self, student_NS: Tensor, teacher_NS: Tensor) -> Tensor:
        mixed_NS = _log_mix(teacher_NS, student_NS, self.beta)
        return self.beta * _kl(teacher_NS, mixed_NS) + (1 - self.beta) * _kl(student_NS, mixed_NS)


def _kl(p_NS: Tensor, q_NS: Tensor) -> Tensor:
    """Return KL(p || q) of distributions given as log-probs, in nats, [N]."""
    return (p_NS.exp() * (p_NS - q_NS)).sum(-1)


def _log_mix(logp: Tensor, logq: Tensor, alpha: float) -> Tensor:
    """Return log(alpha exp(logp) + (1 - alpha) exp(logq)) without overflow."""
    return (logp + math.log(alpha)).logaddexp(logq + math.log1p(-alpha))


def append_tail_logprob(logp_NK: Tensor) -> Tensor:
    """Append the log-prob of the tail, all tokens outside the top-k: [N, K + 1]. Only the top-k is stored."""
    import torch

    log_mass_N = logp_NK.logsumexp(-1).clamp(max=MAX_TOP_K_LOG_MASS)
    # log(1 - e^x) is log1p(-e^x) for small e^x and log(-expm1(x)) for e^x near 1: each is exact in its range only.
    near_one_N = log_mass_N > -math.log(2)
    tail_N = (-log_mass_N.expm1()).log().where(near_one_N, (-log_mass_N.exp()).log1p())
    return torch.cat([logp_NK, tail_N[..., None]], dim=-1)
