"""The result of analyze-position. Reads and writes no files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from opdctl.analysis.phase import Phase, StepResult, is_prefix_ratio, overall_means
from opdctl.analysis.phase_tables import (
    TableColumns,
    cohort_table,
    concat_tables,
    continuation_rows,
    correlation_table,
    cumulative_logp_table,
    cumulative_signal_table,
    estimate_columns,
    position_table,
    ratio_table,
    relative_table,
    sample_table,
    signal_by_bin,
    step_row,
    table_rows,
    to_columns,
    weight_table,
    weights_of_long_table,
)
from opdctl.analysis.position_bias import PositionBias, common_direction, finite_or_none
from opdctl.analysis.samples import Sample
from opdctl.artifacts.manifests import AnalysisRecord, BiasDirection
from opdctl.artifacts.stage_dir import Changes
from opdctl.artifacts.versions import versioned
from opdctl.evaluation.statistics import Estimate, estimate_ratio


@dataclass(frozen=True)
class TrainedSteps:
    """The steps of a training phase by name, with its token weight, its objective, λ of reward extrapolation, and the
    settings that changed."""

    name: str
    first_step: int
    weight: str
    objective: str
    extrapolation: float
    changes: Changes


@dataclass(frozen=True)
class Analysis:
    """The result of analyze-position.

    training: the training phases, whose recipes differ. weights: the names of the token weights, the run's own first.
    what_if: one among them that the command sets in the recipe. all_steps: the numbers of all steps, without those by
    position. phases: those of the steps that are compared, or of the only step. skipped: steps with incomplete scores.
    continuations: the summary of each step that has them. accuracy: by step, if students were evaluated.
    draw_commands: those that draw and score responses of the final student, if it was to be compared and has none.
    """

    run: str
    recipe: str
    training: Sequence[TrainedSteps]
    weights: Sequence[str]
    what_if: str | None
    all_steps: Phase
    phases: Sequence[Phase]
    steps: Sequence[StepResult]
    skipped: Sequence[int]
    samples: Sequence[Sample]
    continuations: Sequence[Mapping[str, Any]]
    accuracy: Mapping[str, Any] | None
    draw_commands: Sequence[str] = ()

    @property
    def bias(self) -> PositionBias:
        """The result of the test of position bias over all steps."""
        return self.all_steps.bias

    def direction(self) -> BiasDirection:
        """Return the direction of the position bias that all steps and each of the phases have."""
        return common_direction(phase.bias for phase in (self.all_steps, *self.phases))

    def changed_at(self) -> list[int]:
        """Return the first step of each training phase after the first one."""
        return [phase.first_step for phase in self.training[1:]]

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

    def summary(self) -> AnalysisRecord:
        """Return the main numbers as JSON values."""
        summary: AnalysisRecord = finite_or_none(
            {
                **versioned("analysis"),
                "run": self.run,
                "steps": [step.step for step in self.steps],
                "skipped": list(self.skipped),
                "training": [asdict(each) for each in self.training],
                "direction": self.direction(),
                "bias": self.bias.as_dict(),
                "phases": [self._phase_summary(phase) for phase in self.phases],
                "weights": table_rows(self.weight_table()),
                "continuations": list(self.continuations),
                "accuracy": self.accuracy,
            }
        )
        return summary

    def _phase_summary(self, phase: Phase) -> dict[str, Any]:
        """Return the means of a phase; `weight` is the mean of the run's own weight."""
        means = {name: mean.value for name, mean in overall_means(phase.numbers.overall).items()}
        omitted_tokens, omitted_signal = phase.omitted_fractions()
        return {
            "phase": phase.name,
            "responses": phase.numbers.responses,
            "truncated": sum(count for cohort, count in phase.numbers.count.items() if cohort.is_truncated),
            "tokens": phase.numbers.tokens,
            **means,
            "weight": means[self.weights[0]],
            "prefix_fraction": asdict(phase.prefix_fraction()),
            "bias": phase.bias.as_dict(),
            "omitted_tokens": omitted_tokens,
            "omitted_signal": omitted_signal,
        }

    def tables(self) -> dict[str, TableColumns]:
        """Return every table by its name."""
        return self._tables

    @cached_property
    def _tables(self) -> dict[str, TableColumns]:
        phases = [phase for phase in self.phases if phase.numbers.tokens]
        tables = {
            "position": concat_tables([position_table(phase) for phase in phases]),
            "cohorts": concat_tables([cohort_table(phase) for phase in phases if len(phase.cohorts) > 1]),
            "relative": concat_tables([relative_table(phase) for phase in phases]),
            "cumulative_signal": concat_tables(
                [cumulative_signal_table(phase) for phase in (self.all_steps, *self.phases)]
            ),
            "prefix_logp": concat_tables([cumulative_logp_table(phase) for phase in phases]),
            "steps": concat_tables([step_row(step) for step in self.steps])
            | estimate_columns("k1_relative", self.relative_kl()),
            "steps_relative": concat_tables([signal_by_bin(step) for step in self.steps]),
            "weights": self.weight_table(),
            "weights_of_long": concat_tables([weights_of_long_table(phase, self.weights) for phase in phases]),
            "correlations": concat_tables([correlation_table(phase) for phase in self.phases]),
        }
        if ratios := self.prefix_ratios():
            tables["prefix_ratio"] = concat_tables([ratio_table(phase, name) for phase in phases for name in ratios])
        if self.samples:
            tables["one_response"] = sample_table(self.samples[0])
        if self.accuracy:
            tables["accuracy"] = to_columns(self.accuracy["curve"])
        if self.continuations:
            tables["continuations"] = to_columns(
                [row for summary in self.continuations for row in continuation_rows(summary)]
            )
        return tables

    def weight_table(self) -> TableColumns:
        """Return the mean, the effective sample size and the prefix fraction of the weighted signal of each weight.

        Over all steps, and in each phase if there are several."""
        phases = self.phases if len(self.phases) > 1 else ()
        return concat_tables([weight_table(phase, self.weights) for phase in (self.all_steps, *phases)])
