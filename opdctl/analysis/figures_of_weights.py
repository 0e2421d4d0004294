"""The figures of token weights: by position, the ideal prefix ratio, and the weights of one response.

This module plots numbers and computes none. Figure numbers in parentheses are those of arXiv 2606.22600.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from opdctl.analysis.phase import Phase
from opdctl.analysis.phase_tables import ratio_table
from opdctl.analysis.plotting import (
    GREY,
    ORANGE,
    Panel,
    curve_panel,
    plot_band,
    plot_counts,
    plot_line,
    series_styles,
    set_log_scale,
    use_percent,
)
from opdctl.analysis.results import Analysis

MAX_DRAWN_TOKENS = 4000
"""Tokens of one response in its figure: the report has a point for each, in each curve."""
MIN_SHOWN_RATIO = 1e-4
"""The least prefix ratio that is shown: those of a great alpha are 0 after some tokens."""


def weight_panels(analysis: Analysis) -> list[Panel]:
    """Each token weight by relative position over all responses, and by token position over long ones (Figure 4c)."""
    styles = series_styles(_shown_weights(analysis))
    return [
        panel
        for phase in analysis.phases
        if phase.numbers.tokens
        for panel in (
            curve_panel(
                phase.name,
                "position in the response",
                "mean weight",
                {name: (phase.by_relative_position(name), style) for name, style in styles.items()},
                lambda axis: use_percent(axis, "x"),
            ),
            curve_panel(
                f"{phase.name}, at least {phase.common_length} tokens",
                "token position in the response",
                "mean weight",
                {name: (phase.by_position_of_long(name), style) for name, style in styles.items()},
            ),
        )
    ]


def _shown_weights(analysis: Analysis) -> list[str]:
    """Return the weights without the prefix ratios, whose means are 1; these if there are no others."""
    ratios = analysis.prefix_ratios()
    return [name for name in analysis.weights if name not in ratios] or ratios


def prefix_ratio_panels(analysis: Analysis) -> list[Panel]:
    """The ideal prefix ratio by position for several exponents, and its effective sample size (Figure 4a)."""
    names = analysis.prefix_ratios()
    phases = [phase for phase in analysis.phases if names and phase.numbers.tokens]
    return [panel for phase in phases for panel in _ratio_panels(phase, names)]


def _ratio_panels(phase: Phase, names: Sequence[str]) -> list[Panel]:
    tables, styles = {name: ratio_table(phase, name) for name in names}, series_styles(names)
    table = tables[names[0]]

    def draw_ratio(axis: Axes) -> None:
        for name, table in tables.items():
            x, mean, low, high = (table[column] for column in ("to_position", "median", "low", "high"))
            plot_band(axis, x, mean, low, high, label=name, **styles[name])
        use_token_axis(axis)
        set_log_scale(axis, 4)

    def draw_size(axis: Axes) -> None:
        for name, table in tables.items():
            plot_line(axis, table["to_position"], table["effective_sample_size"], label=name, **styles[name])
        use_token_axis(axis)
        use_percent(axis, "y")

    def draw_counts(axis: Axes) -> None:
        plot_counts(axis, table["to_position"], table["responses"], GREY, "")

    greatest = max(max(table["median"], default=1.0) for table in tables.values())
    position = "token position (logarithmic)"
    return [
        Panel(
            f"Ratio, {phase.name}", position, "median, 10–90%", draw_ratio, draw_counts,
            (MIN_SHOWN_RATIO, 10 * max(greatest, 1.0)),
        ),
        Panel(
            f"Effective sample size, {phase.name}", position, "fraction of the tokens", draw_size, draw_counts,
            (0, 1.02),
        ),
    ]  # fmt: skip


def use_token_axis(axis: Axes) -> None:
    """Show token positions on a logarithmic axis."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def one_response_panels(analysis: Analysis) -> list[Panel]:
    """One response, token by token: advantage, weights and prefix ratios (Figure 4b)."""
    if not analysis.samples:
        return []
    sample, ratios = analysis.samples[0], analysis.prefix_ratios()
    length = min(len(sample.tokens), MAX_DRAWN_TOKENS)
    position_T, position = np.arange(1, length + 1), "token position"
    if length < len(sample.tokens):
        position += f" (first {length:,} of {len(sample.tokens):,})"

    def draw_advantage(axis: Axes) -> None:
        gap_T = np.full(len(position_T), np.nan)
        stems = np.stack([np.zeros(len(position_T)), sample.tokens.advantage_T[:length], gap_T], axis=1).ravel()
        axis.plot(np.repeat(position_T, 3), stems, color=ORANGE, lw=1.2, gid="stems")
        axis.axhline(0, color=GREY, lw=1)

    def draw_weights(axis: Axes, names: Sequence[str]) -> None:
        for name, style in series_styles(names).items():
            plot_line(axis, position_T, sample.weights[name][:length], label=name, **style)

    def draw_ratios(axis: Axes) -> None:
        draw_weights(axis, ratios)
        set_log_scale(axis, 4)

    names = [name for name in analysis.weights if name not in ratios]
    panels = [Panel("Advantage A", position, "nats", draw_advantage)]
    panels += [Panel("Token weights", position, "weight", lambda axis: draw_weights(axis, names))] if names else []
    if not ratios:
        return panels
    greatest = max(float(sample.weights[name].max(initial=1.0)) for name in ratios)
    limits = (MIN_SHOWN_RATIO, 10 * greatest)
    return [*panels, Panel("Prefix ratios", position, "ratio", draw_ratios, y_limits=limits)]
