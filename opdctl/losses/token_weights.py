"""Token weights: pure functions of what is stored of whole responses. No model, no torch, float64 inside.

A weight is a frozen dataclass. It weighs one whole response by `__call__`, never a micro-batch or a packed row:
`iw_opd` needs the response's total before it can weigh the first token. One that ranks or scales tokens against the
others takes the whole step, by `over`. `weigh` is what training and analysis call.

Shapes: T tokens of one response, K most probable tokens at each, W tokens of a window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.registry import WEIGHTS

Floats = npt.NDArray[np.float64]
Settings = Mapping[str, int | bool]
COLUMN_SETTINGS = {
    "student_entropy": "rollout.entropy",
    "student_top_ids": "rollout.top_k",
    "student_top_logp": "rollout.top_k",
    "teacher_entropy": "score.entropy",
    "teacher_top_ids": "score.top_k",
    "teacher_logp_of_student_top": "score.student_top_k",
}
"""The optional columns, and the recipe's setting that has each stored."""


@dataclass(frozen=True)
class ResponseTokens:
    """One whole response's tokens, in nats.

    advantage_T: log p_target - log p_student, the target being the teacher, or what it is extrapolated to with a
    reference model. step: updates the student had seen. columns: what else is stored, by the names in `SETTING`.
    """

    student_logp_T: Floats
    teacher_logp_T: Floats
    advantage_T: Floats
    step: int = 0
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.advantage_T)

    def column(self, column: str) -> npt.NDArray[Any]:
        """Return an optional column. Raises OpdctlError (code 4) with the setting to add when it is not stored."""
        if column not in COLUMN_SETTINGS:
            raise OpdctlError(f"a weight asks for a column `{column}`{did_you_mean(column, COLUMN_SETTINGS)}")
        if column not in self.columns:
            raise OpdctlError(
                f"a weight asks for {column}, which is not stored",
                hint=f"it needs `{COLUMN_SETTINGS[column]}` in the recipe, which a weight declares by `needs`",
                code=ExitCode.RECIPE_MISMATCH,
            )
        return self.columns[column]


class Weight:
    """What a token weight must be: `__call__` for one response, or `over` for all responses of a step at once."""

    @property
    def needs(self) -> Settings:
        """Settings of rollout and score that store what this weight asks for, beyond the sampled tokens' log-probs."""
        return {}

    @property
    def needs_full_step(self) -> bool:
        """Whether the weights of a response depend on the step's other responses too."""
        return type(self).weigh_step is not Weight.weigh_step

    def __call__(self, tokens: ResponseTokens) -> Floats:
        """Return the weights of one response's tokens, [T], finite and at least 0."""
        raise NotImplementedError(f"{self} weighs a whole step, by `over`")

    def weigh_step(self, step: Sequence[ResponseTokens]) -> list[Floats]:
        """Return the weights of each of a step's responses."""
        return [self(tokens) for tokens in step]


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

    def weigh_step(self, step: Sequence[ResponseTokens]) -> list[Floats]:
        return [a * b for a, b in zip(self.first.weigh_step(step), self.second.weigh_step(step), strict=True)]


def merge_requirements(*settings: Settings) -> dict[str, int | bool]:
    """Return the union of the settings; of one that is named twice, the greater value."""
    union: dict[str, int | bool] = {}
    for name, value in (item for each in settings for item in each.items()):
        union[name] = max(union.get(name, value), value)
    return union


def build(name: str, params: Mapping[str, Any], times: tuple[str, Mapping[str, Any]] | None = None) -> Weight:
    """Build the weight `name`, or its product with another one."""
    weight: Weight = WEIGHTS.build(name, params)
    return Product(weight, WEIGHTS.build(*times)) if times else weight


def weigh(weight: Weight, step: Sequence[ResponseTokens]) -> list[Floats]:
    """Return the weights of each of a step's responses, [T] each.

    Raises OpdctlError (code 3) when a weight is not finite, negative, or of another length than the response.
    """
    weights = weight.weigh_step(step)
    if len(weights) != len(step):
        raise OpdctlError(f"{weight} gives {len(weights)} arrays of weights for {len(step)} responses")
    for tokens, weight_T in zip(step, weights, strict=True):
        if weight_T.shape != (len(tokens),) or not (np.isfinite(weight_T).all() and (weight_T >= 0).all()):
            raise OpdctlError(
                f"{weight} gives a response of {len(tokens)} tokens weights of shape {weight_T.shape}, from "
                f"{weight_T.min(initial=np.inf)} to {weight_T.max(initial=-np.inf)}",
                hint="a weight is one finite number >= 0 for each token",
                code=ExitCode.BAD_DATA,
            )
    return weights


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value <= high and the value is finite."""
    if not (math.isfinite(value) and low <= value <= high):
        wanted = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number {wanted}, got {value}")


def _num_tokens(fraction: float, length: int) -> int:
    """Return ceil(fraction * length), but for rounding: 0.07 of 100 tokens are 7, though 0.07 * 100 > 7."""
    return math.ceil(round(fraction * length, 9))


def _running_sums(value_T: Floats) -> Floats:
    """Return the sums of the first 0, 1 … T values, [T + 1]."""
    return np.cumsum(np.concatenate([np.zeros(1), value_T]))


def _fraction_elapsed(tokens: ResponseTokens) -> Floats:
    """Return (t - 1) / (n - 1): 0 at the first token, 1 at the last, of the response's real length n."""
    return np.arange(len(tokens)) / max(len(tokens) - 1, 1)


# ── By drift: how far the prefix has gone from the teacher ───────────────────────────────────────────────────────────


@WEIGHTS.register("uniform", "arXiv 2606.22600")
@dataclass(frozen=True)
class Uniform(Weight):
    """Every token weighs 1: standard on-policy distillation."""

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return np.ones(len(tokens))


@WEIGHTS.register("iw_opd", "arXiv 2606.22600")
@dataclass(frozen=True)
class IwOpd(Weight):
    """w_t = 1 + gamma (1 - F_{t-1}), F the share of the response's sum of |A| that earlier tokens have spent.

    The first token weighs 1 + gamma, later ones fall towards 1 as the prefix drifts from the teacher; the weights are
    not brought back to mean 1. A response without any discrepancy weighs 1 + gamma throughout. `signed` sums A instead
    of |A|; such a share can leave [0, 1], and is held there.
    """

    gamma: float = 0.5
    signed: bool = False

    def __post_init__(self) -> None:
        _check("gamma", self.gamma, 0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        discrepancy_T = tokens.advantage_T if self.signed else np.abs(tokens.advantage_T)
        # Scaled to at most 1, or sums of huge numbers would overflow; by a power of two, which rounds nothing.
        _, exponent = np.frexp(np.abs(discrepancy_T).max(initial=0.0))
        discrepancy_T = np.ldexp(discrepancy_T, -exponent)
        sums = _running_sums(discrepancy_T)
        with np.errstate(over="ignore"):  # a signed total near 0: the share is held in [0, 1] anyway
            share_T = sums[:-1] / sums[-1] if sums[-1] != 0 else np.zeros(len(tokens))
        return 1.0 + self.gamma * (1.0 - np.clip(share_T, 0.0, 1.0))


@WEIGHTS.register("prefix_ratio", "arXiv 2606.22600, Proposition 1")
@dataclass(frozen=True)
class PrefixRatio(Weight):
    """r_t = exp(alpha Σ_{k<t} A_k), brought to mean 1 within the response: the ideal ratio, unstable in practice."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check("alpha", self.alpha, 0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        if not len(tokens):
            return np.zeros(0)
        power_T = self.alpha * _running_sums(tokens.advantage_T)[:-1]
        ratio_T = np.exp(power_T - power_T.max())  # the greatest is 1: no overflow, and the mean is not 0
        return ratio_T / ratio_T.mean()


@WEIGHTS.register("teacher_confidence", "arXiv 2606.22600, its code")
@dataclass(frozen=True)
class TeacherConfidence(Weight):
    """exp(-alpha Q_t), at least w_min; Q_t: mean of the worst 1 - q of the last tokens' -log p_teacher.

    The last tokens are those of a window before t; the first token has none, and weighs 1.
    """

    alpha: float = 0.5
    window: int = 64
    q: float = 0.9
    w_min: float = 0.1

    def __post_init__(self) -> None:
        _check("alpha", self.alpha, 0)
        _check("window", self.window, 1)
        _check("q", self.q, 0, 1)
        _check("w_min", self.w_min, 0, 1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        if not len(tokens):
            return np.zeros(0)
        # Row t holds the window before token t, the worst first; what lies before the response is never counted.
        window = min(self.window, len(tokens))
        padded = np.concatenate([np.full(window, -np.inf), -tokens.teacher_logp_T[:-1]])
        worst_TW = -np.sort(-np.lib.stride_tricks.sliding_window_view(padded, window), axis=-1)
        seen_T = np.minimum(np.arange(len(tokens)), window)
        counted_T = np.array([max(1, _num_tokens(1 - self.q, seen)) for seen in seen_T])
        sums_TW = np.cumsum(np.where(np.isfinite(worst_TW), worst_TW, 0.0), axis=-1)
        worst_T = np.where(seen_T > 0, sums_TW[np.arange(len(tokens)), counted_T - 1] / counted_T, 0.0)
        return np.maximum(np.exp(-self.alpha * worst_T), self.w_min)


@WEIGHTS.register("prune", "Prune-OPD, arXiv 2605.07804")
@dataclass(frozen=True)
class Prune(Weight):
    """clamp(1 - drop · tokens so far whose top-k overlap with the teacher is below tau, 0, 1) + base."""

    drop: float = 0.01
    tau: float = 0.7
    base: float = 0.5
    top_k: int = 16

    def __post_init__(self) -> None:
        _check("drop", self.drop, 0)
        _check("tau", self.tau, 0, 1)
        _check("base", self.base, 0)
        _check("top_k", self.top_k, 1)

    @property
    def needs(self) -> Settings:
        return {"rollout.top_k": self.top_k, "score.top_k": self.top_k}

    def __call__(self, tokens: ResponseTokens) -> Floats:
        student_TK = tokens.column("student_top_ids")[:, : self.top_k]
        teacher_TK = tokens.column("teacher_top_ids")[:, : self.top_k]
        shared_TK = (student_TK[:, :, None] == teacher_TK[:, None, :]).any(-1)
        drifted_T = shared_TK.sum(-1) / self.top_k < self.tau
        return np.clip(1 - self.drop * np.cumsum(drifted_T), 0.0, 1.0) + self.base


# ── By position ──────────────────────────────────────────────────────────────────────────────────────────────────────


@WEIGHTS.register("linear_decay", "arXiv 2606.22600")
@dataclass(frozen=True)
class LinearDecay(Weight):
    """Falls linearly from 1 + gamma at the first token to 1 at the last."""

    gamma: float = 0.5

    def __post_init__(self) -> None:
        _check("gamma", self.gamma, 0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return 1.0 + self.gamma * (1.0 - _fraction_elapsed(tokens))


@WEIGHTS.register("position_sigmoid", "PW-OPSD, arXiv 2605.21606")
@dataclass(frozen=True)
class PositionSigmoid(Weight):
    """w_min + (1 - w_min) sigmoid((t/n - tau) / scale): rises with the position t of n."""

    w_min: float = 0.25
    tau: float = 0.30
    scale: float = 0.10

    def __post_init__(self) -> None:
        _check("w_min", self.w_min, 0, 1)
        _check("tau", self.tau, 0, 1)
        _check("scale", self.scale, 2e-3)  # below, exp overflows

    def __call__(self, tokens: ResponseTokens) -> Floats:
        position_T = np.arange(1, len(tokens) + 1) / max(len(tokens), 1)
        return self.w_min + (1 - self.w_min) / (1 + np.exp(-(position_T - self.tau) / self.scale))


@WEIGHTS.register("prefix_only", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixOnly(Weight):
    """1 on the first ceil(fraction n) of n tokens, else 0."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check("fraction", self.fraction, 0, 1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return (np.arange(len(tokens)) < _num_tokens(self.fraction, len(tokens))).astype(np.float64)


@WEIGHTS.register("suffix_only", "arXiv 2606.22600")
@dataclass(frozen=True)
class SuffixOnly(Weight):
    """1 on the last ceil(fraction n) of n tokens, else 0."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check("fraction", self.fraction, 0, 1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return PrefixOnly(self.fraction)(tokens)[::-1].copy()


@WEIGHTS.register("prefix_boost", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixBoost(Weight):
    """`multiplier` on the first ceil(fraction n) of n tokens, else 1."""

    fraction: float = 0.3
    multiplier: float = 1.5

    def __post_init__(self) -> None:
        _check("fraction", self.fraction, 0, 1)
        _check("multiplier", self.multiplier, 0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return np.where(PrefixOnly(self.fraction)(tokens) > 0, self.multiplier, 1.0)


@WEIGHTS.register("prefix_curriculum", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixCurriculum(Weight):
    """prefix_boost, or with mode "mask" prefix_only, whose fraction grows from `start` to `end` over `steps` steps."""

    mode: Literal["boost", "mask"] = "boost"
    schedule: Literal["cosine", "linear"] = "cosine"
    start: float = 0.3
    end: float = 1.0
    steps: int = 100
    multiplier: float = 1.5

    def __post_init__(self) -> None:
        _check("start", self.start, 0, 1)
        _check("end", self.end, 0, 1)
        _check("steps", self.steps, 1)
        _check("multiplier", self.multiplier, 0)

    def fraction(self, step: int) -> float:
        """Return the fraction at a step: `start` at step 0, `end` from step `steps` on."""
        progress = min(step / self.steps, 1.0)
        grown = (1 - math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else progress
        return min(max(self.start + (self.end - self.start) * grown, 0.0), 1.0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        fraction = self.fraction(tokens.step)
        weight: Weight = (
            PrefixOnly(fraction) if self.mode == "mask" else PrefixBoost(fraction, multiplier=self.multiplier)
        )
        return weight(tokens)


# ── By rank among the step's tokens ──────────────────────────────────────────────────────────────────────────────────


@WEIGHTS.register("tip", "TIP, arXiv 2604.14084")
@dataclass(frozen=True)
class Tip(Weight):
    """1 on the share rho of the step's tokens of highest h + d - h d, else 0; h student entropy, d divergence.

    Both are brought to [0, 1] by the least and greatest of the step. d is KL(student || teacher) on the student's
    `top_k` most probable tokens and one for the rest; with `top_k` 0 it is |A| of the sampled token. Tokens that tie
    with the last one kept are kept too, so the order of responses does not matter.
    """

    rho: float = 0.5
    top_k: int = 16

    def __post_init__(self) -> None:
        _check("rho", self.rho, 0, 1)
        _check("top_k", self.top_k, 0)

    @property
    def needs(self) -> Settings:
        top = {"rollout.top_k": self.top_k, "score.student_top_k": True} if self.top_k else {}
        return {"rollout.entropy": True, **top}

    def weigh_step(self, step: Sequence[ResponseTokens]) -> list[Floats]:
        entropy_N = _unit_range(np.concatenate([np.zeros(0), *(tokens.column("student_entropy") for tokens in step)]))
        divergence_N = _unit_range(np.concatenate([np.zeros(0), *map(self._divergence, step)]))
        score_N = 1 - (1 - entropy_N) * (1 - divergence_N)  # h + d - h d, and exactly 1 where one of them is
        kept = _num_tokens(self.rho, len(score_N))
        least = np.partition(score_N, -kept)[-kept] if kept else np.inf
        return _split((score_N >= least).astype(np.float64), step)

    def _divergence(self, tokens: ResponseTokens) -> Floats:
        if not self.top_k:
            return np.abs(tokens.advantage_T)
        student_TK = _with_rest(tokens.column("student_top_logp")[:, : self.top_k])
        teacher_TK = _with_rest(tokens.column("teacher_logp_of_student_top")[:, : self.top_k])
        return np.maximum((np.exp(student_TK) * (student_TK - teacher_TK)).sum(-1), 0.0)


@WEIGHTS.register("fire", "FiRe-OPD, arXiv 2606.02684")
@dataclass(frozen=True)
class Fire(Weight):
    """(1 + alpha (1 - H_T/max H_T)) (1 + beta H_S/max H_S), and 0 on the responses that the teacher finds least likely.

    H_T, H_S: the teacher's and the student's entropy. Left out are responses whose mean log p_teacher is below the
    step's `percentile`. The maxima are the step's; so is the mean of 1 that the weights of the rest are brought to.
    """

    alpha: float = 1.0
    beta: float = 1.0
    percentile: float = 20.0

    def __post_init__(self) -> None:
        _check("alpha", self.alpha, 0)
        _check("beta", self.beta, 0)
        _check("percentile", self.percentile, 0, 100)

    @property
    def needs(self) -> Settings:
        return {"rollout.entropy": True, "score.entropy": True}

    def weigh_step(self, step: Sequence[ResponseTokens]) -> list[Floats]:
        likelihood_R = sorted(tokens.teacher_logp_T.mean() for tokens in step if len(tokens))
        # The first value that the percentile, by linear interpolation, is not above.
        least = likelihood_R[_num_tokens(self.percentile / 100, len(likelihood_R) - 1)] if likelihood_R else -math.inf
        kept = [len(tokens) > 0 and tokens.teacher_logp_T.mean() >= least for tokens in step]
        teacher_max, student_max = (
            max((tokens.column(column).max(initial=0.0) for tokens in step), default=0.0) or 1.0
            for column in ("teacher_entropy", "student_entropy")
        )
        raw = [
            (1 + self.alpha * (1 - tokens.column("teacher_entropy") / teacher_max))
            * (1 + self.beta * tokens.column("student_entropy") / student_max)
            * keep
            for tokens, keep in zip(step, kept, strict=True)
        ]
        tokens_kept = sum(len(tokens) for tokens, keep in zip(step, kept, strict=True) if keep)
        mean = sum(weight_T.sum() for weight_T in raw) / max(tokens_kept, 1)
        return [weight_T / (mean or 1.0) for weight_T in raw]


def _unit_range(value_N: Floats) -> Floats:
    """Bring values to [0, 1] by their least and greatest; all alike give 0."""
    if not len(value_N) or value_N.min() == value_N.max():
        return np.zeros(len(value_N))
    value_N = value_N / np.abs(value_N).max()  # the difference of two huge numbers of different sign would overflow
    return (value_N - value_N.min()) / (value_N.max() - value_N.min())


def _split(value_N: Floats, step: Sequence[ResponseTokens]) -> list[Floats]:
    """Cut the step's values back into one array a response."""
    return np.split(value_N, np.cumsum([len(tokens) for tokens in step])[:-1]) if step else []


def _with_rest(logp_TK: Floats) -> Floats:
    """Append the log-prob of all tokens that are not among the K, at least 1e-6 so that rounding cannot make it 0."""
    logp_TK = logp_TK.astype(np.float64)
    rest_T = np.maximum(1.0 - np.exp(logp_TK).sum(-1), 1e-6)
    return np.concatenate([logp_TK, np.log(rest_T)[:, None]], axis=-1)
