"""The results of analyze-position and their tables. Reads and writes no files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from opdctl.analysis.correlations import Correlation, TokenSample
from opdctl.analysis.curves import PositionCurve
from opdctl.analysis.position_bias import PositionBias, effective_sample_size, prefix_fraction
from opdctl.analysis.position_quantiles import PositionHistogram
from opdctl.analysis.position_sums import BINS, PERCENT, Batch, BinnedSums, Ints, PositionStats, concatenate
from opdctl.analysis.samples import Sample
from opdctl.evaluation.statistics import Estimate, estimate_ratio
from opdctl.losses.token_weights import Floats

TableColumns = dict[str, list[Any]]
"""A table: columns of equal length by name."""
RATIO_QUANTILES = {"median": 0.5, "low": 0.1, "high": 0.9}
"""The quantiles of a prefix ratio over the responses at a position, by column."""


@dataclass(frozen=True)
class Phase:
    """A range of training steps and its numbers.

    sample: of its tokens, for correlations. ratios: the distribution of each prefix ratio by position.
    """

    name: str
    numbers: PositionStats
    sample: TokenSample | None = None
    ratios: Mapping[str, PositionHistogram] = field(default_factory=dict)

    def add_tokens(
        self, batch: Batch, token_ids: Sequence[npt.NDArray[np.int32]], weights: Mapping[str, Sequence[Floats]]
    ) -> None:
        """Add the tokens of responses to the sample and to the distributions. token_ids, weights: [T] per response."""
        if self.sample:
            self.sample.add(batch, token_ids)
        for name, histogram in self.ratios.items():
            histogram.add(batch, concatenate(weights[name]))

    @cached_property
    def correlations(self) -> list[Correlation]:
        """The rank correlations of |A| with properties of the tokens."""
        return self.sample.correlations() if self.sample else []

    def shown_positions(self) -> Ints:
        """Return the token positions, from 0, that a tenth of the responses and at least two reach: others are too
        noisy."""
        return np.flatnonzero(self.numbers.position.responses_L >= max(2, self.numbers.responses // 10))

    def by_position(self, name: str) -> PositionCurve:
        """Return the mean of a quantity by token position, where enough responses reach it."""
        sums, shown_L = self.numbers.position, self.shown_positions()
        position_L = np.arange(1, len(sums.tokens_L) + 1, dtype=np.float64)
        return _mean_curve(sums, name, position_L, position_L).select(shown_L)

    def by_relative_position(self, name: str) -> PositionCurve:
        """Return the mean of a quantity by position relative to the length, in percent."""
        sums = self.numbers.relative
        edge_L = np.arange(len(sums.tokens_L) + 1, dtype=np.float64) * (PERCENT / BINS)
        return _mean_curve(sums, name, edge_L[:-1], edge_L[1:])

    def omitted_fractions(self) -> tuple[float, float]:
        """Return the fractions of the tokens and of the signal at positions that are not shown."""
        sums, shown = self.numbers.position, self.shown_positions()
        if not self.numbers.tokens:
            return 0.0, 0.0
        tokens_L, signal_L = sums.tokens_L, sums.values["abs_advantage"][0]
        kept_signal = signal_L[shown].sum() / signal_L.sum() if signal_L.sum() else 1.0
        return float(1 - tokens_L[shown].sum() / tokens_L.sum()), float(1 - kept_signal)

    def prefix_fraction(self) -> Estimate:
        """Return the fraction of the signal in the first 30% of the responses."""
        return prefix_fraction(signal_by_percent(self.numbers))

    def cumulative_signal(self) -> list[Estimate]:
        """Return the fraction of the signal in the first 0%, 1%, …, 100% of the responses."""
        signal_GQ = signal_by_percent(self.numbers)
        return [Estimate(0.0, 0.0, 0.0), *(prefix_fraction(signal_GQ, percent + 1) for percent in range(PERCENT))]


def _mean_curve(sums: BinnedSums, name: str, first_L: Floats, last_L: Floats) -> PositionCurve:
    mean_L, half_L = sums.mean(name), sums.half_width(name)
    return PositionCurve(first_L, last_L, mean_L, mean_L - half_L, mean_L + half_L, sums.responses_L)


def is_prefix_ratio(label: str) -> bool:
    """Whether a token weight is the ideal prefix ratio, or a product of it."""
    return label.startswith("prefix_ratio")


def ratio_table(phase: Phase, name: str) -> TableColumns:
    """Return the distribution of a prefix ratio over the responses at each position that is shown.

    effective_sample_size: (Σ r)² / (n Σ r²) over the n responses that reach the position.
    """
    positions, sums, histogram = phase.shown_positions(), phase.numbers.position, phase.ratios[name]
    responses_L, (total_L, square_L, _) = sums.responses_L[positions], sums.values[name][:, positions]
    size_L = np.divide(total_L**2, responses_L * square_L, out=np.zeros(len(total_L)), where=square_L > 0)
    table: TableColumns = {"phase": [phase.name] * len(positions), "weight": [name] * len(positions)}
    table |= {"position": (positions + 1).tolist(), "responses": responses_L.astype(int).tolist()}
    for column, fraction in RATIO_QUANTILES.items():
        table[column] = histogram.quantile(fraction)[positions].tolist()
    return table | {"effective_sample_size": size_L.tolist()}


def signal_by_percent(numbers: PositionStats, name: str = "signal") -> Floats:
    """Return a signal by hundredths of the response, of the groups that have responses, [G, PERCENT]."""
    return numbers.profile.signals[name][numbers.profile.responses_G > 0]


@dataclass(frozen=True)
class StepResult:
    """One training step.

    means: of each quantity over the tokens. prefix_fraction: of the signal, in the first 30% of the responses.
    signal_L: mean |A| by relative position, [BINS].
    """

    step: int
    responses: int
    tokens: int
    means: Mapping[str, Estimate]
    prefix_fraction: Estimate
    signal_L: Floats


def summarize_step(step: int, numbers: PositionStats) -> StepResult:
    """Return the result of a step without its sums by position: those of many steps would not fit in memory."""
    signal_L = numbers.relative.mean("abs_advantage") if numbers.tokens else np.zeros(0)
    return StepResult(
        step,
        numbers.responses,
        numbers.tokens,
        overall_means(numbers.overall),
        prefix_fraction(signal_by_percent(numbers)),
        np.pad(signal_L, (0, BINS - len(signal_L)), constant_values=np.nan),
    )


def overall_means(overall: BinnedSums) -> dict[str, Estimate]:
    """Return the mean of each quantity over all tokens, NaN if there are none."""
    if not len(overall.tokens_L):
        return {name: Estimate(np.nan, np.nan, np.nan) for name in overall.values}
    means = {name: (overall.mean(name)[0], overall.half_width(name)[0]) for name in overall.values}
    return {name: Estimate(float(mean), float(mean - half), float(mean + half)) for name, (mean, half) in means.items()}


CONTINUATION_COLUMNS = (
    *("step", "prefix", "model", "percent", "tokens", "responses", "problems"),
    *("accuracy", "low", "high", "truncated_fraction"),
)


@dataclass(frozen=True)
class Analysis:
    """The result of analyze-position.

    weights: the names of the token weights, the recipe's first. all_steps: the numbers of all steps. phases: those of
    the steps that are compared, or of the only step. skipped: steps with incomplete scores. continuations: the summary
    of each step that has them. accuracy: by step, if students were evaluated. draw_commands: those that draw and score
    responses of the final student, if it was to be compared and has none.
    """

    run: str
    recipe: str
    weights: Sequence[str]
    all_steps: Phase
    phases: Sequence[Phase]
    steps: Sequence[StepResult]
    skipped: Sequence[int]
    bias: PositionBias
    samples: Sequence[Sample]
    continuations: Sequence[Mapping[str, Any]]
    accuracy: Mapping[str, Any] | None
    draw_commands: Sequence[str] = ()

    def relative_kl(self) -> list[Estimate]:
        """Return the reverse KL (k1) of each step as a multiple of that of the first step."""
        first, *others = (step.means["k1"] for step in self.steps)
        one = Estimate(1.0, 1.0, 1.0) if first.value else estimate_ratio(first, first)
        return [one, *(estimate_ratio(k1, first) for k1 in others)]

    def prefix_ratios(self) -> list[str]:
        """Return the names of the weights that are prefix ratios."""
        return [name for name in self.weights if is_prefix_ratio(name)]

    def has_correlations(self) -> bool:
        """Whether |A| and at least one property of the tokens are not constant."""
        return any(np.isfinite(each.raw.value) for phase in self.phases for each in phase.correlations)

    def summary(self) -> dict[str, Any]:
        """Return the main numbers as JSON values."""
        return {
            "run": self.run,
            "steps": [step.step for step in self.steps],
            "skipped": list(self.skipped),
            "bias": self.bias.as_dict(),
            "phases": [_phase_summary(phase, self.weights[0]) for phase in self.phases],
            "weights": table_rows(self.weight_table()),
            "continuations": list(self.continuations),
        }

    def tables(self) -> dict[str, TableColumns]:
        """Return every table by its name."""
        tables = {
            "position": concat_tables([_bin_table(phase, "position") for phase in self.phases]),
            "relative": concat_tables([_bin_table(phase, "relative") for phase in self.phases]),
            "cumulative_signal": concat_tables(
                [_cumulative_signal_table(phase) for phase in (self.all_steps, *self.phases)]
            ),
            "steps": concat_tables([_step_row(step) for step in self.steps])
            | _estimate_columns("k1_relative", self.relative_kl()),
            "steps_relative": concat_tables([_signal_by_bin(step) for step in self.steps]),
            "weights": self.weight_table(),
            "correlations": concat_tables([_correlation_table(phase) for phase in self.phases]),
        }
        if ratios := self.prefix_ratios():
            tables["prefix_ratio"] = concat_tables(
                [ratio_table(phase, name) for phase in self.phases for name in ratios]
            )
        if self.continuations:
            tables["continuations"] = to_columns(
                [row for summary in self.continuations for row in continuation_rows(summary)]
            )
        return tables

    def weight_table(self) -> TableColumns:
        """Return the mean, the effective sample size and the prefix fraction of the weighted signal of each weight."""
        numbers, profile = self.all_steps.numbers, self.all_steps.numbers.profile
        nonempty_G = profile.responses_G > 0
        means = overall_means(numbers.overall)
        tables = []
        for name in self.weights:
            sample_size = effective_sample_size(profile.tokens_G[nonempty_G], profile.moments[name][nonempty_G])
            row: TableColumns = {"weight": [name], "mean": [means[name].value]}
            row |= _estimate_columns("effective_sample_size", [sample_size])
            row |= _estimate_columns("prefix_fraction", [prefix_fraction(signal_by_percent(numbers, name))])
            tables.append(row)
        return concat_tables(tables)


def continuation_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracies of one step's continuations: of any prefix, and of prefixes that are right or wrong.

    A cell is None if it does not apply, or if the summary was written before the column existed.
    """
    rows = [{"prefix": "any", **row} for row in summary["accuracy"]] + summary["by_prefix"]
    return [dict.fromkeys(CONTINUATION_COLUMNS) | {"step": summary["step"], **row} for row in rows]


def _bin_table(phase: Phase, kind: str) -> TableColumns:
    """Return the means by position or by relative position."""
    sums: BinnedSums = getattr(phase.numbers, kind)
    size = len(sums.tokens_L)
    bins: TableColumns = {"position": list(range(1, size + 1))}
    if kind == "relative":
        bins = {"from_percent": [p * PERCENT // BINS for p in range(size)]}
        bins["to_percent"] = [percent + PERCENT // BINS for percent in bins["from_percent"]]
    table: TableColumns = {"phase": [phase.name] * size, **bins}
    table["tokens"] = sums.tokens_L.astype(int).tolist()
    table["responses"] = sums.responses_L.astype(int).tolist()
    for name in sums.values:
        mean_L, half_L = sums.mean(name), sums.half_width(name)
        table |= {
            name: mean_L.tolist(),
            f"{name}_low": (mean_L - half_L).tolist(),
            f"{name}_high": (mean_L + half_L).tolist(),
        }
    return table


def _cumulative_signal_table(phase: Phase) -> TableColumns:
    estimates = phase.cumulative_signal()
    table: TableColumns = {"phase": [phase.name] * len(estimates), "percent": list(range(len(estimates)))}
    return table | _estimate_columns("cumulative_signal", estimates)


def _correlation_table(phase: Phase) -> TableColumns:
    values = phase.correlations
    table: TableColumns = {"phase": [phase.name] * len(values), "property": [each.name for each in values]}
    table |= _estimate_columns("correlation", [each.raw for each in values])
    return table | _estimate_columns("partial_correlation", [each.partial for each in values])


def _step_row(step: StepResult) -> TableColumns:
    row: TableColumns = {"step": [step.step], "responses": [step.responses], "tokens": [step.tokens]}
    for name, mean in step.means.items():
        row |= _estimate_columns(name, [mean])
    return row | _estimate_columns("prefix_fraction", [step.prefix_fraction])


def _signal_by_bin(step: StepResult) -> TableColumns:
    starts = [number * PERCENT // BINS for number in range(BINS)]
    return {"step": [step.step] * BINS, "from_percent": starts, "abs_advantage": step.signal_L.tolist()}


def _estimate_columns(name: str, estimates: Sequence[Estimate]) -> TableColumns:
    return {
        name: [estimate.value for estimate in estimates],
        f"{name}_low": [estimate.low for estimate in estimates],
        f"{name}_high": [estimate.high for estimate in estimates],
    }


def _phase_summary(phase: Phase, recipe_weight: str) -> dict[str, Any]:
    """Return the means of a phase; `weight` is the mean of the recipe's weight."""
    means = {name: _finite_or_none(mean.value) for name, mean in overall_means(phase.numbers.overall).items()}
    return {
        "phase": phase.name,
        "responses": phase.numbers.responses,
        "tokens": phase.numbers.tokens,
        **means,
        "weight": means[recipe_weight],
        "prefix_fraction": {name: _finite_or_none(value) for name, value in asdict(phase.prefix_fraction()).items()},
    }


def _finite_or_none(number: float) -> float | None:
    return number if np.isfinite(number) else None


def concat_tables(tables: Sequence[TableColumns]) -> TableColumns:
    """Concatenate the rows of tables with equal columns."""
    return {name: [cell for table in tables for cell in table[name]] for name in tables[0]} if tables else {}


def to_columns(rows: Sequence[Mapping[str, Any]]) -> TableColumns:
    """Return rows of equal keys as a table."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def table_rows(table: TableColumns) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
