"""The figure of continuations: accuracies by the length of the student's prefix (Figure 1b of arXiv 2606.22600)."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from matplotlib.axes import Axes

from opdctl.analysis.phase_tables import continuation_rows
from opdctl.analysis.plotting import BLUE, COLORS, GREY, Panel, plot_band, plot_counts, plot_line, use_percent
from opdctl.analysis.results import Analysis

Rows = Sequence[Mapping[str, Any]]
PREFIX_KINDS = {"right so far": ":", "gone wrong": "--"}
"""The line style of the accuracy from some of the prefixes."""


def continuation_panels(analysis: Analysis) -> list[Panel]:
    """Accuracy of teacher and student from the student's prefixes, by relative and by absolute length."""
    return [
        _panel(summary["step"], unit, rows)
        for summary in analysis.continuations
        for unit in ("percent", "tokens")
        if (rows := [row for row in continuation_rows(summary) if row[unit] is not None])
    ]


def _panel(step: int, unit: str, rows: Rows) -> Panel:
    models = list(dict.fromkeys(row["model"] for row in rows))
    colors = dict(zip(models, (BLUE, *(color for color in COLORS if color != BLUE)), strict=False))
    counted = [row for row in rows if (row["model"], row["prefix"]) == (models[0], "any") and row["responses"]]
    counted.sort(key=itemgetter(unit))

    def draw(axis: Axes) -> None:
        for model, color in colors.items():
            of_model = sorted((row for row in rows if row["model"] == model), key=itemgetter(unit))
            _plot_any_prefix(axis, of_model, unit, model, color)
            for kind, line_style in PREFIX_KINDS.items():
                _plot_prefixes_of_kind(axis, of_model, unit, color, f"{model}, prefix {kind}", line_style)
        use_percent(axis, "y")
        if unit == "percent":
            use_percent(axis, "x")

    def draw_counts(axis: Axes) -> None:
        plot_counts(axis, [row[unit] for row in counted], [row["responses"] for row in counted], GREY, "")

    x = f"prefix length ({'tokens' if unit == 'tokens' else 'percent of the response'})"
    title = f"Prefixes of the student of step {step}"
    return Panel(title, x, "accuracy", draw, draw_counts if counted else None, (-0.02, 1.02))


def _plot_any_prefix(axis: Axes, rows: Rows, unit: str, model: str, color: str) -> None:
    """Plot a model's accuracy from any prefix, with its interval."""
    columns = (unit, "accuracy", "low", "high")
    length, mean, low, high = ([row[name] for row in rows if row["prefix"] == "any"] for name in columns)
    plot_band(axis, length, mean, low, high, color, model, marker="o", markersize=3.5)


def _plot_prefixes_of_kind(axis: Axes, rows: Rows, unit: str, color: str, label: str, line_style: str) -> None:
    """Plot a model's accuracy from prefixes that are right so far, or that have gone wrong, if there are any."""
    of_kind = [row for row in rows if label.endswith(f"prefix {row['prefix']}")]
    if of_kind:
        plot_line(
            axis, [row[unit] for row in of_kind], [row["accuracy"] for row in of_kind], color, label, ls=line_style
        )
