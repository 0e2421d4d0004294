"""The style of the figures, and what several of them plot. Figures are PNG for documents and SVG for the report."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opdctl.evaluation.statistics import Estimate

ORANGE, BLUE, GREY, BLACK = "#c2410c", "#1d4ed8", "#64748b", "#0f172a"
COLORS = (ORANGE, BLUE, "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be123c", "#4d7c0f")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "text.parse_math": False,  # show dollar signs in names
    "svg.fonttype": "none",
    "svg.hashsalt": "opdctl",  # reproducible ids
}


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """Return a figure as "png" or "svg", reproducible byte for byte."""
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()


def make_panels(count: int, height: float = 3.6, rows: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row. height: of a row, in inches."""
    figure = Figure(figsize=(12.5, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count // rows, squeeze=False, **shared).flat)


def plot_band(axis: Axes, x: Any, mean: Any, low: Any, high: Any, color: str, label: str | None, **line: Any) -> None:
    axis.plot(x, mean, color=color, lw=1.4, label=label, **line)
    axis.fill_between(x, low, high, color=color, alpha=0.16, lw=0)


def plot_estimates(axis: Axes, x: Any, estimates: Sequence[Estimate], color: str, label: str | None) -> None:
    mean, low, high = ([getattr(estimate, name) for estimate in estimates] for name in ("value", "low", "high"))
    plot_band(axis, x, mean, low, high, color, label)
