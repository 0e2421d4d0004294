"""The output of analyze-position: report.html, one file without network access, and figures and tables beside it.

Text from a model, a prompt or a recipe reaches the page through the escaping of the template only.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from opdctl.analysis import captions, figures, verdict
from opdctl.analysis.page_svg import render_panel
from opdctl.analysis.phase_tables import TableColumns, table_rows
from opdctl.analysis.plotting import Panel, compose, figure_bytes
from opdctl.analysis.position_bias import BIAS_CONFIDENCE_LEVEL, PositionBias
from opdctl.analysis.results import Analysis
from opdctl.analysis.samples import SHADES, Sample, printable, shade_range
from opdctl.artifacts import files, tables
from opdctl.evaluation.statistics import CONFIDENCE_LEVEL, Estimate

MAX_REPORT_TOKENS = 2000  # tokens of a response in the report
FIGURE_FORMATS = ("pdf", "png")


def write_report(folder: Path, analysis: Analysis) -> dict[str, Any]:
    """Write report.html, summary.json, figures and tables under `folder` and return their paths and the summary."""
    panels = figures.figure_panels(analysis)
    for name in ("figures", "tables"):
        files.remove_directory(folder / name)
    figure_paths = [path for name in panels for path in write_figure(folder / "figures" / name, panels[name])]
    table_paths = [
        path
        for name, table in analysis.tables().items()
        for path in tables.write_table(folder / "tables" / name, table)
    ]
    files.write_json(folder / "summary.json", analysis.summary())
    images = {name: render_panels(panels[name], name) for name in panels}
    files.write_text(folder / "report.html", render_page(analysis, images))
    return {
        "report": str(folder / "report.html"),
        "figures": [str(path) for path in figure_paths],
        "tables": [str(path) for path in table_paths],
        "summary": analysis.summary(),
    }


def write_figure(path: Path, panels: Sequence[Panel]) -> list[Path]:
    """Write panels as one figure in each format and return the paths. path: without a suffix."""
    figure = compose(panels)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in FIGURE_FORMATS]
    for each in paths:
        files.write_bytes(each, figure_bytes(figure, each.suffix[1:]))
    return paths


def render_panels(panels: Sequence[Panel], name: str) -> list[str]:
    """Return the panels of a figure as elements of the page."""
    return [render_panel(panel, f"{name}-{number}") for number, panel in enumerate(panels)]


def render_page(analysis: Analysis, images: Mapping[str, Sequence[str]]) -> str:
    """Return the report as HTML. images: the panels of each figure, by its name, as `render_panels` returns them."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        resources.files("opdctl.analysis").joinpath("report.html").read_text(encoding="utf-8")
    )
    caption = captions.figure_captions(analysis)
    return template.render(
        analysis=analysis,
        overview=verdict.overview(analysis),
        bias=_bias_section(analysis.bias),
        method_notes=verdict.METHOD_NOTES,
        figures=[
            {
                "name": name,
                "title": figures.FIGURES[name].title,
                "caption": caption[name],
                "panels": [Markup(panel) for panel in panels],
            }
            for name, panels in images.items()
        ],
        tables=_table_sections(analysis),
        samples=_sample_sections(analysis.samples),
        shade_ranges={by: shade_range(analysis.samples, by) for by in SHADES},
    )


# ── Sections of the page ─────────────────────────────────────────────────────────────────────────────────────────────


def _bias_section(bias: PositionBias) -> dict[str, Any]:
    tiles = [
        _tile(verdict.estimate_label(each), each.fraction, ".1%", BIAS_CONFIDENCE_LEVEL) for each in bias.estimates
    ]
    if bias.change_point is not None:
        tiles.append(_tile("change point", bias.change_point.position, ".0%", CONFIDENCE_LEVEL))
    return {
        "css_class": bias.direction.removesuffix(" found"),
        "result": verdict.bias_sentence(bias),
        "change_point": verdict.change_point_sentence(bias),
        "tiles": tiles,
    }


def _tile(label: str, estimate: Estimate, spec: str, level: float) -> dict[str, str]:
    interval = f"{level:.0%}: {estimate.format_interval(spec) or 'too few prompts'}"
    return {"label": label, "value": f"{estimate.value:{spec}}", "interval": interval}


def _table_sections(analysis: Analysis) -> list[dict[str, Any]]:
    titles = {
        "weights": "Token weights: mean, effective sample size, weighted signal in the first 30%",
        "relative": "By twentieths of the response",
        "steps": "By training step",
        "correlations": "Rank correlation of |A| with properties of the tokens",
        "continuations": "Continuations",
    }
    all_tables = analysis.tables()
    return [
        _table_section(title, all_tables[name], is_open=name == "weights")
        for name, title in titles.items()
        if name in all_tables
    ]


def _table_section(title: str, table: TableColumns, *, is_open: bool) -> dict[str, Any]:
    """Return a table with each value and its interval in one cell."""
    names = [name for name in table if not name.endswith(("_low", "_high"))]
    cells = [[_format_cell(row, name) for name in names] for row in table_rows(table)]
    return {"title": title, "header": [name.replace("_", " ") for name in names], "rows": cells, "open": is_open}


def _format_cell(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return Estimate(value, row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)).format(".4g")


def format_weight_table(analysis: Analysis) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the table of the weights for the terminal: the header and a row for each weight."""
    section = _table_section("", analysis.weight_table(), is_open=True)
    rows = [row[1:] for row in section["rows"] if row[0] == analysis.all_steps.name]
    return tuple(section["header"][1:]), rows


def _sample_sections(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    ranges = {by: shade_range(samples, by) for by in SHADES}
    return [
        _sample_section(sample, {by: sample.shade(by, value_range) for by, value_range in ranges.items()})
        for sample in samples
    ]


def _sample_section(sample: Sample, shades: Mapping[str, np.ndarray]) -> dict[str, Any]:
    shown = [(printable(piece), t) for piece, t in itertools.islice(sample.numbered_pieces(), MAX_REPORT_TOKENS)]
    return {
        "title": sample.title(),
        "prompt": printable(sample.prompt),
        "tokens": [
            {
                "text": text,
                "signal_shade": f"{shades['signal'][t]:.2f}",
                "weight_shade": f"{shades['weight'][t]:.2f}",
                "tooltip": _tooltip(sample, t),
            }
            if t is not None
            else {"text": text}
            for text, t in shown
        ],
        "omitted": len(sample.pieces) - len(shown),
    }


def _tooltip(sample: Sample, t: int) -> str:
    tokens = sample.tokens
    lines = [
        f"token {t + 1}: A = {tokens.advantage_T[t]:+.3f} nats",
        f"log p student {tokens.student_logp_T[t]:.3f}, teacher {tokens.teacher_logp_T[t]:.3f}",
    ]
    return "\n".join([*lines, *(f"{name} {weight_T[t]:.3f}" for name, weight_T in sample.weights.items())])
