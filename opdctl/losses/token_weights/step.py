"""Token weights relative to all tokens of the step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opdctl.losses.checks import check_range
from opdctl.losses.token_weights.base import MIN_TAIL_PROB, Floats, ResponseTokens, Settings, Weight, num_tokens
from opdctl.registry import WEIGHTS


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

    @property
    def reads_student_logprobs(self) -> bool:
        return not self.top_k

    def weigh_step(self, responses: Sequence[ResponseTokens]) -> list[Floats]:
        entropies = (tokens.column("student_entropies") for tokens in responses)
        entropy_N = _min_max_scale(np.concatenate([np.zeros(0), *entropies]))
        divergence_N = _min_max_scale(np.concatenate([np.zeros(0), *map(self._divergence, responses)]))
        score_N = 1 - (1 - entropy_N) * (1 - divergence_N)  # h + d - h d, and exactly 1 if h or d is 1
        count = num_tokens(self.rho, len(score_N))
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
    reads_student_logprobs = False

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
        threshold = likelihood_R[num_tokens(self.percentile / 100, len(likelihood_R) - 1)]
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
