"""The figures of analyze-position. Draws numbers; computes none.

Each is drawn twice: as PNG for documents, as SVG for the report and for print.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from opdctl.analysis.position_bias import PREFIX_PERCENT
from opdctl.analysis.position_sums import BINS
from opdctl.analysis.results import Analysis, Phase, continuation_rows
from opdctl.evaluation.stats import Estimate

EARLY, LATE, GREY = "#c2410c", "#1d4ed8", "#64748b"
COLOURS = (EARLY, LATE, "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be123c", "#4d7c0f")
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
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "opdctl",
}


def draw(analysis: Analysis) -> dict[str, Figure]:
    """Return every figure that the analysis has numbers for, by name, in the order of the report."""
    wanted: dict[str, tuple[bool, Callable[[Analysis], Figure]]] = {
        "position": (True, position),
        "spent": (True, spent),
        "steps": (len(analysis.steps) > 1, steps),
        "heat": (len(analysis.steps) > 1, heatmap),
        "prefix_logp": (True, prefix_logp),
        "entropy": (bool(_optional(analysis)), entropy),
        "weights": (True, weights),
        "prefix_ratio": (bool(_ratios(analysis)), prefix_ratio),
        "one_response": (bool(analysis.samples), one_response),
        "continuations": (bool(analysis.continuations), continuations),
        "accuracy": (analysis.accuracy is not None, accuracy),
    }
    with matplotlib.rc_context(STYLE):
        return {name: make(analysis) for name, (there, make) in wanted.items() if there}


def as_bytes(figure: Figure, kind: str) -> bytes:
    """Return a figure as "png" or "svg", the same bytes for the same numbers."""
    buffer = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()


def _panels(count: int, height: float = 3.6, **shared: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(12.5, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **shared)[0])


def _band(axis: Axes, x: Any, mean: Any, low: Any, high: Any, colour: str, label: str | None, **line: Any) -> None:
    axis.plot(x, mean, color=colour, lw=1.4, label=label, **line)
    axis.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)


def _estimates(axis: Axes, x: Any, found: Sequence[Estimate], colour: str, label: str | None) -> None:
    mean, low, high = ([getattr(each, name) for each in found] for name in ("value", "low", "high"))
    _band(axis, x, mean, low, high, colour, label)


# ── By position ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_position(axis: Axes, phase: Phase, name: str, colour: str, label: str | None, **line: Any) -> None:
    sums = phase.numbers.position
    shown = np.flatnonzero(sums.responses_P >= max(2, phase.numbers.responses // 10))  # the ragged end is noise
    mean, half = sums.mean(name)[shown], sums.half_width(name)[shown]
    _band(axis, shown + 1, mean, mean - half, mean + half, colour, label, **line)


def _phases(analysis: Analysis) -> Iterator[tuple[Phase, str]]:
    return zip(analysis.phases, (EARLY, LATE), strict=False)


def position(analysis: Analysis) -> Figure:
    """Discrepancy, reverse KL and the recipe's weight by token position (Figure 3b)."""
    own = analysis.weights[0]
    panels = {
        "abs_advantage": ("Discrepancy |A|", "mean |A| (nats)"),
        "k1": ("Reverse KL, sampled (k1)", "mean −A (nats)"),
        own: (f"Token weight: {own}", "mean weight"),
    }
    figure, axes = _panels(len(panels))
    for axis, (name, (title, label)) in zip(axes, panels.items(), strict=True):
        for phase, colour in _phases(analysis):
            _by_position(axis, phase, name, colour, phase.name)
        axis.set(title=title, xlabel="token position in the response", ylabel=label)
    axes[0].legend(loc="upper left")
    return figure


def prefix_logp(analysis: Analysis) -> Figure:
    """Log-prob of the prefixes that the student drew, under student and teacher (Figure 3c)."""
    figure, axes = _panels(len(analysis.phases), sharey=True)
    for axis, (phase, _) in zip(axes, _phases(analysis), strict=True):
        _by_position(axis, phase, "student_prefix_logp", LATE, "student")
        _by_position(axis, phase, "teacher_prefix_logp", EARLY, "teacher")
        axis.set(title=phase.name, xlabel="length of the prefix, tokens", ylabel="mean log-prob of the prefix (nats)")
    axes[0].legend(loc="lower left")
    return figure


def _optional(analysis: Analysis) -> list[str]:
    """Return the columns that a run stores only if it is asked to, and that this one has."""
    names = ("student_entropy", "teacher_entropy", "top_k_overlap")
    return [name for name in names if name in analysis.whole.numbers.position.values]


def entropy(analysis: Analysis) -> Figure:
    """Entropies, and the overlap of the most probable tokens, by position."""
    names = _optional(analysis)
    figure, axes = _panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for phase, colour in _phases(analysis):
            _by_position(axis, phase, name, colour, phase.name)
        unit = "share" if name == "top_k_overlap" else "nats"
        axis.set(title=name.replace("_", " ").capitalize(), xlabel="token position in the response", ylabel=unit)
    axes[0].legend(loc="upper right")
    return figure


# ── By relative position ─────────────────────────────────────────────────────────────────────────────────────────────


def spent(analysis: Analysis) -> Figure:
    """Share of the signal that the first part of a response holds, and where the signal changes."""
    figure, (curve, level) = _panels(2)
    percent = np.arange(101)
    curve.plot(percent, percent / 100, color=GREY, lw=1, ls="--", label="no bias")
    several = len(analysis.phases) > 1
    shown = [(analysis.whole, "#0f172a"), *(_phases(analysis) if several else ())]
    for phase, colour in shown:
        _estimates(curve, percent, phase.spent(), colour, phase.name)
        signal = phase.numbers.relative
        if len(signal.tokens_P):
            middle = (np.arange(len(signal.tokens_P)) + 0.5) * 100 / BINS
            mean, half = signal.mean("abs_advantage"), signal.half_width("abs_advantage")
            _band(level, middle, mean, mean - half, mean + half, colour, phase.name)
    curve.axvline(PREFIX_PERCENT, color=GREY, lw=0.8, ls=":")
    if drift := analysis.verdict.drift:
        for axis in (curve, level):
            ends = 100 * drift.at.low, 100 * drift.at.high
            axis.axvspan(*ends, color="#facc15", alpha=0.35, lw=0, label="change, 95 %")
            axis.axvline(100 * drift.at.value, color="#ca8a04", lw=1)
    curve.set(title="Signal spent", xlabel="first part of the response", ylabel="share of Σ|A|", xlim=(0, 100))
    level.set(title="Discrepancy |A|", xlabel="position in the response", ylabel="mean |A| (nats)", xlim=(0, 100))
    curve.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in (curve, level):
        axis.xaxis.set_major_formatter(PercentFormatter())
    curve.legend(loc="upper left")
    return figure


def heatmap(analysis: Analysis) -> Figure:
    """Mean |A| by step and relative position."""
    figure, (axis,) = _panels(1, 3.4)
    grid = np.stack([step.signal_P for step in analysis.steps], axis=1)
    # A step's own mean is taken out of the colours, or the first steps would be all that is seen.
    scaled = grid / np.maximum(np.nanmean(grid, axis=0, keepdims=True), 1e-12)
    numbers = [step.step for step in analysis.steps]
    span = (numbers[0] - 0.5, numbers[-1] + 0.5, 0, 100)
    top = max(2.0, float(np.nanquantile(scaled, 0.98))) if np.isfinite(scaled).any() else 2.0
    image = axis.imshow(scaled, origin="lower", aspect="auto", extent=span, cmap="magma_r", vmin=0, vmax=top)
    figure.colorbar(image, ax=axis, label="|A| over the step's mean")
    axis.set(title="Where each step's signal lies", xlabel="training step", ylabel="position in the response")
    axis.yaxis.set_major_formatter(PercentFormatter())
    axis.grid(False)
    return figure


# ── By step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps(analysis: Analysis) -> Figure:
    """Reverse KL, discrepancy and the share of the beginning by training step (Figure 3a)."""
    figure, axes = _panels(3)
    numbers = [step.step for step in analysis.steps]
    for name, colour in (("k1", EARLY), ("k3", LATE)):
        _estimates(axes[0], numbers, [step.means[name] for step in analysis.steps], colour, name)
    _estimates(axes[1], numbers, [step.means["abs_advantage"] for step in analysis.steps], EARLY, None)
    _estimates(axes[2], numbers, [step.share for step in analysis.steps], EARLY, None)
    axes[2].axhline(PREFIX_PERCENT / 100, color=GREY, lw=1, ls="--")
    axes[0].set(title="Reverse KL", ylabel="nats a token")
    axes[1].set(title="Discrepancy |A|", ylabel="mean |A| (nats)")
    axes[2].set(title=f"Share of the signal in the first {PREFIX_PERCENT} %", ylabel="share of Σ|A|", ylim=(0, None))
    axes[2].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes:
        axis.set(xlabel="training step")
    axes[0].legend(loc="upper right")
    return figure


def accuracy(analysis: Analysis) -> Figure:
    """The students' accuracy by step."""
    assert analysis.accuracy is not None
    setting = {"label": "student", "curve": analysis.accuracy["curve"]}
    return _accuracy(analysis.accuracy["bench"], [setting], analysis.accuracy["teachers"])


def comparison(found: Mapping[str, Any]) -> Figure:
    """Accuracy by step of several settings, their seeds as bands (Figures 1a and 2a)."""
    with matplotlib.rc_context(STYLE):
        return _accuracy(found["bench"], found["settings"], {}, found["target"])


def _accuracy(
    bench: str, settings: Sequence[Mapping[str, Any]], teachers: Mapping[str, float], target: float | None = None
) -> Figure:
    figure, (axis,) = _panels(1)
    for setting, colour in zip(settings, cycle(COLOURS), strict=False):
        curve = setting["curve"]
        step, mean, low, high = ([point[name] for point in curve] for name in ("step", "accuracy", "low", "high"))
        seeds = curve[0]["seeds"]
        label = setting["label"] + (f", {seeds} seeds" if seeds > 1 else "")
        _band(axis, step, mean, low, high, colour, label, marker="o", markersize=3.5)
    for name, value in teachers.items():
        axis.axhline(value, color=GREY, lw=1, ls="--", label=name)
    if target is not None:
        axis.axhline(target, color=GREY, lw=0.8, ls=":", label=f"target {target:.1%}")
    axis.set(title=f"Accuracy on {bench}", xlabel="training step", ylabel="accuracy", ylim=(0, 1.02))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="lower right")
    return figure


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ratios(analysis: Analysis) -> list[str]:
    return [name for name in analysis.weights if name.startswith("prefix_ratio")]


def prefix_ratio(analysis: Analysis) -> Figure:
    """The ideal prefix ratio by position for several exponents (Figure 4a)."""
    return _weights(analysis, _ratios(analysis))


def weights(analysis: Analysis) -> Figure:
    """Each token weight by position (Figure 4c)."""
    ratios = _ratios(analysis)
    return _weights(analysis, [name for name in analysis.weights if name not in ratios] or ratios)


def _weights(analysis: Analysis, names: Sequence[str]) -> Figure:
    figure, axes = _panels(len(analysis.phases), sharey=True)
    for axis, (phase, _) in zip(axes, _phases(analysis), strict=True):
        for name, colour in zip(names, cycle(COLOURS), strict=False):
            _by_position(axis, phase, name, colour, name)
        axis.set(title=phase.name, xlabel="token position in the response", ylabel="mean weight")
    axes[0].legend(fontsize=8.5, loc="upper right")
    return figure


def one_response(analysis: Analysis) -> Figure:
    """One response, token by token: its discrepancy, the prefix ratios, the other weights (Figure 4b)."""
    sample, ratios = analysis.samples[0], _ratios(analysis)
    figure, axes = _panels(3 if ratios else 2)
    position = np.arange(1, len(sample.tokens) + 1)
    axes[0].vlines(position, 0, sample.tokens.advantage_T, color=EARLY, lw=1.2)
    axes[0].set(title="Advantage A", ylabel="nats")
    others = [name for name in analysis.weights if name not in ratios]
    for axis, names, title in ((axes[1], others, "Weights"), (axes[-1], ratios, "Prefix ratios")):
        for name, colour in zip(names, cycle(COLOURS), strict=False):
            axis.plot(position, sample.weights[name], color=colour, lw=1.2, label=name)
        if names:
            axis.set(title=title, ylabel="weight")
            axis.legend(fontsize=8.5, loc="upper right")
    for axis in axes:
        axis.set_xlabel("token position")
    return figure


# ── Continuations ────────────────────────────────────────────────────────────────────────────────────────────────────


def continuations(analysis: Analysis) -> Figure:
    """Accuracy of teacher and student that go on from the student's prefixes, by their length (Figure 1b)."""
    figure, axes = _panels(len(analysis.continuations), sharey=True)
    for axis, found in zip(axes, analysis.continuations, strict=True):
        rows = continuation_rows(found)
        models = list(dict.fromkeys(row["model"] for row in rows))
        for model, colour in zip(models, (LATE, *(c for c in COLOURS if c != LATE)), strict=False):
            for prefix, line in (("any", "-"), ("right so far", ":"), ("gone wrong", "--")):
                own = [row for row in rows if row["model"] == model and row["prefix"] == prefix]
                percent, mean = ([row[column] for row in own] for column in ("percent", "accuracy"))
                if prefix == "any":
                    low, high = ([row[column] for row in own] for column in ("low", "high"))
                    _band(axis, percent, mean, low, high, colour, model, marker="o", markersize=3.5)
                elif own:
                    axis.plot(percent, mean, color=colour, lw=1, ls=line, label=f"{model}, prefix {prefix}")
        axis.set(title=f"Prefixes of the student of step {found['step']}", xlabel="length of the prefix")
        axis.set(ylabel="accuracy", ylim=(-0.02, 1.02))
        axis.xaxis.set_major_formatter(PercentFormatter())
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].legend(fontsize=8.5)
    return figure
