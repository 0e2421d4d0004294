"""The figures of analyze-position.

This module plots numbers and computes none. Figure numbers in parentheses are those of arXiv 2606.22600.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from operator import itemgetter
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from opdctl.analysis.captions import property_title
from opdctl.analysis.comparison_figures import learning_curves_figure
from opdctl.analysis.curves import PositionCurve
from opdctl.analysis.plotting import BLACK, BLUE, COLORS, GREY, ORANGE, STYLE, make_panels, plot_band, plot_estimates
from opdctl.analysis.position_sums import BINS, PREFIX_PERCENT
from opdctl.analysis.results import Analysis, Phase, continuation_rows, ratio_table
from opdctl.evaluation.statistics import Estimate

MIN_SHOWN_RATIO = 1e-4


def draw_figures(analysis: Analysis) -> dict[str, Figure]:
    """Return the figures that the analysis has numbers for, by name, in the order of the report."""
    figures: dict[str, tuple[bool, Callable[[Analysis], Figure]]] = {
        "position": (True, position_figure),
        "cumulative_signal": (True, cumulative_signal_figure),
        "steps": (len(analysis.steps) > 1, steps_figure),
        "heatmap": (len(analysis.steps) > 1, heatmap_figure),
        "prefix_logp": (True, prefix_logp_figure),
        "entropy": (bool(_optional_quantities(analysis)), entropy_figure),
        "weights": (True, weights_figure),
        "prefix_ratio": (_has_ratios(analysis), prefix_ratio_figure),
        "one_response": (bool(analysis.samples), one_response_figure),
        "correlations": (analysis.has_correlations(), correlations_figure),
        "continuations": (bool(analysis.continuations), continuations_figure),
        "accuracy": (analysis.accuracy is not None, accuracy_figure),
    }
    with matplotlib.rc_context(STYLE):
        return {name: draw(analysis) for name, (has_numbers, draw) in figures.items() if has_numbers}


# ── By position ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _plot_by_position(axis: Axes, phase: Phase, name: str, color: str, label: str | None, **line: Any) -> None:
    _plot_curve(axis, phase.by_position(name), color, label, **line)


def _plot_curve(axis: Axes, curve: PositionCurve, color: str, label: str | None, **line: Any) -> None:
    plot_band(axis, curve.middle_L, curve.mean_L, curve.low_L, curve.high_L, color, label, **line)


def _phase_colors(analysis: Analysis) -> Iterator[tuple[Phase, str]]:
    return zip(analysis.phases, (ORANGE, BLUE), strict=False)


def position_figure(analysis: Analysis) -> Figure:
    """Discrepancy, reverse KL and the recipe's weight by token position (Figure 3b)."""
    recipe_weight = analysis.weights[0]
    panels = {
        "abs_advantage": ("Discrepancy |A|", "mean |A| (nats)"),
        "k1": ("Reverse KL, sampled (k1)", "mean −A (nats)"),
        recipe_weight: (f"Token weight: {recipe_weight}", "mean weight"),
    }
    figure, axes = make_panels(len(panels))
    for axis, (name, (title, label)) in zip(axes, panels.items(), strict=True):
        for phase, color in _phase_colors(analysis):
            _plot_by_position(axis, phase, name, color, phase.name)
        axis.set(title=title, xlabel="token position in the response", ylabel=label)
    axes[0].legend(loc="upper left")
    return figure


def prefix_logp_figure(analysis: Analysis) -> Figure:
    """Log-prob of the student's prefixes under student and teacher (Figure 3c)."""
    figure, axes = make_panels(len(analysis.phases), sharey=True)
    for axis, (phase, _) in zip(axes, _phase_colors(analysis), strict=True):
        _plot_by_position(axis, phase, "student_prefix_logp", BLUE, "student")
        _plot_by_position(axis, phase, "teacher_prefix_logp", ORANGE, "teacher")
        axis.set(title=phase.name, xlabel="prefix length (tokens)", ylabel="mean log-prob of the prefix (nats)")
    axes[0].legend(loc="lower left")
    return figure


def _optional_quantities(analysis: Analysis) -> list[str]:
    """Return the quantities that a run stores on request only, and that this run has."""
    names = ("student_entropy", "teacher_entropy", "top_k_overlap")
    return [name for name in names if name in analysis.all_steps.numbers.position.values]


def entropy_figure(analysis: Analysis) -> Figure:
    """Entropies and top-k overlap by position."""
    names = _optional_quantities(analysis)
    figure, axes = make_panels(len(names))
    for axis, name in zip(axes, names, strict=True):
        for phase, color in _phase_colors(analysis):
            _plot_by_position(axis, phase, name, color, phase.name)
        unit = "fraction" if name == "top_k_overlap" else "nats"
        axis.set(title=name.replace("_", " ").capitalize(), xlabel="token position in the response", ylabel=unit)
    axes[0].legend(loc="upper right")
    return figure


# ── By relative position ─────────────────────────────────────────────────────────────────────────────────────────────


def cumulative_signal_figure(analysis: Analysis) -> Figure:
    """Cumulative signal and mean |A| by relative position, with the change point."""
    figure, (cumulative, level) = make_panels(2)
    percent = np.arange(101)
    cumulative.plot(percent, percent / 100, color=GREY, lw=1, ls="--", label="no bias")
    phases = _phase_colors(analysis) if len(analysis.phases) > 1 else ()
    for phase, color in [(analysis.all_steps, BLACK), *phases]:
        plot_estimates(cumulative, percent, phase.cumulative_signal(), color, phase.name)
        if phase.numbers.tokens:
            _plot_curve(level, phase.by_relative_position("abs_advantage"), color, phase.name)
    cumulative.axvline(PREFIX_PERCENT, color=GREY, lw=0.8, ls=":")
    if change := analysis.bias.change_point:
        for axis in (cumulative, level):
            interval = 100 * change.position.low, 100 * change.position.high
            axis.axvspan(*interval, color="#facc15", alpha=0.35, lw=0, label="change point, 95%")
            axis.axvline(100 * change.position.value, color="#ca8a04", lw=1)
    position = "position in the response"
    cumulative.set(title="Cumulative signal", xlabel=position, ylabel="fraction of Σ|A|", xlim=(0, 100))
    level.set(title="Discrepancy |A|", xlabel=position, ylabel="mean |A| (nats)", xlim=(0, 100))
    cumulative.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in (cumulative, level):
        axis.xaxis.set_major_formatter(PercentFormatter())
    cumulative.legend(loc="upper left")
    return figure


def heatmap_figure(analysis: Analysis) -> Figure:
    """Mean |A| by step and relative position, relative to the mean of the step."""
    figure, (axis,) = make_panels(1, 3.4)
    first, last = analysis.steps[0].step, analysis.steps[-1].step
    signal_LI = np.full((BINS, last - first + 1), np.nan)  # a missing step is an empty column
    for step in analysis.steps:
        signal_LI[:, step.step - first] = step.signal_L
    # Without the division, the first steps would take up the complete color scale.
    tokens_I = np.maximum(np.isfinite(signal_LI).sum(0), 1)
    scaled_LI = signal_LI / np.maximum(np.nansum(signal_LI, axis=0) / tokens_I, 1e-12)
    extent = (first - 0.5, last + 0.5, 0, 100)
    vmax = max(2.0, float(np.nanquantile(scaled_LI, 0.98))) if np.isfinite(scaled_LI).any() else 2.0
    image = axis.imshow(scaled_LI, origin="lower", aspect="auto", extent=extent, cmap="magma_r", vmin=0, vmax=vmax)
    figure.colorbar(image, ax=axis, label="|A| / mean |A| of the step")
    axis.set(title="Signal by step and position", xlabel="training step", ylabel="position in the response")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter())
    axis.grid(False)
    return figure


# ── By step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def steps_figure(analysis: Analysis) -> Figure:
    """Reverse KL, also relative to the first step, discrepancy, and signal in the prefix by step (Figure 3a)."""
    figure, (kl, relative, level, prefix) = make_panels(4, rows=2)
    steps, numbers = analysis.steps, [step.step for step in analysis.steps]
    for name, color in (("k1", ORANGE), ("k3", BLUE)):
        _plot_by_step(kl, numbers, [step.means[name] for step in steps], color, name)
    _plot_by_step(relative, numbers, analysis.relative_kl(), ORANGE, None)
    _plot_by_step(level, numbers, [step.means["abs_advantage"] for step in steps], ORANGE, None)
    _plot_by_step(prefix, numbers, [step.prefix_fraction for step in steps], ORANGE, None)
    relative.axhline(1, color=GREY, lw=1, ls="--")
    prefix.axhline(PREFIX_PERCENT / 100, color=GREY, lw=1, ls="--")
    kl.set(title="Reverse KL", ylabel="nats per token")
    relative.set(title=f"Reverse KL (k1) relative to step {numbers[0]}", ylabel="ratio", ylim=(0, None))
    level.set(title="Discrepancy |A|", ylabel="mean |A| (nats)", ylim=(0, None))
    prefix.set(title=f"Signal in the first {PREFIX_PERCENT}%", ylabel="fraction of Σ|A|", ylim=(0, None))
    prefix.yaxis.set_major_formatter(PercentFormatter(1))
    relative.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in (kl, relative, level, prefix):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (level, prefix):
        axis.set(xlabel="training step")
    kl.legend(loc="upper right")
    return figure


def _plot_by_step(
    axis: Axes, steps: Sequence[int], estimates: Sequence[Estimate], color: str, label: str | None
) -> None:
    """Plot estimates by step. A missing step is a gap, and a step alone between gaps is a dot."""
    known, missing = dict(zip(steps, estimates, strict=True)), Estimate(math.nan, math.nan, math.nan)
    every = range(steps[0], steps[-1] + 1)
    plot_estimates(axis, every, [known.get(step, missing) for step in every], color, label)
    alone = [step for step in steps if step - 1 not in known and step + 1 not in known]
    axis.plot(alone, [known[step].value for step in alone], ".", color=color)


def accuracy_figure(analysis: Analysis) -> Figure:
    """Accuracy of the students by step, with that of the teachers."""
    assert analysis.accuracy is not None
    setting = {"label": "student", "curve": analysis.accuracy["curve"]}
    return learning_curves_figure(analysis.accuracy["bench"], [setting], analysis.accuracy["teachers"])


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _has_ratios(analysis: Analysis) -> bool:
    """Whether prefix ratios are shown, and enough responses reach a position."""
    return bool(analysis.prefix_ratios()) and any(len(phase.shown_positions()) for phase in analysis.phases)


def prefix_ratio_figure(analysis: Analysis) -> Figure:
    """The ideal prefix ratio by position for several exponents, and its effective sample size (Figure 4a)."""
    names = analysis.prefix_ratios()
    figure, axes = make_panels(2 * len(names), 3.2, rows=2, sharex=True, sharey="row")
    for name, ratio, size in zip(names, axes[: len(names)], axes[len(names) :], strict=True):
        for phase, color in _phase_colors(analysis):
            table = ratio_table(phase, name)
            position = table["position"]
            plot_band(ratio, position, table["median"], table["low"], table["high"], color, phase.name)
            size.plot(position, table["effective_sample_size"], color=color, lw=1.4)
        _set_ratio_scale(ratio)
        ratio.set(title=name, xscale="log")
        ratio.xaxis.set_major_formatter("{x:g}")
        size.set(xlabel="token position", ylim=(0, 1.02))
        size.yaxis.set_major_formatter(PercentFormatter(1))
    axes[0].set(ylabel="ratio: median, 10–90%")
    axes[len(names)].set(ylabel="effective sample size")
    axes[len(names)].legend(
        axes[0].get_lines(), [phase.name for phase in analysis.phases], fontsize=8.5, loc="lower left"
    )
    return figure


def _set_ratio_scale(axis: Axes) -> None:
    """Show ratios on a log axis from MIN_SHOWN_RATIO: those of a great alpha are 0 after some tokens."""
    greatest = max((float(np.max(line.get_ydata(), initial=1.0)) for line in axis.get_lines()), default=1.0)
    axis.set(yscale="log", ylim=(MIN_SHOWN_RATIO, 10 * greatest))
    axis.yaxis.set_major_formatter("{x:g}")


def weights_figure(analysis: Analysis) -> Figure:
    """Each token weight by position (Figure 4c)."""
    ratios = analysis.prefix_ratios()
    return _weights_by_position(analysis, [name for name in analysis.weights if name not in ratios] or ratios)


def _weights_by_position(analysis: Analysis, names: Sequence[str]) -> Figure:
    figure, axes = make_panels(len(analysis.phases), sharey=True)
    for axis, (phase, _) in zip(axes, _phase_colors(analysis), strict=True):
        for name, color in zip(names, cycle(COLORS), strict=False):
            _plot_by_position(axis, phase, name, color, name, ls=_line_style(name))
        axis.set(title=phase.name, xlabel="token position in the response", ylabel="mean weight")
    axes[0].legend(fontsize=8.5, loc="upper right")
    return figure


def _line_style(name: str) -> str:
    """Return the style of a weight's line: signed weights are often equal to the unsigned ones below them."""
    return "--" if "signed=true" in name else "-"


def one_response_figure(analysis: Analysis) -> Figure:
    """One response, token by token: advantage, weights and prefix ratios (Figure 4b)."""
    sample, ratios = analysis.samples[0], analysis.prefix_ratios()
    figure, axes = make_panels(3 if ratios else 2)
    position_T = np.arange(1, len(sample.tokens) + 1)
    axes[0].vlines(position_T, 0, sample.tokens.advantage_T, color=ORANGE, lw=1.2)
    axes[0].set(title="Advantage A", ylabel="nats")
    weights = [name for name in analysis.weights if name not in ratios]
    for axis, names, title in ((axes[1], weights, "Weights"), (axes[-1], ratios, "Prefix ratios")):
        for name, color in zip(names, cycle(COLORS), strict=False):
            axis.plot(position_T, sample.weights[name], color=color, lw=1.2, ls=_line_style(name), label=name)
        if names:
            axis.set(title=title, ylabel="weight")
            axis.legend(fontsize=8.5)
    for axis in axes:
        axis.set_xlabel("token position")
    if ratios:
        _set_ratio_scale(axes[-1])
    return figure


# ── Properties of the tokens ─────────────────────────────────────────────────────────────────────────────────────────


def correlations_figure(analysis: Analysis) -> Figure:
    """Rank correlations of the discrepancy with properties of the tokens, raw and partial."""
    figure, axes = make_panels(len(analysis.phases), sharey=True)
    for axis, phase in zip(axes, analysis.phases, strict=True):
        row = np.arange(len(phase.correlations))
        for kind, color, offset in (("raw", ORANGE, -0.13), ("partial", BLUE, 0.13)):
            estimates = [getattr(correlation, kind) for correlation in phase.correlations]
            axis.plot([each.value for each in estimates], row + offset, "o", color=color, ms=5, label=kind)
            axis.hlines(
                row + offset, [each.low for each in estimates], [each.high for each in estimates], color=color, lw=2
            )
        axis.axvline(0, color=GREY, lw=1)
        axis.set(title=phase.name, xlabel="rank correlation with |A|", xlim=(-1.03, 1.03))
        axis.set_yticks(row, [property_title(correlation.name) for correlation in phase.correlations])
    axes[0].invert_yaxis()  # shared by the panels
    axes[0].legend(loc="lower right")
    return figure


# ── Continuations ────────────────────────────────────────────────────────────────────────────────────────────────────


def continuations_figure(analysis: Analysis) -> Figure:
    """Accuracy of teacher and student from the student's prefixes, by relative and absolute length (Figure 1b)."""
    panels = [
        (summary["step"], unit, rows)
        for summary in analysis.continuations
        for unit in ("percent", "tokens")
        if (rows := [row for row in continuation_rows(summary) if row[unit] is not None])
    ]
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(12.5, 3.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis, (step, unit, rows) in zip(axes, panels, strict=False):
        models = list(dict.fromkeys(row["model"] for row in rows))
        for model, color in zip(models, (BLUE, *(c for c in COLORS if c != BLUE)), strict=False):
            rows_of_model = sorted((row for row in rows if row["model"] == model), key=itemgetter(unit))
            _plot_any_prefix(axis, rows_of_model, unit, model, color)
            _plot_prefixes_of_kind(axis, rows_of_model, unit, model, color, "right so far", ":")
            _plot_prefixes_of_kind(axis, rows_of_model, unit, model, color, "gone wrong", "--")
        axis.set_title(f"Prefixes of the student of step {step}", pad=18)
        axis.set(xlabel=f"prefix length{' (tokens)' if unit == 'tokens' else ''}", ylabel="accuracy")
        axis.set(ylim=(-0.02, 1.02))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        if unit == "percent":
            axis.xaxis.set_major_formatter(PercentFormatter())
        _annotate_responses(axis, [row for row in rows if (row["model"], row["prefix"]) == (models[0], "any")], unit)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8.5)
    return figure


def _annotate_responses(axis: Axes, rows: Sequence[Mapping[str, Any]], unit: str) -> None:
    """Write the number of continued responses above the panel, at up to 12 of the prefix lengths."""
    shown = [row for row in rows if row["responses"] is not None][:: 1 + len(rows) // 12]
    for index, row in enumerate(shown):
        text = f"{row['responses']} responses" if index == 0 else str(row["responses"])
        position = (row[unit], 1.02)
        axis.text(*position, text, transform=axis.get_xaxis_transform(), color=GREY, fontsize=8, ha="center")


def _plot_any_prefix(axis: Axes, rows: Sequence[Mapping[str, Any]], unit: str, model: str, color: str) -> None:
    """Plot a model's accuracy from any prefix, with its interval."""
    columns = (unit, "accuracy", "low", "high")
    length, mean, low, high = ([row[name] for row in rows if row["prefix"] == "any"] for name in columns)
    plot_band(axis, length, mean, low, high, color, model, marker="o", markersize=3.5)


def _plot_prefixes_of_kind(
    axis: Axes, rows: Sequence[Mapping[str, Any]], unit: str, model: str, color: str, prefix: str, line_style: str
) -> None:
    """Plot a model's accuracy from prefixes that are right so far, or that have gone wrong, if there are any."""
    length, mean = ([row[name] for row in rows if row["prefix"] == prefix] for name in (unit, "accuracy"))
    if length:
        axis.plot(length, mean, color=color, lw=1, ls=line_style, label=f"{model}, prefix {prefix}")
