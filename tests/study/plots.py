"""The figures of the study. Their only computation is the running mean of accuracy curves.

Shapes: S seeds, N steps.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from arms import IW_OPD, PREFIX, SUFFIX, UNIFORM
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Interval, Results, area

from opdctl.analysis.plotting import COLORS, GREY, STYLE, figure_bytes

WINDOW = 3
"""Steps of the running mean of an accuracy curve."""


def draw_figures(results: Results) -> dict[str, bytes]:
    """Return the figures as PNG, by name."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "study-accuracy": draw_accuracy(results),
            "study-differences": draw_differences(results),
            "study-prefixes": draw_prefixes(results),
            "study-conditions": draw_conditions(results),
        }
    return {name: figure_bytes(figure, "png") for name, figure in figures.items()}


def panels(rows: int, columns: int, size: tuple[float, float], **shared: bool) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def draw_accuracy(results: Results) -> Figure:
    """Draw accuracy by step: above, weights that emphasize the start of responses; below, all others."""
    arms = results.scale.arms
    emphasizing = [UNIFORM, IW_OPD, *(arm for arm in arms if arm.name.startswith(("linear", "prefix_ratio")))]
    others = [UNIFORM, *(arm for arm in arms if arm not in emphasizing and "iw_opd" not in arm.name)]
    students = results.scale.students
    figure, axes = panels(2, len(students), (12.5, 7.2), sharex=True, sharey=True)
    for column, student in enumerate(students):
        for axis, shown in zip(axes[:, column], (emphasizing, others), strict=True):
            for arm, color in zip(shown, (GREY, *COLORS), strict=False):
                draw_curve(axis, results.curves(student, arm), color, arm.name)
        axes[0, column].set_title(student.name)
        axes[1, column].set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set(ylabel="accuracy", ylim=(0, 1))
    for axis in axes[:, -1]:
        axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_curve(axis: Axes, accuracy_SN: np.ndarray, color: str, label: str) -> None:
    """Draw the running mean, averaged over seeds, with a band of ± 2 standard errors."""
    window = min(WINDOW, accuracy_SN.shape[1])
    smooth = np.array([np.convolve(row, np.ones(window) / window, mode="valid") for row in accuracy_SN])
    x = np.arange(smooth.shape[1]) + (window - 1) / 2
    mean, error = smooth.mean(0), smooth.std(0, ddof=1) / np.sqrt(len(smooth))
    axis.plot(x, mean, color=color, lw=1.4, label=label)
    axis.fill_between(x, mean - 2 * error, mean + 2 * error, color=color, alpha=0.12, lw=0)


def draw_differences(results: Results) -> Figure:
    """Draw the area under the accuracy curve, each arm minus uniform weights: by student, and over all students."""
    students = results.scale.students
    figure, axes = panels(1, len(students) + 1, (12.5, 5.2), sharey=True)
    titles = [*(student.name for student in students), "all students"]
    for axis, title, student in zip(axes[0], titles, [*students, None], strict=True):
        differences = results.against_uniform(area, student)
        axis.axvline(0, color=GREY, lw=1)
        for place, (difference, p) in enumerate(differences.values()):
            color = GREY if p >= 0.05 else COLORS[1] if difference.mean > 0 else COLORS[0]
            axis.plot([difference.low, difference.high], [place, place], color=color, lw=1.6)
            axis.plot(difference.mean, place, "o", color=color, ms=4)
        axis.set(
            title=title,
            yticks=range(len(differences)),
            yticklabels=list(differences),
            xlabel="mean accuracy minus uniform",
        )
    axes[0, 0].invert_yaxis()
    return figure


def draw_prefixes(results: Results) -> Figure:
    """Draw the accuracy of continuations by teacher and student: of all prefixes, and by kind of prefix."""
    students = results.scale.students
    figure, axes = panels(1, len(students), (12.5, 3.8), sharey=True)
    for axis, student in zip(axes[0], students, strict=True):
        row = results.rows[f"prefixes/{student.name}"]
        for model, color in (("teacher", COLORS[0]), ("student", COLORS[1])):
            draw_points(axis, [r for r in row["accuracy"] if r["model"] == model], color, f"{model}, all", "-")
            for kind, line in (("right so far", "--"), ("gone wrong", ":")):
                rows = [r for r in row["by_prefix"] if (r["model"], r["prefix"]) == (model, kind)]
                draw_points(axis, rows, color, f"{model}, {kind}", line)
        axis.set(title=student.name, xlabel="% of the response kept as prefix", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("accuracy")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_points(axis: Axes, rows: Sequence[dict], color: str, label: str, line: str) -> None:
    rows = sorted(rows, key=lambda row: row["percent"])
    x = [row["percent"] for row in rows]
    axis.plot(x, [row["accuracy"] for row in rows], color=color, ls=line, lw=1.4, label=label)
    if line == "-":
        axis.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=color, alpha=0.14, lw=0)


def draw_conditions(results: Results) -> Figure:
    """Draw the fraction of the gain that prefix and suffix retain, and its relation to prefix signal and onset."""
    conditions = results.conditions()
    figure, axes = panels(1, 3, (12.5, 5.0), width_ratios=(2, 1, 1))
    names = [f"{each.name}, rate {each.learning_rate:g}" for each in conditions]
    axis = axes[0, 0]
    for place, each in enumerate(conditions):
        draw_interval(axis, each.prefix, place - 0.14, COLORS[0], PREFIX.name if not place else None)
        draw_interval(axis, each.suffix, place + 0.14, COLORS[1], SUFFIX.name if not place else None)
    for value in (0, 1):
        axis.axvline(value, color=GREY, lw=1)
    axis.set(title="Share of the gain kept", yticks=range(len(conditions)), yticklabels=names)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    for axis, name, label in (
        (axes[0, 1], "prefix_signal", "signal on the first 30 %"),
        (axes[0, 2], "onset", "onset of the errors"),
    ):
        x = [getattr(each, name) for each in conditions]
        axis.plot(x, [each.prefix.mean - each.suffix.mean for each in conditions], "o", color=COLORS[2], ms=5)
        axis.axhline(0, color=GREY, lw=1)
        axis.set(title="Prefix less suffix", xlabel=label)
    return figure


def draw_interval(axis: Axes, interval: Interval, place: float, color: str, label: str | None) -> None:
    axis.plot([interval.low, interval.high], [place, place], color=color, lw=1.6)
    axis.plot(interval.mean, place, "o", color=color, ms=4.5, label=label)
