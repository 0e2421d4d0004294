"""The figures of analyze-position: by position, by relative position, by step, and of the tokens' properties.

This module plots numbers and computes none. Figure numbers in parentheses are those of arXiv 2606.22600.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opdctl.analysis.captions import figure_captions, optional_quantities, property_title
from opdctl.analysis.comparison_figures import learning_curve_panel
from opdctl.analysis.correlations import Correlation
from opdctl.analysis.figures_of_continuations import continuation_panels
from opdctl.analysis.figures_of_weights import one_response_panels, prefix_ratio_panels, weight_panels
from opdctl.analysis.phase import ALL_RESPONSES, TRUNCATED, Phase
from opdctl.analysis.plotting import (
    BLACK,
    BLUE,
    COLORS,
    GREY,
    ORANGE,
    Panel,
    curve_panel,
    plot_estimates,
    plot_reference,
    scale_by_step,
    series_styles,
    use_integer_ticks,
    use_percent,
)
from opdctl.analysis.position_sums import BINS, PREFIX_PERCENT
from opdctl.analysis.results import Analysis
from opdctl.evaluation.statistics import Estimate

POSITION, RELATIVE_POSITION = "token position in the response", "position in the response"


@dataclass(frozen=True)
class FigureContent:
    """A figure of the report. panels: of an analysis, none if it has no numbers for them. tables: their numbers."""

    title: str
    panels: Callable[[Analysis], list[Panel]]
    tables: tuple[str, ...] = ()


def figure_panels(analysis: Analysis) -> dict[str, list[Panel]]:
    """Return the panels of the figures that the analysis has numbers for, by name, in the order of the report: those
    that have a caption."""
    captions = figure_captions(analysis)
    return {name: figure.panels(analysis) for name, figure in FIGURES.items() if name in captions}


def _phase_colors(analysis: Analysis) -> Iterator[tuple[Phase, dict[str, str]]]:
    """Return the phases that have curves by position, with their colors."""
    phases = [phase for phase in analysis.phases if phase.numbers.tokens]
    return zip(phases, ({"color": color} for color in COLORS), strict=False)


# ── By position ──────────────────────────────────────────────────────────────────────────────────────────────────────


def position_panels(analysis: Analysis) -> list[Panel]:
    """Discrepancy, reverse KL and the recipe's weight by token position (Figure 3b)."""
    own_weight, phases = analysis.weights[0], list(_phase_colors(analysis))
    return [
        curve_panel(title, POSITION, y, {phase.name: (phase.by_position(name), style) for phase, style in phases})
        for name, title, y in (
            ("abs_advantage", "Discrepancy |A|", "mean |A| (nats)"),
            ("k1", "Reverse KL, sampled (k1)", "mean k1 (nats)"),
            (own_weight, f"Token weight: {own_weight}", "mean weight"),
        )
    ]


def cohort_panels(analysis: Analysis) -> list[Panel]:
    """Discrepancy by token position for responses of similar length, and for the truncated ones."""
    cohorts = {label: cohorts for phase in analysis.phases for label, cohorts in phase.cohorts.items()}
    labels = sorted(cohorts.keys() - {ALL_RESPONSES}, key=lambda label: (label == TRUNCATED, min(cohorts[label])))
    styles = series_styles(labels)  # a cohort has the same color in each phase
    return [
        curve_panel(
            phase.name,
            POSITION,
            "mean |A| (nats)",
            {label: (phase.by_position("abs_advantage", label), styles[label]) for label in labels if label in shown},
        )
        for phase in analysis.phases
        if len(shown := phase.cohorts) > 1
    ]


def prefix_logp_panels(analysis: Analysis) -> list[Panel]:
    """Log-prob of the student's prefixes under student and teacher (Figure 3c)."""
    colors = {"student": BLUE, "teacher": ORANGE}
    return [
        curve_panel(
            phase.name,
            "prefix length (tokens)",
            "log-prob of the prefix (nats)",
            {
                model: (
                    phase.cumulative_logp(model),
                    {"color": color, "ls": "-" if model == "student" else "--"},
                )
                for model, color in colors.items()
            },
        )
        for phase in analysis.phases
        if phase.shown_bins()
    ]


def entropy_panels(analysis: Analysis) -> list[Panel]:
    """Entropies and top-k overlap by position, which a run stores on request only."""
    return [
        curve_panel(
            name.replace("_", " ").capitalize(),
            POSITION,
            "fraction of the top k" if name == "top_k_overlap" else "nats",
            {phase.name: (phase.by_position(name), style) for phase, style in _phase_colors(analysis)},
        )
        for name in optional_quantities(analysis)
    ]


# ── By relative position ─────────────────────────────────────────────────────────────────────────────────────────────


def relative_panels(analysis: Analysis) -> list[Panel]:
    """Cumulative signal and mean |A| by relative position, with the change point."""
    phases: list[tuple[Phase, dict[str, str]]] = [(analysis.all_steps, {"color": BLACK})]
    phases += _phase_colors(analysis) if len(analysis.phases) > 1 else ()
    percent = np.arange(101)

    def draw_cumulative(axis: Axes) -> None:
        axis.plot(percent, percent / 100, color=GREY, lw=1, ls="--", label="no position bias", gid="reference")
        for phase, style in phases:
            plot_estimates(axis, percent, phase.cumulative_signal(), label=phase.name, **style)
        axis.axvline(PREFIX_PERCENT, color=GREY, lw=0.8, ls=":", label=f"first {PREFIX_PERCENT}%")
        _mark_change_point(axis, analysis)
        _use_relative_axis(axis)
        use_percent(axis, "y")

    def adapt(axis: Axes) -> None:
        _mark_change_point(axis, analysis)
        _use_relative_axis(axis)

    curves = {phase.name: (phase.by_relative_position("abs_advantage"), style) for phase, style in phases}
    return [
        Panel("Cumulative signal", RELATIVE_POSITION, "fraction of Σ|A|", draw_cumulative),
        curve_panel("Discrepancy |A|", RELATIVE_POSITION, "mean |A| (nats)", curves, adapt),
    ]


def _mark_change_point(axis: Axes, analysis: Analysis) -> None:
    if change := analysis.bias.change_point:
        interval = 100 * change.position.low, 100 * change.position.high
        axis.axvspan(*interval, color="#facc15", alpha=0.35, lw=0, label="change point, 95%")
        axis.axvline(100 * change.position.value, color="#ca8a04", lw=1)


def _use_relative_axis(axis: Axes) -> None:
    axis.set_xlim(0, 100)
    use_percent(axis, "x")


# ── By step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def step_panels(analysis: Analysis) -> list[Panel]:
    """Reverse KL, also relative to the first step, discrepancy, and signal in the prefix by step (Figure 3a)."""
    steps = analysis.steps
    of = {name: [step.means[name] for step in steps] for name in ("k1", "k3", "abs_advantage")}
    fraction = {
        "of the signal": [step.prefix_fraction for step in steps],
        "of a response’s own, mean": [step.own_fraction for step in steps],
    }
    bias = (PREFIX_PERCENT / 100, f"{PREFIX_PERCENT}%: no position bias")
    return [
        _by_step(analysis, "Reverse KL", "nats per token", {name: of[name] for name in ("k1", "k3")}),
        _by_step(
            analysis, f"k1 relative to step {steps[0].step}", "ratio", {"k1": analysis.relative_kl()},
            (1.0, f"step {steps[0].step}"), is_fraction=True,
        ),
        _by_step(analysis, "Discrepancy |A|", "mean |A| (nats)", {"|A|": of["abs_advantage"]}),
        _by_step(
            analysis, f"Signal in the first {PREFIX_PERCENT}%", "fraction of Σ|A|", fraction, bias, is_fraction=True
        ),
    ]  # fmt: skip


def _by_step(
    analysis: Analysis,
    title: str,
    y: str,
    estimates: dict[str, list[Estimate]],
    reference: tuple[float, str] | None = None,
    *,
    is_fraction: bool = False,
) -> Panel:
    """Return a panel of estimates by step. A missing step is a gap."""
    steps = [step.step for step in analysis.steps]
    every, missing = range(steps[0], steps[-1] + 1), Estimate(math.nan, math.nan, math.nan)

    def draw(axis: Axes) -> None:
        for (name, values), color in zip(estimates.items(), (ORANGE, BLUE), strict=False):
            known = dict(zip(steps, values, strict=True))
            plot_estimates(axis, every, [known.get(step, missing) for step in every], color, name)
        if reference:
            plot_reference(axis, *reference)
        _mark_changes(axis, analysis)
        scale_by_step(axis)
        if is_fraction:
            use_percent(axis, "y")
        use_integer_ticks(axis)

    return Panel(title, "training step", y, draw)


def _mark_changes(axis: Axes, analysis: Analysis) -> None:
    """Mark the steps before which the recipe changed."""
    for step in analysis.changed_at():
        axis.axvline(step - 0.5, color=GREY, lw=1, ls="-.", label="the recipe changed")


def heatmap_panels(analysis: Analysis) -> list[Panel]:
    """Mean |A| by step and relative position, relative to the mean of the step."""
    first, last = analysis.steps[0].step, analysis.steps[-1].step
    signal_LI = np.full((BINS, last - first + 1), np.nan)  # a missing step is an empty column
    for step in analysis.steps:
        signal_LI[:, step.step - first] = step.signal_L
    # Without the division, the first steps would take up the complete color scale.
    tokens_I = np.maximum(np.isfinite(signal_LI).sum(0), 1)
    scaled_LI = signal_LI / np.maximum(np.nansum(signal_LI, axis=0) / tokens_I, 1e-12)
    limit = max(2.0, float(np.nanquantile(scaled_LI, 0.98))) if np.isfinite(scaled_LI).any() else 2.0
    is_cut = bool((scaled_LI > limit).any())

    def draw(axis: Axes) -> None:
        extent = (first - 0.5, last + 0.5, 0, 100)
        image = axis.imshow(
            scaled_LI, origin="lower", aspect="auto", extent=extent, cmap="viridis", vmin=0, vmax=limit,
            interpolation="nearest",
        )  # fmt: skip
        _mark_changes(axis, analysis)
        figure = axis.get_figure()
        assert figure is not None
        bar = figure.colorbar(image, ax=axis, extend="max" if is_cut else "neither", ticks=MaxNLocator(5))
        bar.set_label(f"|A| / mean of the step ({'cut at' if is_cut else 'up to'} {limit:.3g})")
        use_integer_ticks(axis)
        axis.yaxis.set_major_formatter("{x:g}%")
        axis.grid(False)

    return [Panel("Signal by step and position", "training step", RELATIVE_POSITION, draw)]


def accuracy_panels(analysis: Analysis) -> list[Panel]:
    """Accuracy of the students by step, with that of the teachers."""
    if analysis.accuracy is None:
        return []
    setting = {"label": "student", "curve": analysis.accuracy["curve"]}
    return [learning_curve_panel(analysis.accuracy["bench"], [setting], analysis.accuracy["teachers"])]


# ── Properties of the tokens ─────────────────────────────────────────────────────────────────────────────────────────


def correlation_panels(analysis: Analysis) -> list[Panel]:
    """Rank correlations of the discrepancy with properties of the tokens, raw and partial."""
    return [_correlation_panel(phase.name, phase.correlations) for phase in analysis.phases if phase.correlations]


def _correlation_panel(title: str, correlations: Sequence[Correlation]) -> Panel:
    def draw(axis: Axes) -> None:
        row = np.arange(len(correlations))
        for kind, color, offset in (("raw", ORANGE, -0.13), ("partial", BLUE, 0.13)):
            estimates = [getattr(correlation, kind) for correlation in correlations]
            values, low, high = ([getattr(each, name) for each in estimates] for name in ("value", "low", "high"))
            axis.plot(values, row + offset, "o", color=color, ms=5, label=kind)
            axis.hlines(row + offset, low, high, color=color, lw=2)
        axis.axvline(0, color=GREY, lw=1)
        axis.set(xlim=(-1.03, 1.03), ylim=(len(row) - 0.5, -0.5), xticks=(-1, -0.5, 0, 0.5, 1))
        axis.set_yticks(row, [property_title(correlation.name) for correlation in correlations])

    return Panel(title, "rank correlation with |A|", "", draw)


FIGURES = {
    "position": FigureContent("Discrepancy, reverse KL and token weight by position", position_panels, ("position",)),
    "cumulative_signal": FigureContent(
        "Distribution of the signal over a response", relative_panels, ("cumulative_signal", "relative")
    ),
    "steps": FigureContent("By training step", step_panels, ("steps",)),
    "heatmap": FigureContent("By training step and position", heatmap_panels, ("steps_relative",)),
    "cohorts": FigureContent("Discrepancy by position for responses of similar length", cohort_panels, ("cohorts",)),
    "prefix_logp": FigureContent(
        "Log-prob of the student’s prefixes under student and teacher", prefix_logp_panels, ("prefix_logp",)
    ),
    "entropy": FigureContent("Entropies and top-k overlap of student and teacher", entropy_panels, ("position",)),
    "weights": FigureContent("Token weights by position", weight_panels, ("relative", "weights_of_long")),
    "prefix_ratio": FigureContent(
        "The ideal prefix ratio for several exponents", prefix_ratio_panels, ("prefix_ratio",)
    ),
    "one_response": FigureContent("One response, token by token", one_response_panels, ("one_response",)),
    "correlations": FigureContent(
        "Rank correlation of the discrepancy with properties of the tokens", correlation_panels, ("correlations",)
    ),
    "continuations": FigureContent("Accuracy from the student’s prefixes", continuation_panels, ("continuations",)),
    "accuracy": FigureContent("Accuracy by step", accuracy_panels, ("accuracy",)),
}
"""The figures in the order of the report."""
