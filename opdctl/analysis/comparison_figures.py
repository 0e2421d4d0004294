"""The figures of compared runs: accuracy by step and by the size of the models, and their signal. It plots numbers and
computes none.

Figure numbers in parentheses are those of arXiv 2606.22600.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes

from opdctl.analysis.plotting import (
    Panel,
    curve_panel,
    plot_band,
    plot_estimates,
    plot_reference,
    scale_by_step,
    series_styles,
    use_integer_ticks,
    use_percent,
)
from opdctl.analysis.run_comparison import RunComparison
from opdctl.evaluation.statistics import Estimate


def comparison_panels(comparison: Mapping[str, Any]) -> list[Panel]:
    """Accuracy by step of several settings, with intervals over their seeds (Figures 1a and 2a)."""
    return [learning_curve_panel(comparison["bench"], comparison["settings"], {}, comparison["target"])]


def learning_curve_panel(
    bench: str, settings: Sequence[Mapping[str, Any]], teachers: Mapping[str, float], target: float | None = None
) -> Panel:
    """Accuracy by step of several settings, with the accuracies of the teachers."""
    styles = series_styles([setting["label"] for setting in settings])

    def draw(axis: Axes) -> None:
        for setting in settings:
            curve = setting["curve"]
            x, mean, low, high = ([point[name] for point in curve] for name in ("step", "accuracy", "low", "high"))
            seeds = curve[0]["seeds"]
            label = setting["label"] + (f", {seeds} seeds" if seeds > 1 else "")
            plot_band(axis, x, mean, low, high, label=label, marker="o", markersize=3.5, **styles[setting["label"]])
        for (name, value), line_style in zip(teachers.items(), cycle(("--", "-.", ":")), strict=False):
            plot_reference(axis, value, f"{name}, {value:.1%}", line_style)
        if target is not None:
            plot_reference(axis, target, f"target {target:.1%}", ":")
        use_percent(axis, "y")
        use_integer_ticks(axis)

    return Panel(f"Accuracy on {bench}", "training step", "accuracy", draw)


def by_size_panels(rows: Sequence[Mapping[str, Any]], x: str, accuracy: str) -> list[Panel]:
    """Final accuracy and relative gain by the size of the student, or by compression (Figure 2b).

    rows: those of the table `by_size`. x: `student_parameters` or `compression`. accuracy: what the accuracy is of.
    """
    is_by_student = x == "student_parameters"
    has_teachers = is_by_student and len({row["teacher"] for row in rows}) > 1
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        label = f"{row['setting']}, {row['teacher']}" if has_teachers else row["setting"]
        lines.setdefault(label, []).append(row)
    ticks = {row[x]: _size_label(row, is_by_student, not has_teachers) for row in rows}
    titles = {"accuracy": f"Accuracy: {accuracy}", "gain": "Relative gain over the baseline"}
    return [
        _by_size_panel(title, x, name, lines, ticks)
        for name, title in titles.items()
        if any(row[name] is not None for row in rows)
    ]


def _by_size_panel(
    title: str, x: str, name: str, lines: Mapping[str, Sequence[Mapping[str, Any]]], ticks: Mapping[float, str]
) -> Panel:
    styles = series_styles(list(lines))

    def draw(axis: Axes) -> None:
        for label, rows in lines.items():
            points = [row for row in rows if row[name] is not None]
            size, mean, low, high = ([row[key] for row in points] for key in (x, name, f"{name}_low", f"{name}_high"))
            if points:
                plot_band(axis, size, mean, low, high, label=label, marker="o", markersize=3.5, **styles[label])
        axis.set_xscale("log")
        axis.set_xticks([*ticks], [*ticks.values()])
        axis.minorticks_off()
        use_percent(axis, "y")

    return Panel(title, x.replace("_", " "), name, draw)


def _size_label(row: Mapping[str, Any], has_parameters: bool, has_compression: bool) -> str:
    """Return the parameters of the student, such as 596M, and below them the compression if it is known."""
    parameters = [_format_parameters(row["student_parameters"])] * has_parameters
    compression = [f"{row['compression']:.1f}×"] if has_compression and row["compression"] else []
    return "\n".join([*parameters, *compression])


def _format_parameters(count: float) -> str:
    """Return a number of parameters with three digits: _format_parameters(596e6) is "596M"."""
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g}{('', 'K', 'M', 'B', 'T')[power]}"


# ── The signal of several runs ───────────────────────────────────────────────────────────────────────────────────────


def signal_panels(comparison: RunComparison) -> list[Panel]:
    """Mean |A| of the last phases by relative and by token position, and its difference to the first run."""
    phases, styles = comparison.last_phases(), series_styles(list(comparison.analyses))

    def draw_zero(axis: Axes) -> None:
        plot_reference(axis, 0.0, "no difference")
        use_percent(axis, "x")

    return [
        curve_panel(
            "|A| by relative position",
            "position in the response",
            "mean |A| (nats)",
            {label: (phase.by_relative_position("abs_advantage"), styles[label]) for label, phase in phases.items()},
            lambda axis: use_percent(axis, "x"),
        ),
        curve_panel(
            "|A| by token position",
            "token position in the response",
            "mean |A| (nats)",
            {label: (phase.by_position("abs_advantage"), styles[label]) for label, phase in phases.items()},
        ),
        curve_panel(
            f"Difference to {next(iter(phases))}",
            "position in the response",
            "difference of mean |A| (nats)",
            {label: (comparison.difference(label, "abs_advantage"), styles[label]) for label in comparison.others()},
            draw_zero,
        ),
    ]


def panels_by_step(comparison: RunComparison) -> list[Panel]:
    """Reverse KL and mean |A| of the runs by step."""
    return [
        _by_step(comparison, "k1", "Reverse KL (k1)", "nats per token"),
        _by_step(comparison, "abs_advantage", "Discrepancy |A|", "mean |A| (nats)"),
    ]


def _by_step(comparison: RunComparison, name: str, title: str, y: str) -> Panel:
    styles = series_styles(list(comparison.analyses))

    def draw(axis: Axes) -> None:
        for label, analysis in comparison.analyses.items():
            known = {step.step: step.means[name] for step in analysis.steps}
            steps = range(min(known), max(known) + 1)
            missing = Estimate(math.nan, math.nan, math.nan)
            plot_estimates(axis, steps, [known.get(step, missing) for step in steps], label=label, **styles[label])
        scale_by_step(axis)
        use_integer_ticks(axis)

    return Panel(title, "training step", y, draw)


def comparison_figures(comparison: RunComparison) -> Mapping[str, list[Panel]]:
    """Return the panels of the figures by name."""
    return {"signal": signal_panels(comparison), "signal_by_step": panels_by_step(comparison)}
