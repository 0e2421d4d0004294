"""Sums by token position that can be added up, so that a run of any size fits in memory. No files, no model, no torch.

A token's quantities are summed by its position, by its relative position, and over all tokens. The tokens of a response
are correlated, so the unit of the interval of a mean is the response, not the token. The responses to one prompt are
correlated too, so the unit of everything that is computed from groups is the prompt.

Shape suffixes: see Notation in CONTRIBUTING.md. A segment is the tokens of one response in one bin.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats

from opdctl.evaluation.statistics import CONFIDENCE_LEVEL
from opdctl.losses.token_weights import Floats, ResponseTokens, top_k_overlap

Ints = npt.NDArray[np.int64]
BINS = 20
"""Bins of the relative position, each a twentieth of the length of the response."""
PERCENT = 100
"""Bins of a signal's profile. A response may have fewer tokens: a token is then divided among several bins."""
PREFIX_PERCENT = 30
"""The first percent of a response that are its prefix."""
GROUPS = 500
"""Groups of prompts, assigned round-robin. A bootstrap resamples groups, so its cost does not grow with the run."""
RESERVED_NAMES = (
    *("abs_advantage", "k1", "k3", "student_prefix_logp", "teacher_prefix_logp"),
    *("student_entropy", "teacher_entropy", "top_k_overlap", "signal"),
)
"""Names of quantities and signals. A weight of the same name is renamed."""
MAX_LOG_RATIO_K3 = 60.0  # nats: exp of a greater value would dominate the mean of k3


class PromptGroups:
    """Assigns the prompts of a run to groups: the n-th one, in the order of their first responses, to n mod GROUPS.

    So all responses to a prompt are in one group, those of later steps included.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def assign(self, prompt_ids: Iterable[str]) -> Ints:
        """Return the groups of the next responses of the run, [R]. prompt_ids: the prompt of each."""
        numbers = [self._numbers.setdefault(prompt_id, len(self._numbers)) for prompt_id in prompt_ids]
        return np.array(numbers, np.int64) % GROUPS


@dataclass(frozen=True)
class Batch:
    """Whole responses with their tokens concatenated.

    group_R: the group of each response's prompt. truncated_R: whether it was cut off at the maximum length; None if no
    response was.
    """

    responses: Sequence[ResponseTokens]
    group_R: Ints
    truncated_R: npt.NDArray[np.bool_] | None = None

    @cached_property
    def length_R(self) -> Ints:
        return np.array([len(tokens) for tokens in self.responses], np.int64)

    @cached_property
    def start_R(self) -> Ints:
        return np.cumsum(self.length_R) - self.length_R

    @cached_property
    def response_N(self) -> Ints:
        return np.repeat(np.arange(len(self.responses)), self.length_R)

    @cached_property
    def position_N(self) -> Ints:
        return np.arange(int(self.length_R.sum())) - np.repeat(self.start_R, self.length_R)

    @cached_property
    def advantage_N(self) -> Floats:
        return concatenate([tokens.advantage_T for tokens in self.responses])

    def running_sums(self, value_N: Floats) -> Floats:
        """Return the sum of each response's values up to and including each token, [N]."""
        sums_N = np.cumsum(value_N)
        nonempty_R = self.length_R > 0
        before_R = np.zeros(len(self.length_R))
        before_R[nonempty_R] = sums_N[self.start_R[nonempty_R]] - value_N[self.start_R[nonempty_R]]
        return sums_N - before_R[self.response_N]

    def total_R(self, value_N: Floats) -> Floats:
        return np.bincount(self.response_N, value_N, minlength=len(self.responses)).astype(np.float64)

    def by_percent(self, value_N: Floats) -> Floats:
        """Return the sum of each response's values in each hundredth of its length, [R, PERCENT].

        Token t of n covers the interval from (t - 1)/n to t/n, with its value spread evenly over it. So the first 30%
        of a response contain exactly 30% of its tokens, for any length.
        """
        sums_N1 = np.concatenate([np.zeros(1), np.cumsum(value_N)])
        edge_RQ = self.start_R[:, None] + self.length_R[:, None] * np.linspace(0, 1, PERCENT + 1)
        token_RQ = edge_RQ.astype(np.int64)
        at_RQ = sums_N1[token_RQ] + (edge_RQ - token_RQ) * np.append(value_N, 0.0)[token_RQ]
        return np.diff(at_RQ, axis=1)


def concatenate(arrays: Sequence[Floats]) -> Floats:
    """Return the arrays as one float array, empty for no arrays."""
    return np.concatenate([np.zeros(0), *arrays])


def token_quantities(batch: Batch) -> Iterator[tuple[str, Floats]]:
    """Yield the name and the values, [N], of each stored quantity: one at a time, since each is as large as the batch.

    abs_advantage: |A|, the signal. k1 and k3: estimates of the reverse KL from the sampled token, -log(T/S) and
    T/S - 1 - log(T/S) (Schulman 2020). *_prefix_logp: the log-prob of the response up to and including the token.
    *_entropy. All these in nats. top_k_overlap: see `token_weights.top_k_overlap`.
    """
    student_N = concatenate([tokens.student_logp_T for tokens in batch.responses])
    teacher_N = concatenate([tokens.teacher_logp_T for tokens in batch.responses])
    log_ratio_N = teacher_N - student_N
    yield "abs_advantage", np.abs(batch.advantage_N)
    yield "k1", -log_ratio_N
    yield "k3", np.expm1(np.minimum(log_ratio_N, MAX_LOG_RATIO_K3)) - log_ratio_N
    yield "student_prefix_logp", batch.running_sums(student_N)
    yield "teacher_prefix_logp", batch.running_sums(teacher_N)
    for name, column in (("student_entropy", "student_entropies"), ("teacher_entropy", "teacher_entropies")):
        if all(column in tokens.columns for tokens in batch.responses):
            yield name, concatenate([tokens.columns[column] for tokens in batch.responses])
    if all({"student_top_ids", "teacher_top_ids"} <= tokens.columns.keys() for tokens in batch.responses):
        yield "top_k_overlap", concatenate([top_k_overlap(tokens) for tokens in batch.responses])


@dataclass(frozen=True)
class Segments:
    """The tokens of a batch by bin: a segment is the adjacent tokens of one response in one bin."""

    start_M: Ints
    bin_M: Ints
    count_M: Ints

    @classmethod
    def of(cls, bin_N: Ints, batch: Batch) -> "Segments":
        is_start_N = np.diff(bin_N, prepend=-1) != 0
        is_start_N[batch.start_R[batch.length_R > 0]] = True
        start_M = np.flatnonzero(is_start_N)
        return cls(start_M, bin_N[start_M], np.diff(start_M, append=len(bin_N)))


def _segments(batch: Batch) -> dict[str, Segments]:
    position_N = batch.position_N
    relative_N = position_N * BINS // batch.length_R[batch.response_N]
    bins = {"overall": np.zeros_like(position_N), "relative": relative_N, "position": position_N}
    return {name: Segments.of(bin_N, batch) for name, bin_N in bins.items()}


@dataclass
class BinnedSums:
    """Sums by bin, for the mean of each quantity in a bin and its interval.

    The mean is a ratio of two sums over responses: of the values s and of the counts c of its tokens in the bin. Its
    variance is that of a ratio estimator (Cochran 1977, 6.3): Σ (s - mean c)² / (Σ c)² · r / (r - 1) for r responses.
    """

    tokens_L: Floats = field(default_factory=lambda: np.zeros(0))
    responses_L: Floats = field(default_factory=lambda: np.zeros(0))
    square_count_L: Floats = field(default_factory=lambda: np.zeros(0))
    values: dict[str, Floats] = field(default_factory=dict)
    """By quantity, the sums over responses of s, s² and s c: [3, P]."""

    def count(self, segments: Segments) -> None:
        size = int(segments.bin_M.max(initial=-1)) + 1
        counts_M = (segments.count_M, np.ones_like(segments.count_M), segments.count_M**2)
        self.tokens_L, self.responses_L, self.square_count_L = (
            np.bincount(segments.bin_M, count_M, minlength=size).astype(np.float64) for count_M in counts_M
        )

    def add(self, name: str, value_N: Floats, segments: Segments) -> None:
        """Add a quantity of the tokens that were counted."""
        sum_M = np.add.reduceat(value_N, segments.start_M) if len(segments.start_M) else np.zeros(0)
        terms = (sum_M, sum_M**2, sum_M * segments.count_M)
        size = len(self.tokens_L)
        self.values[name] = np.stack([np.bincount(segments.bin_M, term_M, minlength=size) for term_M in terms])

    def merge(self, other: "BinnedSums") -> None:
        for name in ("tokens_L", "responses_L", "square_count_L"):
            setattr(self, name, _add_padded(getattr(self, name), getattr(other, name)))
        for name, sums in other.values.items():
            self.values[name] = _add_padded(self.values.get(name, np.zeros((3, 0))), sums)

    def mean(self, name: str) -> Floats:
        """Return the mean of a quantity in each bin, [L]; NaN in an empty bin."""
        with np.errstate(invalid="ignore"):
            return self.values[name][0] / self.tokens_L

    def half_width(self, name: str) -> Floats:
        """Return half the width of the 95% interval of each mean, by Student's t, [L]; NaN below two responses.

        It is too narrow if few responses have most of the mean; docs/analysis.md has its coverage.
        """
        mean_L, n_L = self.mean(name), self.responses_L
        _, square_L, product_L = self.values[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            residual_L = np.maximum(square_L - 2 * mean_L * product_L + mean_L**2 * self.square_count_L, 0)
            error_L = np.sqrt(residual_L * n_L / (n_L - 1)) / self.tokens_L
            return np.where(n_L > 1, stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, np.maximum(n_L - 1, 1)) * error_L, np.nan)


def _add_padded(a: Floats, b: Floats) -> Floats:
    """Add two arrays; the shorter one is padded with zeros at the end of the last axis."""
    if a.shape[-1] < b.shape[-1]:
        a, b = b, a
    total = a.copy()
    total[..., : b.shape[-1]] += b
    return total


@dataclass
class SignalProfile:
    """The distribution of signals over the response: sums by hundredths of the response and by groups of prompts."""

    responses_G: Floats = field(default_factory=lambda: np.zeros(GROUPS))
    tokens_G: Floats = field(default_factory=lambda: np.zeros(GROUPS))
    signals: dict[str, Floats] = field(default_factory=dict)
    """[G, PERCENT] by name: |A| as `signal`, and w |A| by the name of each weight w."""
    moments: dict[str, Floats] = field(default_factory=dict)
    """By weight, the sums of w and of w², [G, 2]."""
    prefixes: dict[str, Floats] = field(default_factory=dict)
    """Of `all` responses and of the `complete` ones, which were not truncated, [G, 4]: the signal in the first 30%, the
    signal, the sum of the responses' own fractions in the first 30%, and the number of responses with a signal."""

    def count(self, batch: Batch) -> None:
        counts_R2 = np.stack([np.ones(len(batch.responses)), batch.length_R], axis=1)
        self.responses_G, self.tokens_G = _sum_by_group(counts_R2, batch).T

    def add(self, name: str, value_N: Floats, batch: Batch) -> None:
        self.signals[name] = _sum_by_group(batch.by_percent(value_N), batch)

    def add_prefixes(self, value_N: Floats, batch: Batch) -> None:
        """Add the fractions of the signal in the first 30% of the responses."""
        value_RQ = batch.by_percent(value_N)
        prefix_R, total_R = value_RQ[:, :PREFIX_PERCENT].sum(1), value_RQ.sum(1)
        has_signal_R = total_R > 0
        share_R = np.divide(prefix_R, total_R, out=np.zeros(len(total_R)), where=has_signal_R)
        sums_R4 = np.stack([prefix_R, total_R, share_R, has_signal_R], axis=1)
        is_complete_R = np.ones(len(total_R)) if batch.truncated_R is None else ~batch.truncated_R
        self.prefixes["all"] = _sum_by_group(sums_R4, batch)
        self.prefixes["complete"] = _sum_by_group(sums_R4 * is_complete_R[:, None], batch)

    def add_weight(self, name: str, weight_N: Floats, batch: Batch) -> None:
        self.add(name, weight_N * np.abs(batch.advantage_N), batch)
        moments_R2 = np.stack([batch.total_R(weight_N), batch.total_R(weight_N**2)], axis=1)
        self.moments[name] = _sum_by_group(moments_R2, batch)

    def merge(self, other: "SignalProfile") -> None:
        self.responses_G, self.tokens_G = self.responses_G + other.responses_G, self.tokens_G + other.tokens_G
        pairs = (self.signals, other.signals), (self.moments, other.moments), (self.prefixes, other.prefixes)
        for sums, other_sums in pairs:
            for name, value in other_sums.items():
                sums[name] = sums[name] + value if name in sums else value


def _sum_by_group(value_RX: Floats, batch: Batch) -> Floats:
    """Sum the rows by group, [G, X]."""
    sums_GX = np.zeros((GROUPS, value_RX.shape[1]))
    np.add.at(sums_GX, batch.group_R, value_RX)
    return sums_GX


@dataclass
class PositionStats:
    """The sums of some responses: over all tokens, by relative position, by position, and the profile of the signal."""

    responses: int = 0
    overall: BinnedSums = field(default_factory=BinnedSums)
    relative: BinnedSums = field(default_factory=BinnedSums)
    position: BinnedSums = field(default_factory=BinnedSums)
    profile: SignalProfile = field(default_factory=SignalProfile)

    @classmethod
    def of(cls, batch: Batch, weights: Mapping[str, Sequence[Floats]]) -> "PositionStats":
        """Return the sums of a batch. weights: by name, [T] for each of its responses."""
        sums, segments = cls(len(batch.responses)), _segments(batch)
        for kind, segments_of_kind in segments.items():
            getattr(sums, kind).count(segments_of_kind)
        for name, value_N in token_quantities(batch):
            sums._add(name, value_N, segments)
        sums.profile.count(batch)
        sums.profile.add("signal", np.abs(batch.advantage_N), batch)
        sums.profile.add_prefixes(np.abs(batch.advantage_N), batch)
        for name, weight_RT in weights.items():
            weight_N = concatenate(weight_RT)
            sums._add(name, weight_N, segments)
            sums.profile.add_weight(name, weight_N, batch)
        return sums

    def _add(self, name: str, value_N: Floats, segments: Mapping[str, Segments]) -> None:
        for kind, segments_of_kind in segments.items():
            getattr(self, kind).add(name, value_N, segments_of_kind)

    def merge(self, other: "PositionStats") -> None:
        self.responses += other.responses
        for kind in ("overall", "relative", "position", "profile"):
            getattr(self, kind).merge(getattr(other, kind))

    @property
    def tokens(self) -> int:
        return int(self.overall.tokens_L.sum())


def split_by_tokens(responses: Sequence[ResponseTokens], budget: int) -> Iterator[slice]:
    """Yield slices of complete responses. Without its first response, each has fewer than `budget` tokens."""
    ends = np.cumsum([len(tokens) for tokens in responses])
    if len(ends):
        slices = (ends - 1) // budget
        cuts = [0, *(np.flatnonzero(np.diff(slices)) + 1).tolist(), len(ends)]
        yield from (slice(a, b) for a, b in pairwise(cuts))
