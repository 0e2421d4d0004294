"""The figures of compared runs: accuracy by step, and by the size of the models. It plots numbers and computes none.

Figure numbers in parentheses are those of arXiv 2606.22600.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from opdctl.analysis.plotting import COLORS, GREY, STYLE, make_panels, plot_band


def comparison_figure(comparison: Mapping[str, Any]) -> Figure:
    """Accuracy by step of several settings, with intervals over their seeds (Figures 1a and 2a)."""
    with matplotlib.rc_context(STYLE):
        return learning_curves_figure(comparison["bench"], comparison["settings"], {}, comparison["target"])


def learning_curves_figure(
    bench: str, settings: Sequence[Mapping[str, Any]], teachers: Mapping[str, float], target: float | None = None
) -> Figure:
    figure, (axis,) = make_panels(1)
    for setting, color in zip(settings, cycle(COLORS), strict=False):
        curve = setting["curve"]
        step, mean, low, high = ([point[name] for point in curve] for name in ("step", "accuracy", "low", "high"))
        seeds = curve[0]["seeds"]
        label = setting["label"] + (f", {seeds} seeds" if seeds > 1 else "")
        plot_band(axis, step, mean, low, high, color, label, marker="o", markersize=3.5)
    for name, value in teachers.items():
        axis.axhline(value, color=GREY, lw=1, ls="--", label=name)
    if target is not None:
        axis.axhline(target, color=GREY, lw=0.8, ls=":", label=f"target {target:.1%}")
    axis.set(title=f"Accuracy on {bench}", xlabel="training step", ylabel="accuracy", ylim=(0, 1.02))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="best")
    return figure


def by_size_figure(rows: Sequence[Mapping[str, Any]], x: str, accuracy: str) -> Figure:
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
    quantities = [name for name in titles if any(row[name] is not None for row in rows)]
    with matplotlib.rc_context(STYLE):
        figure, axes = make_panels(len(quantities))
        for axis, name in zip(axes, quantities, strict=True):
            for (label, rows_of_line), color in zip(lines.items(), cycle(COLORS), strict=False):
                points = [row for row in rows_of_line if row[name] is not None]
                size, mean, low, high = (
                    [row[key] for row in points] for key in (x, name, f"{name}_low", f"{name}_high")
                )
                if points:
                    plot_band(axis, size, mean, low, high, color, label, marker="o", markersize=3.5)
            axis.set(title=titles[name], xlabel=x.replace("_", " "), ylabel=name, xscale="log")
            axis.set_xticks([*ticks], [*ticks.values()])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        axes[0].legend(loc="best")
    return figure


def _size_label(row: Mapping[str, Any], has_parameters: bool, has_compression: bool) -> str:
    """Return the parameters of the student, such as 596M, and below them the compression if it is known."""
    parameters = [_format_parameters(row["student_parameters"])] * has_parameters
    compression = [f"{row['compression']:.1f}×"] if has_compression and row["compression"] else []
    return "\n".join([*parameters, *compression])


def _format_parameters(count: float) -> str:
    """Return a number of parameters with three digits: _format_parameters(596e6) is "596M"."""
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g}{('', 'K', 'M', 'B', 'T')[power]}"
