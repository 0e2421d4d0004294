"""Sums by token position that can be added up, so that a run of any size fits in memory. No files, no model, no torch.

A token's quantities are summed by its position, by its relative position, and over all tokens, for each group of
prompts. The tokens of a response and the responses to a prompt are correlated, so the unit of every interval is the
prompt. The sums by position are kept for responses of similar length, so that a curve can rest on the same responses
at each of its positions.

Shape suffixes: see Notation in CONTRIBUTING.md. A segment is the tokens of one response in one bin.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from opdctl.losses.token_weights import Floats, ResponseTokens, top_k_overlap

Ints = npt.NDArray[np.int64]
BINS = 20
"""Bins of the relative position, each a twentieth of the length of the response."""
PERCENT = 100
"""Bins of a signal's profile. A response may have fewer tokens: a token is then divided among several bins."""
PREFIX_PERCENT = 30
"""The first percent of a response that are its prefix."""
GROUPS = 200
"""Groups of prompts, assigned round-robin. A bootstrap resamples groups, so its cost does not grow with the run."""
FIRST_WIDE_POSITION = 32
"""Below this token position a bin is one position. From it on, the positions up to the next power of two have
BINS_PER_OCTAVE bins."""
BINS_PER_OCTAVE = 16
RESERVED_NAMES = (
    *("abs_advantage", "k1", "k3", "student_logp", "teacher_logp"),
    *("student_entropy", "teacher_entropy", "top_k_overlap", "signal", "advantage"),
    *("phase", "cohort", "step", "sample_id", "tokens", "responses", "prompts"),
    *("position", "from_position", "to_position", "from_percent", "to_percent"),
)
"""Names of quantities, signals and columns of tables. A weight of the same name is renamed."""
MAX_LOG_RATIO_K3 = 60.0  # nats: exp of a greater value would dominate the mean of k3


def position_bins(position_N: Ints) -> Ints:
    """Return the bin of each token position, from 0; the first position is 1."""
    octave_N = np.frexp(position_N)[1].astype(np.int64) - 1
    width_N = np.maximum(2**octave_N // BINS_PER_OCTAVE, 1)
    first_octave = FIRST_WIDE_POSITION.bit_length() - 1
    wide_N = FIRST_WIDE_POSITION - 1 + (octave_N - first_octave) * BINS_PER_OCTAVE + position_N // width_N
    return np.where(position_N < FIRST_WIDE_POSITION, position_N - 1, wide_N - BINS_PER_OCTAVE)


def position_bounds(bins: int) -> tuple[Ints, Ints]:
    """Return the first and the last token position, from 1, of the first `bins` bins, [L] each."""
    bin_L = np.arange(bins + 1)
    octave_L, number_L = np.divmod(bin_L - (FIRST_WIDE_POSITION - 1), BINS_PER_OCTAVE)
    width_L = 2 ** np.maximum(octave_L, 0) * (FIRST_WIDE_POSITION // BINS_PER_OCTAVE)
    first_L = np.where(bin_L < FIRST_WIDE_POSITION, bin_L + 1, width_L * (BINS_PER_OCTAVE + number_L))
    return first_L[:-1], first_L[1:] - 1


class LengthCohort(NamedTuple):
    """Responses of 2**octave to 2**(octave + 1) - 1 tokens: those that were truncated, or the others."""

    octave: int
    is_truncated: bool


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

    def cohorts(self) -> list[LengthCohort | None]:
        """Return the cohort of each response, None if it is empty."""
        truncated_R = np.zeros(len(self.responses), np.bool_) if self.truncated_R is None else self.truncated_R
        pairs = zip(self.length_R.tolist(), truncated_R.tolist(), strict=True)
        return [LengthCohort(n.bit_length() - 1, is_truncated) if n else None for n, is_truncated in pairs]

    def total_R(self, value_N: Floats) -> Floats:
        return np.bincount(self.response_N, value_N, minlength=len(self.responses)).astype(np.float64)

    def by_fraction(self, value_N: Floats, bins: int) -> Floats:
        """Return the sum of each response's values in each of `bins` equal parts of its length, [R, bins].

        Token t of n covers the interval from (t - 1)/n to t/n, with its value spread evenly over it. So the first 30%
        of a response contain exactly 30% of its tokens, for any length.
        """
        sums_N1 = np.concatenate([np.zeros(1), np.cumsum(value_N)])
        edge_RQ = self.start_R[:, None] + self.length_R[:, None] * np.linspace(0, 1, bins + 1)
        token_RQ = edge_RQ.astype(np.int64)
        at_RQ = sums_N1[token_RQ] + (edge_RQ - token_RQ) * np.append(value_N, 0.0)[token_RQ]
        return np.diff(at_RQ, axis=1)


def concatenate(arrays: Sequence[Floats]) -> Floats:
    """Return the arrays as one float array, empty for no arrays."""
    return np.concatenate([np.zeros(0), *arrays])


def token_quantities(batch: Batch) -> Iterator[tuple[str, Floats]]:
    """Yield the name and the values, [N], of each stored quantity: one at a time, since each is as large as the batch.

    abs_advantage: |A|, the signal. k1 and k3: estimates of the reverse KL from the sampled token, -log(T/S) and
    T/S - 1 - log(T/S) (Schulman 2020). *_logp: the log-prob of the token. *_entropy. All these in nats. top_k_overlap:
    see `token_weights.top_k_overlap`.
    """
    student_N = concatenate([tokens.student_logp_T for tokens in batch.responses])
    teacher_N = concatenate([tokens.teacher_logp_T for tokens in batch.responses])
    log_ratio_N = teacher_N - student_N
    yield "abs_advantage", np.abs(batch.advantage_N)
    yield "k1", -log_ratio_N
    yield "k3", np.expm1(np.minimum(log_ratio_N, MAX_LOG_RATIO_K3)) - log_ratio_N
    yield "student_logp", student_N
    yield "teacher_logp", teacher_N
    for name, column in (("student_entropy", "student_entropies"), ("teacher_entropy", "teacher_entropies")):
        if all(column in tokens.columns for tokens in batch.responses):
            yield name, concatenate([tokens.columns[column] for tokens in batch.responses])
    if all({"student_top_ids", "teacher_top_ids"} <= tokens.columns.keys() for tokens in batch.responses):
        yield "top_k_overlap", concatenate([top_k_overlap(tokens) for tokens in batch.responses])


@dataclass
class BinnedSums:
    """Sums by bin and by group of prompts, for the mean of each quantity in a bin and its interval.

    responses_L: the responses with a token in the bin. tokens_GL: their tokens in it, in fractions where a bin cuts a
    token. longest: the greatest length of a response, in tokens, of sums by token position.
    """

    responses_L: Floats = field(default_factory=lambda: np.zeros(0))
    tokens_GL: Floats = field(default_factory=lambda: np.zeros((GROUPS, 0)))
    longest: int = 0
    values: dict[str, Floats] = field(default_factory=dict)
    """The sum of each quantity, [G, L], by name."""

    def merge(self, other: "BinnedSums") -> None:
        """Add sums. The other's arrays may become those of this object."""
        self.longest = max(self.longest, other.longest)
        self.responses_L = _add_padded(self.responses_L, other.responses_L)
        self.tokens_GL = _add_padded(self.tokens_GL, other.tokens_GL)
        for name, value_GL in other.values.items():
            self.values[name] = _add_padded(self.values[name], value_GL) if name in self.values else value_GL.copy()

    @property
    def tokens_L(self) -> Floats:
        """The tokens in each bin."""
        return self.tokens_GL.sum(0)

    @property
    def prompts_L(self) -> Ints:
        """The prompts, or groups of prompts, that have a token in each bin."""
        return np.count_nonzero(self.tokens_GL, axis=0).astype(np.int64)

    def position_bounds(self) -> tuple[Ints, Ints]:
        """Return the first and the last token position of each bin, [L] each. No bin ends after the longest
        response."""
        first_L, last_L = position_bounds(len(self.responses_L))
        return first_L, np.minimum(last_L, self.longest)

    def bins_up_to(self, length: int) -> int:
        """Return the number of bins that end at this length or before it."""
        first_L, last_L = self.position_bounds()
        return int(np.count_nonzero((first_L <= last_L) & (last_L <= length)))

    def mean(self, name: str) -> Floats:
        """Return the mean of a quantity over the tokens in each bin, [L]; NaN in an empty bin."""
        with np.errstate(invalid="ignore"):
            return self.values[name].sum(0) / self.tokens_L


def _add_padded(a: Floats, b: Floats) -> Floats:
    """Add two arrays, in place if `a` is the longer one; the other one is padded with zeros at the end of the last
    axis."""
    if a.shape[-1] < b.shape[-1]:
        a, b = b.copy(), a
    a[..., : b.shape[-1]] += b
    return a


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
        self.signals[name] = _sum_by_group(batch.by_fraction(value_N, PERCENT), batch)

    def add_prefixes(self, value_N: Floats, batch: Batch) -> None:
        """Add the fractions of the signal in the first 30% of the responses."""
        value_RQ = batch.by_fraction(value_N, PERCENT)
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
    """The sums of some responses: over all tokens, by relative position, by position, and the profile of the signal.

    position: by cohort. count, shortest: the number of responses of each cohort, and the tokens of its shortest one.
    """

    responses: int = 0
    overall: BinnedSums = field(default_factory=BinnedSums)
    relative: BinnedSums = field(default_factory=BinnedSums)
    position: dict[LengthCohort, BinnedSums] = field(default_factory=dict)
    count: dict[LengthCohort, int] = field(default_factory=dict)
    shortest: dict[LengthCohort, int] = field(default_factory=dict)
    profile: SignalProfile = field(default_factory=SignalProfile)

    @classmethod
    def of(cls, batch: Batch, weights: Mapping[str, Sequence[Floats]]) -> "PositionStats":
        """Return the sums of a batch. weights: by name, [T] for each of its responses."""
        stats, segments = cls(len(batch.responses)), _PositionSegments(batch)
        stats._count_responses(batch)
        ones_N, nonempty_R = np.ones(len(batch.position_N)), batch.length_R > 0
        stats.overall.responses_L = np.array([nonempty_R.sum()], np.float64)
        stats.relative.responses_L = np.full(BINS, nonempty_R.sum(), np.float64)
        stats.overall.tokens_GL = _sum_by_group(batch.length_R[:, None].astype(np.float64), batch)
        stats.relative.tokens_GL = np.repeat(stats.overall.tokens_GL / BINS, BINS, axis=1)
        for cohort, tokens_GL in segments.sum(ones_N).items():
            stats.position[cohort] = BinnedSums(segments.responses_L(cohort), tokens_GL, segments.longest(cohort))
        for name, value_N in token_quantities(batch):
            stats._add(name, value_N, batch, segments)
        stats.profile.count(batch)
        stats.profile.add("signal", np.abs(batch.advantage_N), batch)
        stats.profile.add_prefixes(np.abs(batch.advantage_N), batch)
        for name, weight_RT in weights.items():
            weight_N = concatenate(weight_RT)
            stats._add(name, weight_N, batch, segments)
            stats.profile.add_weight(name, weight_N, batch)
        return stats

    def _count_responses(self, batch: Batch) -> None:
        for cohort, length in zip(batch.cohorts(), batch.length_R.tolist(), strict=True):
            if cohort:
                self.count[cohort] = self.count.get(cohort, 0) + 1
                self.shortest[cohort] = min(self.shortest.get(cohort, length), length)

    def _add(self, name: str, value_N: Floats, batch: Batch, segments: "_PositionSegments") -> None:
        self.overall.values[name] = _sum_by_group(batch.total_R(value_N)[:, None], batch)
        self.relative.values[name] = _sum_by_group(batch.by_fraction(value_N, BINS), batch)
        for cohort, value_GL in segments.sum(value_N).items():
            self.position[cohort].values[name] = value_GL

    def merge(self, other: "PositionStats", *, positions: bool = True) -> None:
        """Add sums. positions: also those by position, which take up most of the memory."""
        self.responses += other.responses
        for kind in ("overall", "relative", "profile"):
            getattr(self, kind).merge(getattr(other, kind))
        for cohort in other.count:
            self.count[cohort] = self.count.get(cohort, 0) + other.count[cohort]
            self.shortest[cohort] = min(self.shortest.get(cohort, other.shortest[cohort]), other.shortest[cohort])
            if positions:
                self.position.setdefault(cohort, BinnedSums()).merge(other.position[cohort])

    def by_position(self, cohorts: Collection[LengthCohort] | None = None) -> BinnedSums:
        """Return the sums by position over some cohorts, all by default."""
        total = BinnedSums()
        for cohort in self.position if cohorts is None else cohorts:
            total.merge(self.position[cohort])
        return total

    @property
    def tokens(self) -> int:
        return round(self.overall.tokens_GL.sum())


class _PositionSegments:
    """The tokens of a batch by response and bin of the position, to sum quantities by cohort, group and bin."""

    def __init__(self, batch: Batch):
        bin_N = position_bins(batch.position_N + 1)
        is_start_N = np.diff(bin_N, prepend=-1) != 0
        is_start_N[batch.start_R[batch.length_R > 0]] = True
        self._start_M = np.flatnonzero(is_start_N)
        response_M = batch.response_N[self._start_M]
        cohorts = batch.cohorts()
        self._cohorts = sorted({cohort for cohort in cohorts if cohort})
        number = {cohort: index for index, cohort in enumerate(self._cohorts)}
        self._length_R = batch.length_R
        self._cohort_R = np.array([number.get(cohort, -1) if cohort else -1 for cohort in cohorts], np.int64)
        self._bins = int(bin_N.max(initial=-1)) + 1
        self._bin_M, self._cohort_M = bin_N[self._start_M], self._cohort_R[response_M]
        self._index_M = (self._cohort_M * GROUPS + batch.group_R[response_M]) * self._bins + self._bin_M

    def sum(self, value_N: Floats) -> dict[LengthCohort, Floats]:
        """Return the sums of values, [G, L], by cohort."""
        sum_M = np.add.reduceat(value_N, self._start_M) if len(self._start_M) else np.zeros(0)
        total = np.bincount(self._index_M, sum_M, minlength=len(self._cohorts) * GROUPS * self._bins)
        total_XGL = total.reshape(len(self._cohorts), GROUPS, self._bins).astype(np.float64)
        return {cohort: total_XGL[number, :, : _max_bins(cohort)] for number, cohort in enumerate(self._cohorts)}

    def responses_L(self, cohort: LengthCohort) -> Floats:
        """Return the number of responses of a cohort with a token in each bin, [L]."""
        is_own_M = self._cohort_M == self._cohorts.index(cohort)
        return np.bincount(self._bin_M[is_own_M], minlength=self._bins)[: _max_bins(cohort)].astype(np.float64)

    def longest(self, cohort: LengthCohort) -> int:
        """Return the tokens of the longest response of a cohort."""
        return int(self._length_R[self._cohort_R == self._cohorts.index(cohort)].max())


def _max_bins(cohort: LengthCohort) -> int:
    """Return the number of bins up to the greatest length of a cohort."""
    return int(position_bins(np.array([2 ** (cohort.octave + 1) - 1]))[0]) + 1


def split_by_tokens(responses: Sequence[ResponseTokens], budget: int) -> Iterator[slice]:
    """Yield slices of complete responses. Without its first response, each has fewer than `budget` tokens."""
    ends = np.cumsum([len(tokens) for tokens in responses])
    if len(ends):
        slices = (ends - 1) // budget
        cuts = [0, *(np.flatnonzero(np.diff(slices)) + 1).tolist(), len(ends)]
        yield from (slice(a, b) for a, b in pairwise(cuts))
