"""Token weights: the factor of each token's loss, computed from stored log-probs in float64. No model, no torch.

A weight is a frozen dataclass. `__call__` takes one complete response, never a micro-batch or a packed row: `iw_opd`
needs the sum over the response before it can weight the first token. A weight that ranks or scales tokens within the
step overrides `weigh_step` instead. Training and analysis call `weigh`.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from opdctl.errors import OpdctlError, did_you_mean
from opdctl.losses.checks import check_range
from opdctl.registry import WEIGHTS

MIN_TAIL_PROB = 1e-6
"""Least probability of the tokens outside a top-k. Rounding could make it 0, and its log infinite."""
Floats = npt.NDArray[np.float64]
Settings = Mapping[str, int | bool]
COLUMN_SETTINGS = {
    "student_entropies": "rollout.entropy",
    "student_top_ids": "rollout.top_k",
    "student_top_logprobs": "rollout.top_k",
    "teacher_entropies": "score.entropy",
    "teacher_top_ids": "score.top_k",
    "teacher_student_top_logprobs": "score.student_top_k",
}
"""The optional columns, each with the recipe setting that stores it. A name is "student_" and a field of Response, or
"teacher_" and a field of TokenScores (artifacts/records.py)."""


@dataclass(frozen=True)
class ResponseTokens:
    """The tokens of one complete response; log-probs and advantages in nats.

    advantage_T: log p_target - log p_student. The target is the teacher, or its extrapolation from a reference model.
    step: the step of the response. columns: the optional columns that are stored, by the names in `COLUMN_SETTINGS`.
    """

    student_logp_T: Floats
    teacher_logp_T: Floats
    advantage_T: Floats
    step: int = 0
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.advantage_T)

    def column(self, column: str) -> npt.NDArray[Any]:
        """Return an optional column: [T], or [T, K] for the top-k columns.

        Raises:
            OpdctlError: the name is unknown, or the run does not store the column.
        """
        if column not in COLUMN_SETTINGS:
            raise OpdctlError("unknown_name", f"column `{column}`{did_you_mean(column, COLUMN_SETTINGS)}")
        if column not in self.columns:
            raise OpdctlError(
                "settings_mismatch",
                f"a token weight reads the column `{column}`, which this run does not store",
                hint=f"add `{COLUMN_SETTINGS[column]}` to the `needs` of the weight",
            )
        return self.columns[column]


class Weight:
    """The base class of token weights. A subclass implements `__call__`, or `weigh_step` if it compares responses."""

    @property
    def needs(self) -> Settings:
        """The recipe settings that store the columns this weight reads, with the values that it requires."""
        return {}

    @property
    def needs_full_step(self) -> bool:
        """Whether the weights of a response depend on the other responses of the step."""
        return type(self).weigh_step is not Weight.weigh_step

    def __call__(self, tokens: ResponseTokens) -> Floats:
        """Return the weights of the tokens of one response, [T], finite and at least 0."""
        raise NotImplementedError(f"{self} has no weights for a single response: call `weigh_step`")

    def weigh_step(self, responses: Sequence[ResponseTokens]) -> list[Floats]:
        """Return the weights of every response of a step, [T] each."""
        return [self(tokens) for tokens in responses]


@dataclass(frozen=True)
class Product(Weight):
    """The product of two weights, token by token."""

    first: Weight
    second: Weight

    @property
    def needs(self) -> Settings:
        return merge_requirements(self.first.needs, self.second.needs)

    @property
    def needs_full_step(self) -> bool:
        return self.first.needs_full_step or self.second.needs_full_step

    def weigh_step(self, responses: Sequence[ResponseTokens]) -> list[Floats]:
        first, second = self.first.weigh_step(responses), self.second.weigh_step(responses)
        return [a_T * b_T for a_T, b_T in zip(first, second, strict=True)]


def merge_requirements(*settings: Settings) -> dict[str, int | bool]:
    """Return the union of the settings. A setting that occurs twice gets the greater value."""
    union: dict[str, int | bool] = {}
    for requirements in settings:
        for name, value in requirements.items():
            union[name] = max(union.get(name, value), value)
    return union


def build_weight(name: str, params: Mapping[str, Any], times: tuple[str, Mapping[str, Any]] | None = None) -> Weight:
    """Build the weight `name`, or its product with the weight `times`.

    Raises:
        OpdctlError: a name is unknown, or a parameter is invalid.
    """
    weight: Weight = WEIGHTS.build(name, params)
    return Product(weight, WEIGHTS.build(*times)) if times else weight


def weigh(weight: Weight, responses: Sequence[ResponseTokens]) -> list[Floats]:
    """Return the weights of every response of a step, [T] each, and check them.

    Raises:
        OpdctlError: a weight is negative or not finite, or the number of weights is wrong.
    """
    weights = weight.weigh_step(responses)
    if len(weights) != len(responses):
        raise OpdctlError(
            "invalid_plugin", f"{weight}: `weigh_step` returned {len(weights)} arrays for {len(responses)} responses"
        )
    for tokens, weight_T in zip(responses, weights, strict=True):
        if weight_T.shape != (len(tokens),) or not (np.isfinite(weight_T).all() and (weight_T >= 0).all()):
            raise OpdctlError(
                "invalid_data",
                f"{weight}: the weights of a response of {len(tokens)} tokens have shape {weight_T.shape} and range "
                f"from {weight_T.min(initial=np.inf)} to {weight_T.max(initial=-np.inf)}",
                hint="return one finite weight >= 0 for each token",
            )
    return weights


def _num_tokens(fraction: float, length: int) -> int:
    """Return ceil(fraction * length), robust to rounding: 0.07 of 100 tokens is 7, although 0.07 * 100 > 7."""
    return math.ceil(round(fraction * length, 9))


def _running_sums(value_T: Floats) -> Floats:
    """Return the sums of the first 0, 1, …, T values, [T + 1]."""
    return np.cumsum(np.concatenate([np.zeros(1), value_T]))


def _fraction_elapsed(tokens: ResponseTokens) -> Floats:
    """Return (t - 1) / (n - 1) for each token t of the n tokens of a response: 0 at the first, 1 at the last."""
    return np.arange(len(tokens)) / max(len(tokens) - 1, 1)


def top_k_overlap(tokens: ResponseTokens, top_k: int | None = None) -> Floats:
    """Return the fraction of the student's `top_k` most probable tokens that are among the teacher's, [T].

    top_k: all stored tokens by default.
    """
    student_TK = tokens.column("student_top_ids")[:, :top_k]
    teacher_TK = tokens.column("teacher_top_ids")[:, :top_k]
    shared_TK = (student_TK[:, :, None] == teacher_TK[:, None, :]).any(-1)
    return shared_TK.sum(-1) / max(student_TK.shape[-1], 1)


# ── By drift of the prefix from the teacher ──────────────────────────────────────────────────────────────────────────


@WEIGHTS.register("uniform", "arXiv 2606.22600")
@dataclass(frozen=True)
class Uniform(Weight):
    """Weight 1 for every token: standard on-policy distillation."""

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return np.ones(len(tokens))


@WEIGHTS.register("iw_opd", "arXiv 2606.22600")
@dataclass(frozen=True)
class IwOpd(Weight):
    """w_t = 1 + gamma (1 - F_{t-1}), with F_{t-1} the fraction of the response's sum of |A| before token t.

    The first token has weight 1 + gamma. Later weights fall towards 1 as the prefix drifts from the teacher. The
    weights are not normalized to mean 1. If |A| is 0 for every token, all weights are 1 + gamma. `signed` sums A
    instead of |A|, and clips the fraction to [0, 1].
    """

    gamma: float = 0.5
    signed: bool = False

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, ge=0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        discrepancy_T = tokens.advantage_T if self.signed else np.abs(tokens.advantage_T)
        # Scale to at most 1, so that the sums cannot overflow. A power of two causes no rounding.
        _, exponent = np.frexp(np.abs(discrepancy_T).max(initial=0.0))
        discrepancy_T = np.ldexp(discrepancy_T, -exponent)
        sums = _running_sums(discrepancy_T)
        with np.errstate(over="ignore"):  # a signed total near 0 can overflow; the fraction is clipped below
            fraction_T = sums[:-1] / sums[-1] if sums[-1] != 0 else np.zeros(len(tokens))
        return 1.0 + self.gamma * (1.0 - np.clip(fraction_T, 0.0, 1.0))


@WEIGHTS.register("prefix_ratio", "arXiv 2606.22600, Proposition 1")
@dataclass(frozen=True)
class PrefixRatio(Weight):
    """r_t = exp(alpha Σ_{k<t} A_k), normalized to mean 1 within the response: the ideal ratio, unstable in practice."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, ge=0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        if not len(tokens):
            return np.zeros(0)
        log_ratio_T = self.alpha * _running_sums(tokens.advantage_T)[:-1]
        ratio_T = np.exp(log_ratio_T - log_ratio_T.max())  # the maximum is 1: no overflow, and the mean is not 0
        return ratio_T / ratio_T.mean()


@WEIGHTS.register("teacher_confidence", "arXiv 2606.22600, its code")
@dataclass(frozen=True)
class TeacherConfidence(Weight):
    """max(w_min, exp(-alpha Q_t)), with Q_t the mean of the largest 1 - q of -log p_teacher in a window before t.

    `window` is in tokens. The window of the first token is empty, and its weight is 1.
    """

    alpha: float = 0.5
    window: int = 64
    q: float = 0.9
    w_min: float = 0.1

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
        count_T = np.array([max(1, _num_tokens(1 - self.q, length)) for length in length_T])
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


# ── By position ──────────────────────────────────────────────────────────────────────────────────────────────────────


@WEIGHTS.register("linear_decay", "arXiv 2606.22600")
@dataclass(frozen=True)
class LinearDecay(Weight):
    """Falls linearly from 1 + gamma at the first token to 1 at the last."""

    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, ge=0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return 1.0 + self.gamma * (1.0 - _fraction_elapsed(tokens))


@WEIGHTS.register("position_sigmoid", "PW-OPSD, arXiv 2605.21606")
@dataclass(frozen=True)
class PositionSigmoid(Weight):
    """w_min + (1 - w_min) sigmoid((t/n - tau) / scale), which rises with the position t of n tokens."""

    w_min: float = 0.25
    tau: float = 0.30
    scale: float = 0.10

    def __post_init__(self) -> None:
        check_range("w_min", self.w_min, ge=0, le=1)
        check_range("tau", self.tau, ge=0, le=1)
        check_range("scale", self.scale, ge=2e-3)  # exp overflows below this

    def __call__(self, tokens: ResponseTokens) -> Floats:
        position_T = np.arange(1, len(tokens) + 1) / max(len(tokens), 1)
        return self.w_min + (1 - self.w_min) / (1 + np.exp(-(position_T - self.tau) / self.scale))


@WEIGHTS.register("prefix_only", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixOnly(Weight):
    """1 for the first ceil(fraction n) of n tokens, else 0."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, ge=0, le=1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return (np.arange(len(tokens)) < _num_tokens(self.fraction, len(tokens))).astype(np.float64)


@WEIGHTS.register("suffix_only", "arXiv 2606.22600")
@dataclass(frozen=True)
class SuffixOnly(Weight):
    """1 for the last ceil(fraction n) of n tokens, else 0."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, ge=0, le=1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return PrefixOnly(self.fraction)(tokens)[::-1].copy()


@WEIGHTS.register("prefix_boost", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixBoost(Weight):
    """`multiplier` for the first ceil(fraction n) of n tokens, else 1."""

    fraction: float = 0.3
    multiplier: float = 1.5

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, ge=0, le=1)
        check_range("multiplier", self.multiplier, ge=0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return np.where(PrefixOnly(self.fraction)(tokens) > 0, self.multiplier, 1.0)


@WEIGHTS.register("prefix_curriculum", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixCurriculum(Weight):
    """prefix_boost (mode "mask": prefix_only) with a fraction that grows from `start` to `end` over `steps` steps."""

    mode: Literal["boost", "mask"] = "boost"
    schedule: Literal["cosine", "linear"] = "cosine"
    start: float = 0.3
    end: float = 1.0
    steps: int = 100
    multiplier: float = 1.5

    def __post_init__(self) -> None:
        check_range("start", self.start, ge=0, le=1)
        check_range("end", self.end, ge=0, le=1)
        check_range("steps", self.steps, ge=1)
        check_range("multiplier", self.multiplier, ge=0)

    def fraction(self, step: int) -> float:
        """Return the fraction at a step: `start` at step 0, `end` from step `steps`."""
        progress = min(step / self.steps, 1.0)
        growth = (1 - math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else progress
        return min(max(self.start + (self.end - self.start) * growth, 0.0), 1.0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        fraction = self.fraction(tokens.step)
        weight: Weight = (
            PrefixOnly(fraction) if self.mode == "mask" else PrefixBoost(fraction, multiplier=self.multiplier)
        )
        return weight(tokens)


# ── Relative to the tokens of the step ───────────────────────────────────────────────────────────────────────────────


@WEIGHTS.register("tip", "TIP, arXiv 2604.14084")
@dataclass(frozen=True)
class Tip(Weight):
    """1 for the fraction rho of the step's tokens with the highest h + d - h d (entropy h, divergence d), else 0.

    h is the student's entropy. d is KL(student || teacher) on the student's `top_k` most probable tokens and the tail;
    if `top_k` is 0, it is |A| of the sampled token. Both are scaled to [0, 1] by their minimum and maximum in the step.
    Tokens that tie with the last selected token are selected too, so the order of responses does not matter.
    """

    rho: float = 0.5
    top_k: int = 16

    def __post_init__(self) -> None:
        check_range("rho", self.rho, ge=0, le=1)
        check_range("top_k", self.top_k, ge=0)

    @property
    def needs(self) -> Settings:
        top = {"rollout.top_k": self.top_k, "score.student_top_k": True} if self.top_k else {}
        return {"rollout.entropy": True, **top}

    def weigh_step(self, responses: Sequence[ResponseTokens]) -> list[Floats]:
        entropies = (tokens.column("student_entropies") for tokens in responses)
        entropy_N = _min_max_scale(np.concatenate([np.zeros(0), *entropies]))
        divergence_N = _min_max_scale(np.concatenate([np.zeros(0), *map(self._divergence, responses)]))
        score_N = 1 - (1 - entropy_N) * (1 - divergence_N)  # h + d - h d, and exactly 1 if h or d is 1
        count = _num_tokens(self.rho, len(score_N))
        threshold = np.partition(score_N, -count)[-count] if count else np.inf
        return _split((score_N >= threshold).astype(np.float64), responses)

    def _divergence(self, tokens: ResponseTokens) -> Floats:
        if not self.top_k:
            return np.abs(tokens.advantage_T)
        student_TK = _append_tail(tokens.column("student_top_logprobs")[:, : self.top_k])
        teacher_TK = _append_tail(tokens.column("teacher_student_top_logprobs")[:, : self.top_k])
        return np.maximum((np.exp(student_TK) * (student_TK - teacher_TK)).sum(-1), 0.0)


@WEIGHTS.register("fire", "FiRe-OPD, arXiv 2606.02684")
@dataclass(frozen=True)
class Fire(Weight):
    """(1 + alpha (1 - H_T/max H_T)) (1 + beta H_S/max H_S), and 0 for the responses least likely under the teacher.

    H_T and H_S are the entropies of teacher and student, and max is over the step. A response has weight 0 if its mean
    log p_teacher is below the step's `percentile`. The other weights are normalized to mean 1 over the step.
    """

    alpha: float = 1.0
    beta: float = 1.0
    percentile: float = 20.0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, ge=0)
        check_range("beta", self.beta, ge=0)
        check_range("percentile", self.percentile, ge=0, le=100)

    @property
    def needs(self) -> Settings:
        return {"rollout.entropy": True, "score.entropy": True}

    def weigh_step(self, responses: Sequence[ResponseTokens]) -> list[Floats]:
        keep_R = self._likely_responses(responses)
        teacher_max, student_max = (
            max((tokens.column(column).max(initial=0.0) for tokens in responses), default=0.0) or 1.0
            for column in ("teacher_entropies", "student_entropies")
        )
        weights = [
            (1 + self.alpha * (1 - tokens.column("teacher_entropies") / teacher_max))
            * (1 + self.beta * tokens.column("student_entropies") / student_max)
            * keep
            for tokens, keep in zip(responses, keep_R, strict=True)
        ]
        num_kept = sum(len(tokens) for tokens, keep in zip(responses, keep_R, strict=True) if keep)
        mean = sum(weight_T.sum() for weight_T in weights) / max(num_kept, 1)
        return [weight_T / (mean or 1.0) for weight_T in weights]

    def _likely_responses(self, responses: Sequence[ResponseTokens]) -> list[bool]:
        """Return whether the mean log p_teacher of each response reaches the percentile; never for an empty one."""
        likelihood_R = sorted(tokens.teacher_logp_T.mean() for tokens in responses if len(tokens))
        if not likelihood_R:
            return [False] * len(responses)
        # The first value that is not below the percentile by linear interpolation.
        threshold = likelihood_R[_num_tokens(self.percentile / 100, len(likelihood_R) - 1)]
        return [len(tokens) > 0 and bool(tokens.teacher_logp_T.mean() >= threshold) for tokens in responses]


def _min_max_scale(value_N: Floats) -> Floats:
    """Scale values to [0, 1] by their minimum and maximum; equal values become 0."""
    if not len(value_N) or value_N.min() == value_N.max():
        return np.zeros(len(value_N))
    value_N = value_N / np.abs(value_N).max()  # the difference of two huge numbers of opposite sign would overflow
    return (value_N - value_N.min()) / (value_N.max() - value_N.min())


def _split(value_N: Floats, responses: Sequence[ResponseTokens]) -> list[Floats]:
    """Split the values of a step into one array for each response."""
    return np.split(value_N, np.cumsum([len(tokens) for tokens in responses])[:-1]) if responses else []


def _append_tail(logp_TK: Floats) -> Floats:
    """Append the log-prob of the tail, all tokens outside the top-k: [T, K + 1]."""
    logp_TK = logp_TK.astype(np.float64)
    tail_T = np.maximum(1.0 - np.exp(logp_TK).sum(-1), MIN_TAIL_PROB)
    return np.concatenate([logp_TK, np.log(tail_T)[:, None]], axis=-1)
