"""What analyze-position has found of a run, and the tables that say it. Draws nothing, reads nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from opdctl.analysis.position_bias import PositionBias, effective_sample, share
from opdctl.analysis.position_sums import BINS, PERCENT, BinnedSums, PositionStats
from opdctl.analysis.samples import Sample
from opdctl.evaluation.stats import Estimate
from opdctl.losses.token_weights import Floats

Table = dict[str, list[Any]]
"""Columns by name, all of one length."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training and its numbers."""

    name: str
    numbers: PositionStats

    def share(self) -> Estimate:
        """Return the share of the signal in the first 30 % of the responses."""
        return share(signal(self.numbers))

    def spent(self) -> list[Estimate]:
        """Return the share of the signal that the first 0, 1 … 100 % of the responses hold."""
        signal_GQ = signal(self.numbers)
        return [Estimate(0.0, 0.0, 0.0), *(share(signal_GQ, percent + 1) for percent in range(PERCENT))]


def signal(numbers: PositionStats, name: str = "signal") -> Floats:
    """Return a signal by hundredths of the response, of the groups that hold responses, [G, PERCENT]."""
    return numbers.shares.signals[name][numbers.shares.responses_G > 0]


@dataclass(frozen=True)
class Step:
    """One step of training: the means over its tokens, the share of its signal in the first 30 %, and its mean |A| by
    the relative position, [BINS]."""

    step: int
    responses: int
    tokens: int
    means: Mapping[str, Estimate]
    share: Estimate
    signal_P: Floats


def step_of(number: int, numbers: PositionStats) -> Step:
    """Return what is kept of a step: a run has many, and their sums by position would not fit."""
    signal_P = numbers.relative.mean("abs_advantage") if numbers.tokens else np.zeros(0)
    return Step(
        number,
        numbers.responses,
        numbers.tokens,
        means(numbers.whole),
        share(signal(numbers)),
        np.pad(signal_P, (0, BINS - len(signal_P)), constant_values=np.nan),
    )


def means(whole: BinnedSums) -> dict[str, Estimate]:
    """Return the mean of each quantity over all tokens, NaN where there are none."""
    if not len(whole.tokens_P):
        return {name: Estimate(np.nan, np.nan, np.nan) for name in whole.values}
    found = {name: (whole.mean(name)[0], whole.half_width(name)[0]) for name in whole.values}
    return {name: Estimate(float(mean), float(mean - half), float(mean + half)) for name, (mean, half) in found.items()}


@dataclass(frozen=True)
class Analysis:
    """All that was found. phases: the first and the last quarter of the steps, or the only step. weights: the names of
    the token weights, the recipe's own first. left_out: steps that are not wholly scored. continuations:
    the summary of each step that was gone on from. accuracy: by step, where it was measured."""

    run: str
    recipe: str
    weights: Sequence[str]
    whole: Phase
    phases: Sequence[Phase]
    steps: Sequence[Step]
    left_out: Sequence[int]
    verdict: PositionBias
    samples: Sequence[Sample]
    continuations: Sequence[Mapping[str, Any]]
    accuracy: Mapping[str, Any] | None

    def summary(self) -> dict[str, Any]:
        """Return the numbers that fit a screen, as JSON values."""
        return {
            "run": self.run,
            "steps": [step.step for step in self.steps],
            "left_out": list(self.left_out),
            "verdict": self.verdict.as_dict(),
            "phases": [_phase_summary(phase, self.weights[0]) for phase in self.phases],
            "weights": rows(self.weight_table()),
            "continuations": list(self.continuations),
        }

    def tables(self) -> dict[str, Table]:
        """Return every table by its name."""
        found = {
            "position": stacked([self._by_bin(phase, "position") for phase in self.phases]),
            "relative": stacked([self._by_bin(phase, "relative") for phase in self.phases]),
            "spent": stacked([_spent(phase) for phase in (self.whole, *self.phases)]),
            "steps": stacked([_step_row(step) for step in self.steps]),
            "steps_relative": stacked([_signal_by_bin(step) for step in self.steps]),
            "weights": self.weight_table(),
        }
        if self.continuations:
            found["continuations"] = columns([row for each in self.continuations for row in continuation_rows(each)])
        return found

    def weight_table(self) -> Table:
        """Return mean, effective sample size and share of the weighted signal in the first 30 % of each weight."""
        numbers, shares = self.whole.numbers, self.whole.numbers.shares
        used_G = shares.responses_G > 0
        found = means(numbers.whole)
        parts = []
        for name in self.weights:
            sample = effective_sample(shares.tokens_G[used_G], shares.moments[name][used_G])
            first = share(signal(numbers, name))
            row: Table = {"weight": [name], "mean": [found[name].value]}
            row |= _interval("effective_sample", [sample])
            parts.append(row | _interval("share_of_first_30_percent", [first]))
        return stacked(parts)

    def _by_bin(self, phase: Phase, kind: str) -> Table:
        sums: BinnedSums = getattr(phase.numbers, kind)
        size = len(sums.tokens_P)
        where: Table = {"position": list(range(1, size + 1))}
        if kind == "relative":
            where = {"from_percent": [p * PERCENT // BINS for p in range(size)]}
            where["to_percent"] = [percent + PERCENT // BINS for percent in where["from_percent"]]
        table: Table = {"phase": [phase.name] * size, **where}
        table["tokens"] = sums.tokens_P.astype(int).tolist()
        table["responses"] = sums.responses_P.astype(int).tolist()
        for name in sums.values:
            mean_P, half_P = sums.mean(name), sums.half_width(name)
            table |= {
                name: mean_P.tolist(),
                f"{name}_low": (mean_P - half_P).tolist(),
                f"{name}_high": (mean_P + half_P).tolist(),
            }
        return table


def continuation_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracies of one step's continuations: of all prefixes, of those right so far, and of those gone
    wrong."""
    every = [{"step": found["step"], "prefix": "any", **row} for row in found["accuracy"]]
    return every + [{"step": found["step"], **row} for row in found["by_prefix"]]


def _spent(phase: Phase) -> Table:
    spent = phase.spent()
    return {"phase": [phase.name] * len(spent), "percent": list(range(len(spent))), **_interval("spent", spent)}


def _step_row(step: Step) -> Table:
    row: Table = {"step": [step.step], "responses": [step.responses], "tokens": [step.tokens]}
    for name, mean in step.means.items():
        row |= _interval(name, [mean])
    return row | _interval("share_of_first_30_percent", [step.share])


def _signal_by_bin(step: Step) -> Table:
    starts = [number * PERCENT // BINS for number in range(BINS)]
    return {"step": [step.step] * BINS, "from_percent": starts, "abs_advantage": step.signal_P.tolist()}


def _interval(name: str, found: Sequence[Estimate]) -> Table:
    return {
        name: [each.value for each in found],
        f"{name}_low": [each.low for each in found],
        f"{name}_high": [each.high for each in found],
    }


def _phase_summary(phase: Phase, own: str) -> dict[str, Any]:
    """Return the means of a phase; `weight` is that of the recipe's own weight."""
    first = {name: _value(value) for name, value in asdict(phase.share()).items()}
    found = {name: _value(mean.value) for name, mean in means(phase.numbers.whole).items()}
    return {
        "phase": phase.name,
        "responses": phase.numbers.responses,
        "tokens": phase.numbers.tokens,
        **found,
        "weight": found[own],
        "share_of_first_30_percent": first,
    }


def _value(number: float) -> float | None:
    return number if np.isfinite(number) else None


def stacked(tables: Sequence[Table]) -> Table:
    """Put tables of the same columns below one another."""
    return {name: [cell for table in tables for cell in table[name]] for name in tables[0]} if tables else {}


def columns(rows: Sequence[Mapping[str, Any]]) -> Table:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
