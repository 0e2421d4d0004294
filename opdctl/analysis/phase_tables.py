"""The tables of analyze-position, from the numbers of its phases and steps. Reads and writes no files."""

from collections.abc import Mapping, Sequence
from typing import Any

from opdctl.analysis.curves import PositionCurve, curve_by_position
from opdctl.analysis.phase import ALL_RESPONSES, Phase, StepResult, overall_means, signal_by_percent
from opdctl.analysis.position_bias import effective_sample_size, prefix_fraction
from opdctl.analysis.position_sums import BINS, PERCENT, BinnedSums
from opdctl.analysis.samples import Sample
from opdctl.evaluation.statistics import Estimate

TableColumns = dict[str, list[Any]]
"""A table: columns of equal length by name."""
RATIO_QUANTILES = {"median": 0.5, "low": 0.1, "high": 0.9}
"""The quantiles of a prefix ratio over the responses at a position, by column."""
CONTINUATION_COLUMNS = (
    *("step", "prefix", "model", "percent", "tokens", "responses", "problems"),
    *("accuracy", "low", "high", "truncated_fraction"),
)


def position_table(phase: Phase) -> TableColumns:
    """Return the means by token position over all responses that reach it, in all bins."""
    sums = phase.sums_of(phase.cohorts[ALL_RESPONSES])
    curves = {name: curve_by_position(sums, name) for name in sums.values}
    return _bin_columns({"phase": phase.name}, sums, len(sums.responses_L)) | _curve_columns(curves)


def cohort_table(phase: Phase) -> TableColumns:
    """Return the means by token position of each cohort, at the positions that all of its responses reach."""
    tables = []
    for label, cohorts in phase.cohorts.items():
        if label != ALL_RESPONSES:
            sums, shown = phase.sums_of(cohorts), phase.shown_bins(label)
            curves = {name: phase.by_position(name, label) for name in sums.values}
            tables.append(_bin_columns({"phase": phase.name, "cohort": label}, sums, shown) | _curve_columns(curves))
    return concat_tables(tables)


def relative_table(phase: Phase) -> TableColumns:
    """Return the means by position relative to the length."""
    sums = phase.numbers.relative
    starts = [number * PERCENT // BINS for number in range(BINS)] if len(sums.responses_L) else []
    table: TableColumns = {"phase": [phase.name] * len(starts), "from_percent": starts}
    table |= {"to_percent": [start + PERCENT // BINS for start in starts], "tokens": sums.tokens_L.tolist()}
    table["responses"] = sums.responses_L.astype(int).tolist()
    return table | _curve_columns({name: phase.by_relative_position(name) for name in sums.values})


def cumulative_logp_table(phase: Phase) -> TableColumns:
    """Return the log-probs of prefixes by their length, as far as they are shown."""
    curves = {model: phase.cumulative_logp(model) for model in ("student", "teacher")}
    lengths = curves["student"].last_L.astype(int).tolist()
    table: TableColumns = {"phase": [phase.name] * len(lengths), "tokens": lengths}
    table["responses"] = curves["student"].responses_L.astype(int).tolist()
    return table | _curve_columns(curves)


def weights_of_long_table(phase: Phase, names: Sequence[str]) -> TableColumns:
    """Return the mean weights by token position over the responses that reach all of these positions."""
    sums, shown = phase.sums_of(phase.long_cohorts()), phase.long_bins()
    table = _bin_columns({"phase": phase.name}, sums, shown)
    return table | _curve_columns({name: phase.by_position_of_long(name) for name in names})


def _bin_columns(labels: Mapping[str, str], sums: BinnedSums, shown: int) -> TableColumns:
    first_L, last_L = (bound_L[:shown] for bound_L in sums.position_bounds())
    table: TableColumns = {name: [label] * shown for name, label in labels.items()}
    table |= {"from_position": first_L.tolist(), "to_position": last_L.tolist()}
    table["tokens"] = sums.tokens_L[:shown].astype(int).tolist()
    table["responses"] = sums.responses_L[:shown].astype(int).tolist()
    return table | {"prompts": sums.prompts_L[:shown].tolist()}


def _curve_columns(curves: Mapping[str, PositionCurve]) -> TableColumns:
    table: TableColumns = {}
    for name, curve in curves.items():
        columns = (curve.mean_L, curve.low_L, curve.high_L)
        table |= dict(zip((name, f"{name}_low", f"{name}_high"), map(list, columns), strict=True))
    return table


def cumulative_signal_table(phase: Phase) -> TableColumns:
    """Return the fraction of the signal in the first 0%, 1%, …, 100% of the responses."""
    estimates = phase.cumulative_signal()
    table: TableColumns = {"phase": [phase.name] * len(estimates), "percent": list(range(len(estimates)))}
    return table | estimate_columns("cumulative_signal", estimates)


def ratio_table(phase: Phase, name: str) -> TableColumns:
    """Return the distribution of a prefix ratio at each position, over the responses that reach all of them.

    effective_sample_size: (Σ r)² / (n Σ r²) over the n tokens in the bin.
    """
    shown = phase.long_bins()
    table = _bin_columns({"phase": phase.name, "weight": name}, phase.sums_of(phase.long_cohorts()), shown)
    if not shown:
        return table | {column: [] for column in (*RATIO_QUANTILES, "effective_sample_size")}
    histogram = phase.ratios[name].select(phase.long_cohorts())
    for column, fraction in RATIO_QUANTILES.items():
        table[column] = histogram.quantile(fraction)[:shown].tolist()
    return table | {"effective_sample_size": histogram.effective_sample_size()[:shown].tolist()}


def correlation_table(phase: Phase) -> TableColumns:
    """Return the rank correlations of |A| with properties of the tokens."""
    values = phase.correlations
    table: TableColumns = {"phase": [phase.name] * len(values), "property": [each.name for each in values]}
    table |= estimate_columns("correlation", [each.raw for each in values])
    return table | estimate_columns("partial_correlation", [each.partial for each in values])


def weight_table(phase: Phase, names: Sequence[str]) -> TableColumns:
    """Return the mean, the effective sample size and the prefix fraction of the weighted signal of each weight."""
    numbers, profile = phase.numbers, phase.numbers.profile
    nonempty_G, means, tables = profile.responses_G > 0, overall_means(numbers.overall), []
    for name in names:
        sample_size = effective_sample_size(profile.tokens_G[nonempty_G], profile.moments[name][nonempty_G])
        row: TableColumns = {"phase": [phase.name], "weight": [name]} | estimate_columns("mean", [means[name]])
        row |= estimate_columns("effective_sample_size", [sample_size])
        row |= estimate_columns("prefix_fraction", [prefix_fraction(signal_by_percent(numbers, name))])
        tables.append(row)
    return concat_tables(tables)


def sample_table(sample: Sample) -> TableColumns:
    """Return the numbers of the student's own tokens in a response."""
    tokens = sample.tokens
    columns = {"advantage": tokens.advantage_T, "student_logp": tokens.student_logp_T}
    columns |= {"teacher_logp": tokens.teacher_logp_T, **sample.weights}
    table: TableColumns = {"sample_id": [sample.sample_id] * len(tokens), "position": list(range(1, len(tokens) + 1))}
    return table | {name: value_T.tolist() for name, value_T in columns.items()}


def step_row(step: StepResult) -> TableColumns:
    """Return the numbers of a step."""
    row: TableColumns = {"step": [step.step], "responses": [step.responses], "tokens": [step.tokens]}
    for name, mean in step.means.items():
        row |= estimate_columns(name, [mean])
    row |= estimate_columns("prefix_fraction", [step.prefix_fraction])
    return row | estimate_columns("own_fraction", [step.own_fraction])


def signal_by_bin(step: StepResult) -> TableColumns:
    """Return mean |A| of a step by position relative to the length."""
    starts = [number * PERCENT // BINS for number in range(BINS)]
    return {"step": [step.step] * BINS, "from_percent": starts, "abs_advantage": step.signal_L.tolist()}


def continuation_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracies of one step's continuations: of any prefix, and of prefixes that are right or wrong.

    A cell is None if it does not apply, or if the summary was written before the column existed.
    """
    rows = [{"prefix": "any", **row} for row in summary["accuracy"]] + summary["by_prefix"]
    return [dict.fromkeys(CONTINUATION_COLUMNS) | {"step": summary["step"], **row} for row in rows]


def estimate_columns(name: str, estimates: Sequence[Estimate]) -> TableColumns:
    """Return the columns of a quantity and of the bounds of its interval."""
    return {
        name: [estimate.value for estimate in estimates],
        f"{name}_low": [estimate.low for estimate in estimates],
        f"{name}_high": [estimate.high for estimate in estimates],
    }


def concat_tables(tables: Sequence[TableColumns]) -> TableColumns:
    """Concatenate the rows of tables with equal columns."""
    return {name: [cell for table in tables for cell in table[name]] for name in tables[0]} if tables else {}


def to_columns(rows: Sequence[Mapping[str, Any]]) -> TableColumns:
    """Return rows of equal keys as a table."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def table_rows(table: TableColumns) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
