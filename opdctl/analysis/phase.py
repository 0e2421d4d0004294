"""The numbers of some training steps, and the curves of their quantities by position. Reads and writes no files.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from opdctl.analysis.bootstrap import interval_of_means
from opdctl.analysis.correlations import Correlation, TokenSample
from opdctl.analysis.curves import (
    PositionCurve,
    cumulative_curve,
    curve_by_position,
    curve_by_relative_position,
)
from opdctl.analysis.position_bias import PositionBias, assess_bias, mean_own_fraction, prefix_fraction
from opdctl.analysis.position_quantiles import CohortHistograms
from opdctl.analysis.position_sums import (
    BINS,
    PERCENT,
    Batch,
    BinnedSums,
    LengthCohort,
    PositionStats,
    concatenate,
)
from opdctl.evaluation.statistics import Estimate
from opdctl.losses.token_weights import Floats

MIN_SHOWN_FRACTION = 0.1  # of the responses: positions that fewer reach are not shown
MIN_COHORT_FRACTION = 0.05  # of the responses: cohorts below it are not shown
ALL_RESPONSES, TRUNCATED = "all", "truncated"


@dataclass(frozen=True)
class Phase:
    """A range of training steps and its numbers.

    sample: of its tokens, for correlations. ratios: the distribution of each prefix ratio by position.
    """

    name: str
    numbers: PositionStats
    sample: TokenSample | None = None
    ratios: Mapping[str, CohortHistograms] = field(default_factory=dict)

    def add_tokens(
        self, batch: Batch, token_ids: Sequence[npt.NDArray[np.int32]], weights: Mapping[str, Sequence[Floats]]
    ) -> None:
        """Add the tokens of responses to the sample and to the distributions. token_ids, weights: [T] per response."""
        if self.sample:
            self.sample.add(batch, token_ids)
        for name, histograms in self.ratios.items():
            histograms.add(batch, concatenate(weights[name]))

    # ── The signal ───────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def bias(self) -> PositionBias:
        """The result of the test of position bias."""
        return assess_bias(self.numbers.profile)

    @cached_property
    def correlations(self) -> list[Correlation]:
        """The rank correlations of |A| with properties of the tokens."""
        return self.sample.correlations() if self.sample else []

    def prefix_fraction(self) -> Estimate:
        """Return the fraction of the signal in the first 30% of the responses."""
        return prefix_fraction(signal_by_percent(self.numbers))

    def cumulative_signal(self) -> list[Estimate]:
        """Return the fraction of the signal in the first 0%, 1%, …, 100% of the responses."""
        signal_GQ = signal_by_percent(self.numbers)
        return [Estimate(0.0, 0.0, 0.0), *(prefix_fraction(signal_GQ, percent + 1) for percent in range(PERCENT))]

    # ── Curves ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def cohorts(self) -> Mapping[str, tuple[LengthCohort, ...]]:
        """The groups of responses that curves can rest on, by label: all, those of similar length, the truncated ones.

        Those with less than a twentieth of the responses are not shown.
        """
        count = self.numbers.count
        members = {ALL_RESPONSES: tuple(sorted(count))}
        for cohort in sorted(count):
            label = TRUNCATED if cohort.is_truncated else _length_range(cohort.octave)
            members[label] = (*members.get(label, ()), cohort)
        if TRUNCATED in members:
            members[TRUNCATED] = members.pop(TRUNCATED)  # the last one
        least = max(2.0, MIN_COHORT_FRACTION * self.numbers.responses)
        sizes = {label: sum(count[each] for each in cohorts) for label, cohorts in members.items()}
        return {label: cohorts for label, cohorts in members.items() if label == ALL_RESPONSES or sizes[label] >= least}

    @cached_property
    def _sums(self) -> dict[tuple[LengthCohort, ...], BinnedSums]:
        return {}

    def sums_of(self, cohorts: tuple[LengthCohort, ...]) -> BinnedSums:
        """Return the sums by position over some cohorts."""
        if cohorts not in self._sums:
            self._sums[cohorts] = self.numbers.by_position(cohorts)
        return self._sums[cohorts]

    def shown_bins(self, label: str = ALL_RESPONSES) -> int:
        """Return the number of bins of the position that a curve over some responses shows.

        Over all responses, those that a tenth of the responses and at least two reach: others are too noisy. Over a
        cohort, those that all of its responses reach, so that the mean at each position is over the same responses.
        """
        cohorts = self.cohorts[label]
        sums = self.sums_of(cohorts)
        if label == ALL_RESPONSES:
            return int(np.count_nonzero(sums.responses_L >= max(2.0, MIN_SHOWN_FRACTION * self.numbers.responses)))
        shortest = min(self.numbers.shortest[cohort] for cohort in cohorts)
        return sums.bins_up_to(shortest)

    def by_position(self, name: str, label: str = ALL_RESPONSES) -> PositionCurve:
        """Return the mean of a quantity by token position over all responses, or over a cohort, where it is shown."""
        curve = curve_by_position(self.sums_of(self.cohorts[label]), name)
        return curve.select(slice(self.shown_bins(label)))

    def by_relative_position(self, name: str) -> PositionCurve:
        """Return the mean of a quantity by position relative to the length, in percent: over all responses in each
        bin."""
        return curve_by_relative_position(self.numbers.relative, name)

    def cumulative_logp(self, model: str) -> PositionCurve:
        """Return the log-prob of a prefix under `student` or `teacher`, in nats: the sum of the mean log-probs of the
        tokens at its positions."""
        curve = cumulative_curve(self.sums_of(self.cohorts[ALL_RESPONSES]), f"{model}_logp")
        return curve.select(slice(self.shown_bins()))

    @cached_property
    def common_length(self) -> int:
        """The greatest power of two of tokens that at least half of the responses have; 0 if no response has a
        token."""
        count = self.numbers.count
        octaves = sorted({cohort.octave for cohort in count}, reverse=True)
        reach = {octave: sum(n for cohort, n in count.items() if cohort.octave >= octave) for octave in octaves}
        return next((2**octave for octave in octaves if 2 * reach[octave] >= sum(count.values())), 0)

    def long_cohorts(self) -> tuple[LengthCohort, ...]:
        """Return the cohorts of the responses with at least `common_length` tokens."""
        return tuple(sorted(cohort for cohort in self.numbers.count if 2**cohort.octave >= self.common_length))

    def long_bins(self) -> int:
        """Return the number of bins of the position that all of the long responses have tokens in."""
        return self.sums_of(self.long_cohorts()).bins_up_to(self.common_length)

    def by_position_of_long(self, name: str) -> PositionCurve:
        """Return the mean of a quantity by token position over the responses with at least `common_length` tokens, up
        to there: over the same responses at each position."""
        return curve_by_position(self.sums_of(self.long_cohorts()), name).select(slice(self.long_bins()))

    def omitted_fractions(self) -> tuple[float, float]:
        """Return the fractions of the tokens and of the signal at positions that curves over all responses leave
        out."""
        if not self.numbers.tokens:
            return 0.0, 0.0
        sums, shown = self.sums_of(self.cohorts[ALL_RESPONSES]), self.shown_bins()
        tokens_L, signal_L = sums.tokens_L, sums.values["abs_advantage"].sum(0)
        kept_signal = signal_L[:shown].sum() / signal_L.sum() if signal_L.sum() else 1.0
        return float(1 - tokens_L[:shown].sum() / tokens_L.sum()), float(1 - kept_signal)


def _length_range(octave: int) -> str:
    return f"{2**octave}–{2 ** (octave + 1) - 1} tokens" if octave else "1 token"


def is_prefix_ratio(label: str) -> bool:
    """Whether a token weight is the ideal prefix ratio, or a product of it."""
    return label.removeprefix("what if: ").startswith("prefix_ratio")


def signal_by_percent(numbers: PositionStats, name: str = "signal") -> Floats:
    """Return a signal by hundredths of the response, of the groups that have responses, [G, PERCENT]."""
    return numbers.profile.signals[name][numbers.profile.responses_G > 0]


@dataclass(frozen=True)
class StepResult:
    """One training step.

    means: of each quantity over the tokens. prefix_fraction: of the signal, in the first 30% of the responses.
    own_fraction: the mean of the responses' own ones. signal_L: mean |A| by relative position, [BINS].
    """

    step: int
    responses: int
    tokens: int
    means: Mapping[str, Estimate]
    prefix_fraction: Estimate
    own_fraction: Estimate
    signal_L: Floats


def summarize_step(step: int, numbers: PositionStats) -> StepResult:
    """Return the result of a step without its sums by position: those of many steps would not fit in memory."""
    return StepResult(
        step,
        numbers.responses,
        numbers.tokens,
        overall_means(numbers.overall),
        prefix_fraction(signal_by_percent(numbers)),
        mean_own_fraction(numbers.profile),
        numbers.relative.mean("abs_advantage") if numbers.tokens else np.full(BINS, np.nan),
    )


def overall_means(overall: BinnedSums) -> dict[str, Estimate]:
    """Return the mean of each quantity over all tokens, NaN if there are none."""
    if not overall.tokens_GL.any():
        return {name: Estimate(np.nan, np.nan, np.nan) for name in overall.values}
    value_GX = np.concatenate([*overall.values.values()], axis=1)
    tokens_GX = np.repeat(overall.tokens_GL, value_GX.shape[1], axis=1)
    bounds = zip(*interval_of_means(value_GX, tokens_GX), strict=True)
    return {
        name: Estimate(float(overall.mean(name)[0]), float(low), float(high))
        for name, (low, high) in zip(overall.values, bounds, strict=True)
    }
