"""Token weights by the position in the response, and by the step."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opdctl.losses.checks import check_range
from opdctl.losses.token_weights.base import Floats, ResponseTokens, Weight, num_tokens
from opdctl.registry import WEIGHTS


class PositionWeight(Weight):
    """The base class of these weights."""

    reads_student_logprobs = False


@WEIGHTS.register("linear_decay", "arXiv 2606.22600")
@dataclass(frozen=True)
class LinearDecay(PositionWeight):
    """Falls linearly from 1 + gamma at the first token to 1 at the last."""

    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, ge=0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return 1.0 + self.gamma * (1.0 - _fraction_elapsed(tokens))


@WEIGHTS.register("position_sigmoid", "PW-OPSD, arXiv 2605.21606")
@dataclass(frozen=True)
class PositionSigmoid(PositionWeight):
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
class PrefixOnly(PositionWeight):
    """1 for the first ceil(fraction n) of n tokens, else 0."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, ge=0, le=1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return (np.arange(len(tokens)) < num_tokens(self.fraction, len(tokens))).astype(np.float64)


@WEIGHTS.register("suffix_only", "arXiv 2606.22600")
@dataclass(frozen=True)
class SuffixOnly(PositionWeight):
    """1 for the last ceil(fraction n) of n tokens, else 0."""

    fraction: float = 0.3

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, ge=0, le=1)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        return PrefixOnly(self.fraction)(tokens)[::-1].copy()


@WEIGHTS.register("prefix_boost", "arXiv 2606.22600")
@dataclass(frozen=True)
class PrefixBoost(PositionWeight):
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
class PrefixCurriculum(PositionWeight):
    """prefix_boost (mode "mask": prefix_only) with a fraction that grows from `start` to `end` over `steps` steps.

    The first step has the fraction `start`, the last of the `steps`, and every later one, `end`.
    """

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
        """Return the fraction at a step, counted from 0: `start` at step 0, `end` from step `steps` - 1."""
        progress = min(step / (self.steps - 1), 1.0) if self.steps > 1 else 1.0
        growth = (1 - math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else progress
        return min(max(self.start + (self.end - self.start) * growth, 0.0), 1.0)

    def __call__(self, tokens: ResponseTokens) -> Floats:
        fraction = self.fraction(tokens.step)
        weight: Weight = (
            PrefixOnly(fraction) if self.mode == "mask" else PrefixBoost(fraction, multiplier=self.multiplier)
        )
        return weight(tokens)


def _fraction_elapsed(tokens: ResponseTokens) -> Floats:
    """Return (t - 1) / (n - 1) for each token t of the n tokens of a response: 0 at the first, 1 at the last."""
    return np.arange(len(tokens)) / max(len(tokens) - 1, 1)
