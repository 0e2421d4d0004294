"""What a token weight is, what it reads, and how weights are built, multiplied and checked.

A weight is a frozen dataclass. `__call__` takes one complete response, never a micro-batch or a packed row: `iw_opd`
needs the sum over the response before it can weight the first token. A weight that ranks or scales tokens within the
step overrides `weigh_step` instead. Training and analysis call `weigh`.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from opdctl.errors import OpdctlError, did_you_mean
from opdctl.registry import WEIGHTS, plugin_errors

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

    advantage_T: log p_teacher - log p_student, also with a reference model: reward extrapolation changes the loss only.
    step: the step of the response. columns: the optional columns as they are stored, by the names in `COLUMN_SETTINGS`;
    `column` converts those that are read.
    """

    student_logp_T: Floats
    teacher_logp_T: Floats
    advantage_T: Floats
    step: int = 0
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.advantage_T)

    def column(self, column: str) -> npt.NDArray[Any]:
        """Return an optional column: [T], or [T, K] for the top-k columns; numbers in float64.

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
        values = self.columns[column]
        return values.astype(np.float64) if values.dtype == np.float32 else values


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

    @property
    def reads_student_logprobs(self) -> bool:
        """Whether the weights depend on the student's log-probs of the sampled tokens; see `weight.logprobs`."""
        return True

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

    @property
    def reads_student_logprobs(self) -> bool:
        return self.first.reads_student_logprobs or self.second.reads_student_logprobs

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
    with plugin_errors(weight):
        weights = weight.weigh_step(responses)
    if len(weights) != len(responses):
        raise OpdctlError(
            "invalid_plugin", f"{weight}: `weigh_step` returned {len(weights)} arrays for {len(responses)} responses"
        )
    for tokens, weight_T in zip(responses, weights, strict=True):
        if not isinstance(weight_T, np.ndarray):
            raise OpdctlError(
                "invalid_plugin", f"{weight}: returned {type(weight_T).__name__} for a response, no array"
            )
        if weight_T.shape != (len(tokens),) or not (np.isfinite(weight_T).all() and (weight_T >= 0).all()):
            raise OpdctlError(
                "invalid_data",
                f"{weight}: the weights of a response of {len(tokens)} tokens have shape {weight_T.shape} and range "
                f"from {weight_T.min(initial=np.inf)} to {weight_T.max(initial=-np.inf)}",
                hint="return one finite weight >= 0 for each token",
            )
    return weights


def num_tokens(fraction: float, length: int) -> int:
    """Return ceil(fraction * length), robust to rounding: 0.07 of 100 tokens is 7, although 0.07 * 100 > 7."""
    return math.ceil(round(fraction * length, 9))


def top_k_overlap(tokens: ResponseTokens, top_k: int | None = None) -> Floats:
    """Return the fraction of the student's `top_k` most probable tokens that are among the teacher's, [T].

    top_k: all stored tokens by default. The ids of a model are distinct, so that one which occurs twice is shared.
    """
    student_TK = tokens.column("student_top_ids")[:, :top_k]
    teacher_TK = tokens.column("teacher_top_ids")[:, :top_k]
    sorted_TK = np.sort(np.concatenate([student_TK, teacher_TK], axis=1), axis=1)
    return (sorted_TK[:, 1:] == sorted_TK[:, :-1]).sum(-1) / max(student_TK.shape[-1], 1)
