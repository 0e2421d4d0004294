"""Numbers by position, as sums that can be added up: a run of any size in little memory. No files, no model, no torch.

A token's quantities are summed by its position, by its relative position, and over all. The tokens of one response are
correlated, so each interval takes the response as its unit, never the token.

Shapes: R responses, N tokens of all of them, T of one, C cells (the tokens of one response that fall into one bin),
P bins, G groups of responses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats

from opdctl.evaluation.stats import CONFIDENCE_LEVEL
from opdctl.losses.token_weights import Floats, ResponseTokens

Ints = npt.NDArray[np.int64]
BINS = 20
"""Bins of the relative position, each a twentieth of the response's own length."""
PERCENT = 100
"""Cuts of a response for the shares, finer than a short response's tokens: a token may be cut, too."""
GROUPS = 500
"""Groups of responses, dealt out in turn, that a bootstrap resamples in the place of the responses of a large run."""
RESERVED_NAMES = (
    *("abs_advantage", "k1", "k3", "student_prefix_logp", "teacher_prefix_logp"),
    *("student_entropy", "teacher_entropy", "top_k_overlap", "signal", "unspent"),
)
"""Names of quantities and signals, which no weight can have beside them."""
MAX_LOG_RATIO = 60.0  # nats: exp of what is greater would drown everything else in k3


@dataclass(frozen=True)
class Batch:
    """Whole responses, their tokens one after another; `first` is the number of the first response within the run."""

    responses: Sequence[ResponseTokens]
    first: int = 0

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
        return joined([tokens.advantage_T for tokens in self.responses])

    def running(self, value_N: Floats) -> Floats:
        """Return the sums of each response's values up to and with each token."""
        sums_N = np.cumsum(value_N)
        filled = self.length_R > 0
        before_R = np.zeros(len(self.length_R))
        before_R[filled] = sums_N[self.start_R[filled]] - value_N[self.start_R[filled]]
        return sums_N - before_R[self.response_N]

    def total_R(self, value_N: Floats) -> Floats:
        return np.bincount(self.response_N, value_N, minlength=len(self.responses)).astype(np.float64)

    def by_percent(self, value_N: Floats) -> Floats:
        """Return each response's sums of the values in each hundredth of its length, [R, PERCENT].

        Token t of n covers the stretch from (t - 1)/n to t/n, its value spread evenly over it, so a response of any
        length has exactly 30 % of its tokens in its first 30 %.
        """
        sums_N1 = np.concatenate([np.zeros(1), np.cumsum(value_N)])
        edge_R = self.start_R[:, None] + self.length_R[:, None] * np.linspace(0, 1, PERCENT + 1)
        whole_R = edge_R.astype(np.int64)
        at_R = sums_N1[whole_R] + (edge_R - whole_R) * np.append(value_N, 0.0)[whole_R]
        return np.diff(at_R, axis=1)


def joined(arrays: Sequence[Floats]) -> Floats:
    return np.concatenate([np.zeros(0), *arrays])


def quantities(batch: Batch) -> Iterator[tuple[str, Floats]]:
    """Yield (name, value of each token) of all that is stored, one at a time: each is as large as the batch.

    abs_advantage: |A|, the signal, A being what the student learns from. k1 and k3: estimates of the reverse KL of the
    student from its teacher, -log(T/S) and T/S - 1 - log(T/S) of the sampled token (Schulman 2020). *_prefix_logp: the
    log-prob of the response up to and with the token. *_entropy, and top_k_overlap, the share of the student's most
    probable tokens that are among the teacher's. All in nats but the last.
    """
    student_N = joined([tokens.student_logp_T for tokens in batch.responses])
    teacher_N = joined([tokens.teacher_logp_T for tokens in batch.responses])
    gap_N = teacher_N - student_N
    yield "abs_advantage", np.abs(batch.advantage_N)
    yield "k1", -gap_N
    yield "k3", np.expm1(np.minimum(gap_N, MAX_LOG_RATIO)) - gap_N
    yield "student_prefix_logp", batch.running(student_N)
    yield "teacher_prefix_logp", batch.running(teacher_N)
    for name in ("student_entropy", "teacher_entropy"):
        if all(name in tokens.columns for tokens in batch.responses):
            yield name, joined([tokens.columns[name] for tokens in batch.responses])
    if all({"student_top_ids", "teacher_top_ids"} <= tokens.columns.keys() for tokens in batch.responses):
        yield "top_k_overlap", joined([_overlap(tokens) for tokens in batch.responses])


def _overlap(tokens: ResponseTokens) -> Floats:
    student_TK, teacher_TK = tokens.columns["student_top_ids"], tokens.columns["teacher_top_ids"]
    shared_TK = (student_TK[:, :, None] == teacher_TK[:, None, :]).any(-1)
    return shared_TK.mean(-1) if shared_TK.size else np.zeros(len(tokens))


@dataclass(frozen=True)
class Cells:
    """How a batch's tokens fall into bins. The tokens of one response in one bin stand side by side: a cell."""

    start_C: Ints
    bin_C: Ints
    count_C: Ints

    @classmethod
    def of(cls, bin_N: Ints, batch: Batch) -> "Cells":
        new_N = np.diff(bin_N, prepend=-1) != 0
        new_N[batch.start_R[batch.length_R > 0]] = True
        start_C = np.flatnonzero(new_N)
        return cls(start_C, bin_N[start_C], np.diff(start_C, append=len(bin_N)))


def _cells(batch: Batch) -> dict[str, Cells]:
    position_N = batch.position_N
    relative_N = position_N * BINS // batch.length_R[batch.response_N]
    bins = {"whole": np.zeros_like(position_N), "relative": relative_N, "position": position_N}
    return {kind: Cells.of(bin_N, batch) for kind, bin_N in bins.items()}


@dataclass
class BinnedSums:
    """Means bin by bin, and how sure they are.

    A bin's mean is a ratio of two sums over responses: of the values s, and of the counts c, of its tokens there. The
    variance is that of a ratio (Cochran 1977, 6.3): Σ (s - mean c)² / (Σ c)² · r / (r - 1), of r responses.
    """

    tokens_P: Floats = field(default_factory=lambda: np.zeros(0))
    responses_P: Floats = field(default_factory=lambda: np.zeros(0))
    square_count_P: Floats = field(default_factory=lambda: np.zeros(0))
    values: dict[str, Floats] = field(default_factory=dict)
    """By quantity, the sums over responses of s, s² and s c: [3, P]."""

    def count(self, cells: Cells) -> None:
        size = int(cells.bin_C.max(initial=-1)) + 1
        counts_C = (cells.count_C, np.ones_like(cells.count_C), cells.count_C**2)
        self.tokens_P, self.responses_P, self.square_count_P = (
            np.bincount(cells.bin_C, count_C, minlength=size).astype(np.float64) for count_C in counts_C
        )

    def add(self, name: str, value_N: Floats, cells: Cells) -> None:
        """Take down a quantity of the tokens that were counted."""
        sum_C = np.add.reduceat(value_N, cells.start_C) if len(cells.start_C) else np.zeros(0)
        terms = (sum_C, sum_C**2, sum_C * cells.count_C)
        size = len(self.tokens_P)
        self.values[name] = np.stack([np.bincount(cells.bin_C, term, minlength=size) for term in terms])

    def merge(self, other: "BinnedSums") -> None:
        for name in ("tokens_P", "responses_P", "square_count_P"):
            setattr(self, name, _added(getattr(self, name), getattr(other, name)))
        for name, sums in other.values.items():
            self.values[name] = _added(self.values.get(name, np.zeros((3, 0))), sums)

    def mean(self, name: str) -> Floats:
        """Return the mean of a quantity in each bin, NaN in empty ones."""
        with np.errstate(invalid="ignore"):
            return self.values[name][0] / self.tokens_P

    def half_width(self, name: str) -> Floats:
        """Return half of the 95 % interval of the mean in each bin, by Student's t; NaN below two responses."""
        mean_P, n_P = self.mean(name), self.responses_P
        _, square_P, product_P = self.values[name]
        with np.errstate(divide="ignore", invalid="ignore"):
            rest_P = np.maximum(square_P - 2 * mean_P * product_P + mean_P**2 * self.square_count_P, 0)
            error_P = np.sqrt(rest_P * n_P / (n_P - 1)) / self.tokens_P
            return np.where(n_P > 1, stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, np.maximum(n_P - 1, 1)) * error_P, np.nan)


def _added(one: Floats, other: Floats) -> Floats:
    """Add two arrays that may be of different length along their last axis."""
    if one.shape[-1] < other.shape[-1]:
        one, other = other, one
    total = one.copy()
    total[..., : other.shape[-1]] += other
    return total


@dataclass
class SignalShares:
    """How a signal is spread over the response: sums by hundredths of it, by groups of responses."""

    responses_G: Floats = field(default_factory=lambda: np.zeros(GROUPS))
    tokens_G: Floats = field(default_factory=lambda: np.zeros(GROUPS))
    signals: dict[str, Floats] = field(default_factory=dict)
    """[G, PERCENT] by name: `signal`, |A|; `unspent`, (1 - F) |A| with F the share of the response's Σ |A| that earlier
    tokens have spent; and w |A| by the name of each weight w."""
    moments: dict[str, Floats] = field(default_factory=dict)
    """By weight, the sums of w and of w², [G, 2]."""

    def add(self, name: str, value_N: Floats, batch: Batch) -> None:
        self.signals[name] = _in_groups(batch.by_percent(value_N), batch.first)

    def count(self, batch: Batch) -> None:
        own_R2 = np.stack([np.ones(len(batch.responses)), batch.length_R], axis=1)
        self.responses_G, self.tokens_G = _in_groups(own_R2, batch.first).T

    def put_weight(self, name: str, weight_N: Floats, batch: Batch) -> None:
        self.add(name, weight_N * np.abs(batch.advantage_N), batch)
        moments_R2 = np.stack([batch.total_R(weight_N), batch.total_R(weight_N**2)], axis=1)
        self.moments[name] = _in_groups(moments_R2, batch.first)

    def merge(self, other: "SignalShares") -> None:
        self.responses_G, self.tokens_G = self.responses_G + other.responses_G, self.tokens_G + other.tokens_G
        for own, others in ((self.signals, other.signals), (self.moments, other.moments)):
            for name, value in others.items():
                own[name] = own[name] + value if name in own else value


def _in_groups(value_RX: Floats, first: int) -> Floats:
    """Sum the rows by group: response i of the run belongs to group i mod GROUPS."""
    before = first % GROUPS
    after = -(before + len(value_RX)) % GROUPS
    return np.pad(value_RX, ((before, after), (0, 0))).reshape(-1, GROUPS, value_RX.shape[1]).sum(0)


@dataclass
class PositionStats:
    """All that is known of some responses: over all tokens, by twentieths of the response, by position; the shares."""

    responses: int = 0
    whole: BinnedSums = field(default_factory=BinnedSums)
    relative: BinnedSums = field(default_factory=BinnedSums)
    position: BinnedSums = field(default_factory=BinnedSums)
    shares: SignalShares = field(default_factory=SignalShares)

    @classmethod
    def of(cls, batch: Batch, weights: Mapping[str, Sequence[Floats]]) -> "PositionStats":
        """Return the numbers of a batch. weights: by name, those of each of its responses."""
        numbers, cells = cls(len(batch.responses)), _cells(batch)
        for kind, own in cells.items():
            getattr(numbers, kind).count(own)
        for name, value_N in quantities(batch):
            numbers._put(name, value_N, cells)
        shares = numbers.shares
        shares.count(batch)
        signal_N = np.abs(batch.advantage_N)
        shares.add("signal", signal_N, batch)
        shares.add("unspent", _remaining_fraction(signal_N, batch) * signal_N, batch)
        for name, weight_RT in weights.items():
            weight_N = joined(weight_RT)
            numbers._put(name, weight_N, cells)
            shares.put_weight(name, weight_N, batch)
        return numbers

    def _put(self, name: str, value_N: Floats, cells: Mapping[str, Cells]) -> None:
        for kind, own in cells.items():
            getattr(self, kind).add(name, value_N, own)

    def merge(self, other: "PositionStats") -> None:
        self.responses += other.responses
        for kind in ("whole", "relative", "position", "shares"):
            getattr(self, kind).merge(getattr(other, kind))

    @property
    def tokens(self) -> int:
        return int(self.whole.tokens_P.sum())


def _remaining_fraction(signal_N: Floats, batch: Batch) -> Floats:
    """Return 1 - F: the share of the response's signal that has not been spent before each token."""
    total_N = batch.total_R(signal_N)[batch.response_N]
    before_N = batch.running(signal_N) - signal_N
    return 1 - np.divide(before_N, total_N, out=np.zeros_like(total_N), where=total_N > 0)


def chunks(responses: Sequence[ResponseTokens], budget: int) -> Iterator[slice]:
    """Yield slices of whole responses, each of less than `budget` tokens besides its first response."""
    ends = np.cumsum([len(tokens) for tokens in responses])
    if len(ends):
        numbers = (ends - 1) // budget
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(ends)]
        yield from (slice(a, b) for a, b in pairwise(cuts))
