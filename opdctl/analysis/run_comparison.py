"""Several runs beside each other: their signal by position and by step, and the differences to the first run.

The runs share the groups of prompts, so a difference is paired: a bootstrap sample has the same prompts of both runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.analysis import verdict
from opdctl.analysis.analyze import analyze_run
from opdctl.analysis.bootstrap import interval_of_difference
from opdctl.analysis.curves import PositionCurve
from opdctl.analysis.phase import Phase
from opdctl.analysis.phase_tables import TableColumns, concat_tables, estimate_columns, table_rows
from opdctl.analysis.position_sums import BINS, PERCENT, BinnedSums, PromptGroups
from opdctl.analysis.results import Analysis
from opdctl.errors import OpdctlError
from opdctl.evaluation.statistics import Estimate
from opdctl.runs.run import Run

COMPARED_QUANTITIES = ("abs_advantage", "k1")


@dataclass(frozen=True)
class RunComparison:
    """The analyses of two runs or more, by label; the first one is the baseline."""

    analyses: Mapping[str, Analysis]

    def last_phases(self) -> dict[str, Phase]:
        """Return the last compared phase of each run."""
        return {label: analysis.phases[-1] for label, analysis in self.analyses.items()}

    def others(self) -> dict[str, Phase]:
        """Return the last phases of the runs except the first one."""
        return dict(list(self.last_phases().items())[1:])

    def difference(self, label: str, name: str) -> PositionCurve:
        """Return the mean of a quantity by relative position in a run minus that in the first run, last phases."""
        first, other = (self.last_phases()[each].numbers.relative for each in (next(iter(self.analyses)), label))
        edge_L = np.arange(BINS + 1, dtype=np.float64) * (PERCENT / BINS)
        bounds = _bounds_of_difference(first, other, name)
        responses_L = np.minimum(first.responses_L, other.responses_L)
        return PositionCurve(edge_L[:-1], edge_L[1:], other.mean(name) - first.mean(name), *bounds, responses_L)

    def lines(self) -> list[str]:
        """Return each run with its size, how it was trained, and where its signal is, in sentences."""
        return [
            f"{label}: {verdict.overview(analysis)} {verdict.answers(analysis)[0].headline}"
            for label, analysis in self.analyses.items()
        ]

    def difference_sentences(self) -> list[str]:
        """Return whether mean |A| of each other run differs from that of the first one, in sentences."""
        first, rows = next(iter(self.analyses)), table_rows(self.difference_table())
        return [f"{row['run']}: {_describe_difference(row, first)}" for row in rows[1:]]

    def difference_table(self) -> TableColumns:
        """Return the means of the last phases, and their differences to the first run."""
        phases = self.last_phases()
        first = next(iter(phases.values())).numbers.overall
        tables = []
        for label, phase in phases.items():
            sums = phase.numbers.overall
            table: TableColumns = {"run": [label], "phase": [phase.name], "responses": [phase.numbers.responses]}
            for name in COMPARED_QUANTITIES:
                value, difference = float(sums.mean(name)[0]), float(sums.mean(name)[0] - first.mean(name)[0])
                low_L, high_L = _bounds_of_difference(first, sums, name)
                table[name] = [value]
                table |= estimate_columns(
                    f"{name}_difference", [Estimate(difference, float(low_L[0]), float(high_L[0]))]
                )
            tables.append(table | estimate_columns("prefix_fraction", [phase.prefix_fraction()]))
        return concat_tables(tables)


def _describe_difference(row: Mapping[str, Any], first: str) -> str:
    difference = Estimate(*(row[f"abs_advantage_difference{end}"] for end in ("", "_low", "_high")))
    if np.isnan(difference.low):
        relation = "has no interval, since there are too few prompts"
    elif difference.low > 0 or difference.high < 0:
        relation = f"is {'greater' if difference.value > 0 else 'less'} than that of {first}"
    else:
        relation = f"does not differ from that of {first} beyond its interval"
    return f"mean |A| of {row['phase']} {relation}: difference {difference.format('+.3g')} nats per token."


def _bounds_of_difference(first: BinnedSums, other: BinnedSums, name: str) -> tuple[np.ndarray, np.ndarray]:
    return interval_of_difference(first.values[name], first.tokens_GL, other.values[name], other.tokens_GL)


def compare_positions(paths: Sequence[Path]) -> RunComparison | None:
    """Return the comparison of the runs whose scored responses can be read; None if there are fewer than two. Warns of
    the others: their accuracies can be compared all the same."""
    groups, analyses = PromptGroups(), {}
    names = Counter(path.name for path in paths)
    for path in paths:
        try:
            analysis = _analyze(path, groups)
        except OpdctlError as error:
            console.warn(f"{path}: its signal is not compared: {error.message}")
            continue
        analyses[path.name if names[path.name] == 1 else str(path)] = analysis
    return RunComparison(analyses) if len(analyses) > 1 else None


def _analyze(path: Path, groups: PromptGroups) -> Analysis:
    """Return the analysis of a run.

    Raises:
        OpdctlError: no response with a token is scored, or an artifact is corrupt or was made with other settings.
    """
    analysis = analyze_run(Run.load(path), "uniform", groups=groups)
    if not analysis.phases[-1].numbers.tokens:
        raise OpdctlError("missing_input", f"{path}: no response of the last phase has a token")
    return analysis
