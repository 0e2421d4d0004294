"""Token weights by how far the prefix has drifted from the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opdctl.losses.checks import check_range
from opdctl.losses.token_weights.base import Floats, ResponseTokens, Settings, Weight, top_k_overlap
from opdctl.registry import WEIGHTS


@WEIGHTS.register("uniform", "arXiv 2606.22600")
@dataclass(frozen=True)
class Uniform(Weight):
    """Weight 1 for every token: standard on-policy distillation."""

    reads_student_logprobs = False

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return np.ones(len(tokens))


@WEIGHTS.register("iw_opd", "arXiv 2606.22600")
@dataclass(frozen=True)
class IwOpd(Weight):
    """w_t = floor + gamma (1 - F_{t-1}), with F_{t-1} the fraction of the response's sum of |A| before token t.

    The first token has weight floor + gamma. Later weights fall towards `floor` as the prefix drifts from the teacher.
    The weights are not normalized to mean 1. `floor` 0 and `gamma` 1 are the surrogate alone, 1 - F. If |A| is 0 for
    every token, all weights are floor + gamma. `signed` sums A instead of |A|, and clips the fraction to [0, 1]; a
    total that is 0 but for rounding counts as 0.

    The denominator is the sum over all T tokens, as in the authors' code, which adds 1e-8, and in TRL. That of Eq. 17
    ends at T - 1, so its last weight is `floor`. Here no weight is greater by more than gamma |A_T| / Σ|A|, the last
    token's share.
    """

    gamma: float = 0.5
    floor: float = 1.0
    signed: bool = False

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, ge=0)
        check_range("floor", self.floor, ge=0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        discrepancy_T = tokens.advantage_T if self.signed else np.abs(tokens.advantage_T)
        # Scale to at most 1, so that the sums cannot overflow. A power of two causes no rounding.
        _, exponent = np.frexp(np.abs(discrepancy_T).max(initial=0.0))
        discrepancy_T = np.ldexp(discrepancy_T, -exponent)
        sums = _running_sums(discrepancy_T)
        # The bound of the rounding error of a running sum (Higham 2002, 4.2): terms may cancel but for rounding.
        rounding = len(tokens) * np.finfo(np.float64).eps * np.abs(discrepancy_T).sum()
        fraction_T = sums[:-1] / sums[-1] if abs(sums[-1]) > rounding else np.zeros(len(tokens))
        return self.floor + self.gamma * (1.0 - np.clip(fraction_T, 0.0, 1.0))


@WEIGHTS.register("prefix_ratio", "arXiv 2606.22600, Proposition 1")
@dataclass(frozen=True)
class PrefixRatio(Weight):
    """floor + gamma r_t, with the ideal ratio r_t = exp(alpha Σ_{k<t} A_k), normalized to mean 1.

    `normalize` "position" divides by the mean over the responses of the step at each position, the paper's Z_t:
    shorter responses do not count. "response" divides by the mean over the tokens of the response. `floor` 1 blends the
    ratio with standard on-policy distillation. The ratio is unstable: choose alpha for the length of the responses.
    """

    alpha: float = 0.001
    floor: float = 0.0
    gamma: float = 1.0
    normalize: Literal["position", "response"] = "position"

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, ge=0)
        check_range("floor", self.floor, ge=0)
        check_range("gamma", self.gamma, ge=0)

    @property
    def needs_full_step(self) -> bool:
        return self.normalize == "position"

    def weigh_step(self, responses: Sequence[ResponseTokens]) -> list[Floats]:
        log_ratios = [self.alpha * _running_sums(tokens.advantage_T)[:-1] for tokens in responses]
        if self.normalize == "position":
            ratios = _ratios_over_responses(log_ratios)
        else:
            ratios = [_ratios_over_tokens(log_ratio_T) for log_ratio_T in log_ratios]
        return [self.floor + self.gamma * ratio_T for ratio_T in ratios]


@WEIGHTS.register("teacher_confidence", "arXiv 2606.22600, its code")
@dataclass(frozen=True)
class TeacherConfidence(Weight):
    """max(w_min, exp(-alpha Q_t)), with Q_t the mean of the largest 1 - q of -log p_teacher in a window before t.

    These are floor((1 - q) n) of the n tokens of the window, at least one. `window` is in tokens. The window of the
    first token is empty, and its weight is 1.
    """

    alpha: float = 1.0
    window: int = 64
    q: float = 0.9
    w_min: float = 0.0
    reads_student_logprobs = False

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, ge=0)
        check_range("window", self.window, ge=1)
        check_range("q", self.q, ge=0, le=1)
        check_range("w_min", self.w_min, ge=0, le=1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        if not len(tokens):
            return np.zeros(0)
        # Row t is the window before token t, in descending order. Padding (-inf) sorts last and is not counted.
        window = min(self.window, len(tokens))
        padded = np.concatenate([np.full(window, -np.inf), -tokens.teacher_logp_T[:-1]])
        worst_TW = -np.sort(-np.lib.stride_tricks.sliding_window_view(padded, window), axis=-1)
        length_T = np.minimum(np.arange(len(tokens)), window)
        # Rounded first: (1 - 0.9) * 10 is less than 1.
        count_T = np.maximum(np.floor(np.round((1 - self.q) * length_T, 9)).astype(np.int64), 1)
        sums_TW = np.cumsum(np.where(np.isfinite(worst_TW), worst_TW, 0.0), axis=-1)
        mean_T = np.where(length_T > 0, sums_TW[np.arange(len(tokens)), count_T - 1] / count_T, 0.0)
        return np.maximum(np.exp(-self.alpha * mean_T), self.w_min)


@WEIGHTS.register("prune", "Prune-OPD, arXiv 2605.07804")
@dataclass(frozen=True)
class Prune(Weight):
    """clip(1 - drop n_t, 0, 1) + base, with n_t the tokens up to t whose top-k overlap with the teacher is < tau."""

    drop: float = 0.01
    tau: float = 0.7
    base: float = 0.5
    top_k: int = 16
    reads_student_logprobs = False

    def __post_init__(self) -> None:
        check_range("drop", self.drop, ge=0)
        check_range("tau", self.tau, ge=0, le=1)
        check_range("base", self.base, ge=0)
        check_range("top_k", self.top_k, ge=1)

    @property
    def needs(self) -> Settings:
        return {"rollout.top_k": self.top_k, "score.top_k": self.top_k}

    def __call__(self, tokens: ResponseTokens) -> Floats:
        drifted_T = top_k_overlap(tokens, self.top_k) < self.tau
        return np.clip(1 - self.drop * np.cumsum(drifted_T), 0.0, 1.0) + self.base


def _running_sums(value_T: Floats) -> Floats:
    """Return the sums of the first 0, 1, …, T values, [T + 1]."""
    return np.cumsum(np.concatenate([np.zeros(1), value_T]))


def _ratios_over_tokens(log_ratio_T: Floats) -> Floats:
    """Return the ratios of a response, of mean 1."""
    if not len(log_ratio_T):
        return np.zeros(0)
    ratio_T = np.exp(log_ratio_T - log_ratio_T.max())  # the maximum is 1: no overflow, and the mean is not 0
    return ratio_T / ratio_T.mean()


def _ratios_over_responses(log_ratios: Sequence[Floats]) -> list[Floats]:
    """Return the ratios of each response; at each position those of the responses that reach it have mean 1."""
    length = max(map(len, log_ratios), default=0)
    max_T, sum_T, count_T = np.full(length, -np.inf), np.zeros(length), np.zeros(length)
    for log_ratio_T in log_ratios:
        reached = slice(len(log_ratio_T))
        max_T[reached] = np.maximum(max_T[reached], log_ratio_T)
        count_T[reached] += 1
    ratios = [np.exp(log_ratio_T - max_T[: len(log_ratio_T)]) for log_ratio_T in log_ratios]
    for ratio_T in ratios:
        sum_T[: len(ratio_T)] += ratio_T
    return [ratio_T * count_T[: len(ratio_T)] / sum_T[: len(ratio_T)] for ratio_T in ratios]
