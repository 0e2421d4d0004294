"""The style of the figures, their panels, and what several of them plot.

A figure is a list of panels. `compose` draws them side by side as one figure for a paper, `draw_panel` each alone for
the report.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from opdctl.analysis.curves import PositionCurve
from opdctl.evaluation.statistics import Estimate

ORANGE, BLUE, GREY, BLACK = "#c2410c", "#1d4ed8", "#64748b", "#0f172a"
COLORS = (ORANGE, BLUE, "#15803d", "#9333ea", "#0891b2", "#db2777")
"""The colors of curves. report.css replaces each by one of its variables, which has another value on a dark page."""
STYLE: Any = {
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), BLACK),
    **dict.fromkeys(("xtick.color", "ytick.color"), "#94a3b8"),
    "text.parse_math": False,  # show dollar signs in names
    "path.simplify": False,  # the report shows the values of a curve's points
    "pdf.fonttype": 42,  # embeds the fonts as TrueType, which publishers ask for
    "svg.fonttype": "none",
    "svg.hashsalt": "opdctl",  # reproducible ids
}


def _font_sizes(size: float) -> dict[str, Any]:
    small = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    return {"font.size": size, "axes.titlesize": size, "axes.labelsize": size, **dict.fromkeys(small, 0.93 * size)}


PAPER_STYLE: Any = STYLE | _font_sizes(7.5) | {"axes.linewidth": 0.6, "grid.linewidth": 0.5, "figure.dpi": 200}
"""For a figure as wide as the text of a page."""
PAGE_STYLE: Any = STYLE | _font_sizes(11.5) | {"axes.titleweight": "bold"}
"""For a panel of the report, which is shown at its size or a little smaller."""
PAPER_INCHES = 6.75
"""The width of a figure in a paper."""
PAGE_INCHES = 5.0
"""The width of a panel in the report: 360 units of its SVG."""
HEIGHT, COUNTS_HEIGHT = 0.64, 0.17
"""The height of a panel, and the additional height of its counts, as fractions of its width."""
LOG_SCALE_RATIO = 10.0
"""A y axis by step is logarithmic if the greatest mean exceeds the median of the means by this factor."""
LINE_STYLES = ("-", ":", "-.")
"""The next one for each round of COLORS. Dashed are curves that another curve may cover."""


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    x, y: the labels of the axes, with units. draw: plots on the axes. draw_counts: plots the number of responses that
    the curves rest on, on a thin axis below that has the same x. y_limits: of the axis, by default from the curves.
    """

    title: str
    x: str
    y: str
    draw: Callable[[Axes], None]
    draw_counts: Callable[[Axes], None] | None = None
    y_limits: tuple[float, float] | None = None

    @property
    def relative_height(self) -> float:
        """The height without a legend as a fraction of the width."""
        return HEIGHT + (COUNTS_HEIGHT if self.draw_counts else 0)


# ── Rendering ────────────────────────────────────────────────────────────────────────────────────────────────────────


def compose(panels: Sequence[Panel]) -> Figure:
    """Return the panels as one figure in the style of a paper, row by row."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    inches = PAPER_INCHES / max(columns, 2)  # a panel alone is as wide as a column of text
    with matplotlib.rc_context(PAPER_STYLE):
        figure = Figure(figsize=(inches * columns, inches), layout="constrained")
        parts = list(np.ravel(figure.subfigures(rows, columns, squeeze=False)))
        legend = max(_draw(part, panel, inches) for part, panel in zip(parts, panels, strict=False))
        height = inches * max(panel.relative_height for panel in panels) + legend
        figure.set_size_inches(inches * columns, rows * height)
        _lay_out(figure)
    return figure


def draw_panel(panel: Panel) -> tuple[Figure, Axes]:
    """Return a panel as a figure in the style of the report, and its axes."""
    with matplotlib.rc_context(PAGE_STYLE):
        figure = Figure(figsize=(PAGE_INCHES, PAGE_INCHES), layout="constrained")
        legend = _draw(figure, panel, PAGE_INCHES)
        figure.set_size_inches(PAGE_INCHES, PAGE_INCHES * panel.relative_height + legend)
        _lay_out(figure)
    return figure, figure.axes[0]


def _lay_out(figure: Figure) -> None:
    """Place the axes once: each format that a figure is saved in would place them again, which takes half the time."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine("none")


def _draw(figure: FigureBase, panel: Panel, inches: float) -> float:
    """Draw a panel of a width and return the height of its legend, both in inches."""
    counts = None
    if panel.draw_counts:
        axis, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        panel.draw_counts(counts)
        greatest = max((float(np.max(line.get_ydata(), initial=0)) for line in counts.get_lines()), default=0.0)
        counts.set(ylim=(0, 1.15 * (greatest or 1.0)), yticks=(0, greatest), xlabel=panel.x)
        size = matplotlib.rcParams["ytick.labelsize"]
        counts.text(0.01, 0.1, "responses", transform=counts.transAxes, color=GREY, size=size)
    else:
        axis = figure.subplots()
        axis.set_xlabel(panel.x)
    for each in (axis.xaxis, axis.yaxis):  # ticks that do not depend on the size, which the layout changes
        each.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    panel.draw(axis)
    axis.set(title=panel.title, ylabel=panel.y)
    if panel.y_limits:
        axis.set_ylim(*panel.y_limits)
    else:
        fit_y_axis(axis)
    return _add_legend(figure, axis, inches)


def _add_legend(figure: FigureBase, axis: Axes, inches: float) -> float:
    """Add the legend below the axes, where it covers no curve, and return its height in inches."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if not unique:
        return 0.0
    letter = 0.6 * matplotlib.rcParams["font.size"] / 72  # inches, about the mean width
    columns = max(1, min(len(unique), int(inches / letter / (max(map(len, unique)) + 6))))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=columns, columnspacing=1.2)
    return -(-len(unique) // columns) * 2.2 * letter + letter


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """Return a figure as "png", "pdf" or "svg", reproducible byte for byte.

    The canvases are called without `savefig`, which draws a figure twice.
    """
    buffer, dpi = io.BytesIO(), figure.dpi
    with matplotlib.rc_context(PAPER_STYLE):
        if kind == "png":
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        elif kind == "pdf":
            FigureCanvasPdf(figure).print_pdf(buffer, metadata=dict.fromkeys(("Creator", "Producer", "CreationDate")))
        else:
            text = io.TextIOWrapper(buffer, "utf-8", write_through=True)
            FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    figure.set_dpi(dpi)  # the vector formats change it
    return buffer.getvalue()


# ── Axes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fit_y_axis(axis: Axes) -> None:
    """Fit the y axis to the curves and the reference lines, not to the bands: these are cut off.

    A linear axis includes 0 if all its values have one sign.
    """
    lines = [line for line in axis.get_lines() if str(line.get_gid()).startswith(("curve", "stems", "reference"))]
    values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), np.float64) for line in lines)])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if axis.get_yscale() == "log":
        axis.set_ylim(low / 1.3, high * 1.3)
        return
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = 1.0
    margin = 0.06 * (high - low)
    axis.set_ylim(low - margin if low < 0 else 0.0, high + margin if high > 0 else 0.0)


def scale_by_step(axis: Axes) -> None:
    """Make the y axis logarithmic if the first steps would leave the others no height: see LOG_SCALE_RATIO."""
    lines = [line for line in axis.get_lines() if str(line.get_gid()).startswith("curve")]
    values = np.concatenate([np.zeros(0), *(np.asarray(line.get_ydata(), np.float64) for line in lines)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > LOG_SCALE_RATIO * np.median(values):
        set_log_scale(axis, float(np.log10(values.max() / values.min())))


def set_log_scale(axis: Axes, decades: float = 1.0) -> None:
    """Make the y axis logarithmic. decades: that it spans, which decides the ticks."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=8))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def use_integer_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def use_percent(axis: Axes, which: str) -> None:
    """Format ticks as percent. which: "x", whose values are percent, or "y", whose values are fractions."""
    if which == "x":
        axis.xaxis.set_major_formatter(PercentFormatter())
    else:
        axis.yaxis.set_major_formatter(PercentFormatter(1))


# ── What panels plot ─────────────────────────────────────────────────────────────────────────────────────────────────


def plot_band(axis: Axes, x: Any, mean: Any, low: Any, high: Any, color: str, label: str | None, **line: Any) -> None:
    """Plot a curve with the band of its interval. NaN is a gap, and a point between gaps is a dot."""
    x, mean, low, high = (np.asarray(values, np.float64) for values in (x, mean, low, high))
    plot_line(axis, x, mean, color, label, **line)
    axis.fill_between(x, low, high, color=color, alpha=0.16, lw=0, gid=f"band {label or ''}")


def plot_line(axis: Axes, x: Any, y: Any, color: str, label: str | None, **line: Any) -> None:
    """Plot a curve. NaN is a gap, and a point between gaps is a dot. The y axis is fitted to what it plots."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    axis.plot(x, y, color=color, lw=1.4, label=label, gid=f"curve {label or ''}", **line)
    known = np.isfinite(np.pad(y, 1, constant_values=np.nan))
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    if alone.any():
        axis.plot(x[alone], y[alone], ".", color=color, gid=f"band {label or ''}")


def plot_estimates(
    axis: Axes, x: Any, estimates: Sequence[Estimate], color: str, label: str | None, **line: Any
) -> None:
    mean, low, high = ([getattr(estimate, name) for estimate in estimates] for name in ("value", "low", "high"))
    plot_band(axis, x, mean, low, high, color, label, **line)


def curve_panel(
    title: str,
    x: str,
    y: str,
    curves: Mapping[str, tuple[PositionCurve, Mapping[str, str]]],
    adapt: Callable[[Axes], None] = use_integer_ticks,
) -> Panel:
    """Return a panel of curves by position, with the responses that they rest on below.

    curves: with its color and line style, by label. adapt: sets up the axes after plotting.
    """

    def draw(axis: Axes) -> None:
        for label, (curve, style) in curves.items():
            plot_band(axis, curve.middle_L, curve.mean_L, curve.low_L, curve.high_L, label=label, **style)
        adapt(axis)

    def draw_counts(axis: Axes) -> None:
        drawn: list[bytes] = []
        for label, (curve, style) in curves.items():
            if curve.responses_L.tobytes() not in drawn:
                plot_counts(axis, curve.middle_L, curve.responses_L, style["color"], label)
            drawn.append(curve.responses_L.tobytes())

    return Panel(title, x, y, draw, draw_counts)


def plot_reference(axis: Axes, y: float, label: str, line_style: str = "--") -> None:
    """Plot a horizontal line that curves are compared with."""
    axis.axhline(y, color=GREY, lw=1, ls=line_style, label=label, gid="reference")


def plot_counts(axis: Axes, x: Any, count: Any, color: str, label: str) -> None:
    """Plot the number of responses by position."""
    axis.plot(x, count, color=color, lw=1, drawstyle="steps-mid", gid=f"band {label}")


def series_styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the color and the line style of each curve by its name, different for all of up to 18 curves.

    A signed weight is dashed, since it is often equal to the unsigned one below it.
    """
    styles, rounds = zip(COLORS * len(names), np.repeat(LINE_STYLES * len(names), len(COLORS)), strict=False), {}
    for name, (color, line_style) in zip(names, styles, strict=False):
        rounds[name] = {"color": color, "ls": "--" if "signed=true" in name else str(line_style)}
    return rounds
