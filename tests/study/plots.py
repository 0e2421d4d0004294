"""The study's figures. Draws numbers; computes none but running means."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from arms import IW_OPD, PREFIX, SUFFIX, UNIFORM
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results, area

from opdctl.analysis.figures import COLOURS, GREY, STYLE, as_bytes

WINDOW = 3
"""Steps that a point of an accuracy curve is the mean of."""


def draw(results: Results) -> dict[str, bytes]:
    """Return every figure as PNG, by name."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "study-accuracy": accuracy(results),
            "study-differences": differences(results),
            "study-prefixes": prefixes(results),
            "study-conditions": conditions(results),
        }
    return {name: as_bytes(figure, "png") for name, figure in figures.items()}


def panels(rows: int, columns: int, size: tuple[float, float], **shared: bool) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def accuracy(results: Results) -> Figure:
    """Accuracy by step: weights that lean on the beginning above, everything else below, uniform in both."""
    leaning = [UNIFORM, IW_OPD, *(arm for arm in results.scale.arms if arm.name.startswith(("linear", "prefix_ratio")))]
    others = [UNIFORM, *(arm for arm in results.scale.arms if arm not in leaning and "iw_opd" not in arm.name)]
    students = results.scale.students
    figure, axes = panels(2, len(students), (12.5, 7.2), sharex=True, sharey=True)
    for column, student in enumerate(students):
        for axis, shown in zip(axes[:, column], (leaning, others), strict=True):
            for arm, colour in zip(shown, (GREY, *COLOURS), strict=False):
                curve(axis, results.curve(student, arm), colour, arm.name)
        axes[0, column].set_title(student.name)
        axes[1, column].set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set(ylabel="accuracy", ylim=(0, 1))
    for axis in axes[:, -1]:
        axis.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curve(axis: Axes, accuracy_SN: np.ndarray, colour: str, label: str) -> None:
    """Draw the running mean over seeds with a band of ± 2 standard errors. S: seeds, N: steps."""
    window = min(WINDOW, accuracy_SN.shape[1])
    smooth = np.array([np.convolve(row, np.ones(window) / window, mode="valid") for row in accuracy_SN])
    x = np.arange(smooth.shape[1]) + (window - 1) / 2
    mean, error = smooth.mean(0), smooth.std(0, ddof=1) / np.sqrt(len(smooth))
    axis.plot(x, mean, color=colour, lw=1.4, label=label)
    axis.fill_between(x, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.12, lw=0)


def differences(results: Results) -> Figure:
    """The area under the accuracy curve, each arm less uniform weights: by student, and over all."""
    students = results.scale.students
    figure, axes = panels(1, len(students) + 1, (12.5, 5.2), sharey=True)
    titles = [*(student.name for student in students), "all students"]
    for axis, title, student in zip(axes[0], titles, [*students, None], strict=True):
        found = results.against_uniform(area, student)
        axis.axvline(0, color=GREY, lw=1)
        for place, (difference, p) in enumerate(found.values()):
            colour = GREY if p >= 0.05 else COLOURS[1] if difference.mean > 0 else COLOURS[0]
            axis.plot([difference.low, difference.high], [place, place], color=colour, lw=1.6)
            axis.plot(difference.mean, place, "o", color=colour, ms=4)
        axis.set(title=title, yticks=range(len(found)), yticklabels=list(found), xlabel="mean accuracy less uniform's")
    axes[0, 0].invert_yaxis()
    return figure


def prefixes(results: Results) -> Figure:
    """Accuracy when teacher and student go on from prefixes of the student: all of them, and split."""
    students = results.scale.students
    figure, axes = panels(1, len(students), (12.5, 3.8), sharey=True)
    for axis, student in zip(axes[0], students, strict=True):
        found = results.rows[f"prefixes/{student.name}"]
        for model, colour in (("teacher", COLOURS[0]), ("student", COLOURS[1])):
            points(axis, [row for row in found["accuracy"] if row["model"] == model], colour, f"{model}, all", "-")
            for kind, line in (("right so far", "--"), ("gone wrong", ":")):
                rows = [row for row in found["by_prefix"] if (row["model"], row["prefix"]) == (model, kind)]
                points(axis, rows, colour, f"{model}, {kind}", line)
        axis.set(title=student.name, xlabel="% of the response kept as prefix", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("accuracy")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def points(axis: Axes, rows: Sequence[dict], colour: str, label: str, line: str) -> None:
    rows = sorted(rows, key=lambda row: row["percent"])
    x = [row["percent"] for row in rows]
    axis.plot(x, [row["accuracy"] for row in rows], color=colour, ls=line, lw=1.4, label=label)
    if line == "-":
        axis.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.14, lw=0)


def conditions(results: Results) -> Figure:
    """The share of the gain that the first and the last 30 % of the tokens keep, and what goes with it."""
    found = results.conditions()
    figure, axes = panels(1, 3, (12.5, 5.0), width_ratios=(2, 1, 1))
    names = [f"{each.name}, rate {each.rate:g}" for each in found]
    axis = axes[0, 0]
    for place, each in enumerate(found):
        kept_line(axis, each.prefix, place - 0.14, COLOURS[0], f"{PREFIX.name}" if not place else None)
        kept_line(axis, each.suffix, place + 0.14, COLOURS[1], f"{SUFFIX.name}" if not place else None)
    for value in (0, 1):
        axis.axvline(value, color=GREY, lw=1)
    axis.set(title="Share of the gain kept", yticks=range(len(found)), yticklabels=names)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    for axis, name, label in (
        (axes[0, 1], "first_share", "signal on the first 30 %"),
        (axes[0, 2], "onset", "onset of the errors"),
    ):
        x = [getattr(each, name) for each in found]
        axis.plot(x, [each.prefix.mean - each.suffix.mean for each in found], "o", color=COLOURS[2], ms=5)
        axis.axhline(0, color=GREY, lw=1)
        axis.set(title="Prefix less suffix", xlabel=label)
    return figure


def kept_line(axis: Axes, kept, place: float, colour: str, label: str | None) -> None:
    axis.plot([kept.low, kept.high], [place, place], color=colour, lw=1.6)
    axis.plot(kept.mean, place, "o", color=colour, ms=4.5, label=label)
