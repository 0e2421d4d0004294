"""The page of the report: one HTML file that loads nothing.

Text from a model, a prompt or a recipe reaches the page through escaping only. The content security policy allows the
page's own style sheet and script, by their digests, and images within the page.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from opdctl.analysis import captions, verdict
from opdctl.analysis.figures import FIGURES
from opdctl.analysis.glossary import GLOSSARY, link_terms
from opdctl.analysis.phase_tables import TableColumns, table_rows
from opdctl.analysis.position_bias import BIAS_CONFIDENCE_LEVEL
from opdctl.analysis.results import Analysis
from opdctl.analysis.token_view import sample_sections, shade_choices
from opdctl.evaluation.statistics import CONFIDENCE_LEVEL, Estimate

MAX_SHOWN_ROWS = 100
"""Rows of a table in the page; a longer table has its first and last ones."""
TABLE_TITLES = {
    "weights": "Token weights: mean, effective sample size, weighted signal in the first 30%",
    "relative": "By twentieths of the response",
    "steps": "By training step",
    "correlations": "Rank correlation of |A| with properties of the tokens",
    "continuations": "Continuations",
}
"""The tables of the page by name; all are files beside it."""


def render_page(analysis: Analysis, panels: Mapping[str, Sequence[str]], *, has_files: bool) -> str:
    """Return the report as HTML.

    panels: of each figure by its name, as elements of the page. has_files: whether the figures are files beside it.
    """
    return render_template(
        "report.html",
        analysis=analysis,
        has_files=has_files,
        overview=link_terms(verdict.overview(analysis)),
        direction=analysis.direction().removesuffix(" found"),
        answers=[
            (each.question, link_terms(each.headline), link_terms(each.details)) for each in verdict.answers(analysis)
        ],
        tiles=_tiles(analysis),
        method_notes=map(link_terms, verdict.METHOD_NOTES),
        figures=_figure_sections(analysis, panels),
        tables=_table_sections(analysis),
        samples=sample_sections(analysis.samples),
        shades=shade_choices(analysis.samples),
        training=_training_section(analysis),
        glossary=GLOSSARY,
    )


def render_template(name: str, **values: Any) -> str:
    """Return a page with the style sheet and the script of the report, which its content security policy allows."""
    style, script = _read("report.css"), _read("report.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    policy = _content_security_policy(style, script)
    return environment.from_string(_read(name)).render(
        policy=policy, style=Markup(style), script=Markup(script), **values
    )


def _read(name: str) -> str:
    return resources.files("opdctl.analysis").joinpath(name).read_text(encoding="utf-8")


def _content_security_policy(style: str, script: str) -> str:
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in {"style-src": style, "script-src": script}.items()
    }
    allowed = "; ".join(f"{name} 'sha256-{digest}'" for name, digest in digests.items())
    return f"default-src 'none'; img-src data:; {allowed}; base-uri 'none'; form-action 'none'"


# ── Sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tiles(analysis: Analysis) -> list[dict[str, str]]:
    """Return the estimates of the signal in the prefix over all steps, and the change point."""
    bias = analysis.bias
    tiles = [
        _tile(verdict.estimate_label(each), each.fraction, ".1%", BIAS_CONFIDENCE_LEVEL) for each in bias.estimates
    ]
    if bias.change_point is not None:
        tiles.append(_tile("change point", bias.change_point.position, ".0%", CONFIDENCE_LEVEL))
    return tiles


def _tile(label: str, estimate: Estimate, spec: str, level: float) -> dict[str, str]:
    interval = f"{level:.0%}: {estimate.format_interval(spec) or 'too few prompts'}"
    return {"label": label, "value": f"{estimate.value:{spec}}", "interval": interval}


def _figure_sections(analysis: Analysis, panels: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    caption, known_tables = captions.figure_captions(analysis), analysis.tables()
    return [
        {
            "name": name,
            "title": FIGURES[name].title,
            "caption": link_terms(caption[name]),
            "panels": [Markup(panel) for panel in drawn],
            "thirds": len(drawn) == 3 or len(drawn) > 4,
            "tables": [table for table in FIGURES[name].tables if table in known_tables],
        }
        for name, drawn in panels.items()
    ]


def _training_section(analysis: Analysis) -> list[dict[str, str]]:
    """Return the training phases with their weights, objectives and changed settings; none if there is one."""
    if len(analysis.training) < 2:
        return []
    return [
        {
            "steps": phase.name,
            "objective": phase.objective,
            "weight": phase.weight,
            "changes": ", ".join(
                f"{key}: {'–' if old is None else old} → {'–' if new is None else new}"
                for key, old, new in phase.changes
            ),
        }
        for phase in analysis.training
    ]


def _table_sections(analysis: Analysis) -> list[dict[str, Any]]:
    all_tables = analysis.tables()
    return [
        table_section(name, title, all_tables[name], is_open=name == "weights")
        for name, title in TABLE_TITLES.items()
        if name in all_tables
    ]


def table_section(name: str, title: str, table: TableColumns, *, is_open: bool) -> dict[str, Any]:
    """Return a table with each value and its interval in one cell."""
    names = [name for name in table if not name.endswith(("_low", "_high"))]
    rows = table_rows(table)
    omitted = max(len(rows) - MAX_SHOWN_ROWS, 0)
    if omitted:
        rows = rows[: MAX_SHOWN_ROWS // 2] + rows[-MAX_SHOWN_ROWS // 2 :]
    return {
        "name": name,
        "title": title,
        "header": [name.replace("_", " ") for name in names],
        "rows": [[_format_cell(row, name) for name in names] for row in rows],
        "omitted": omitted,
        "open": is_open,
    }


def _format_cell(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return Estimate(value, row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)).format(".4g")


def format_weight_table(analysis: Analysis) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the table of the weights for the terminal: the header and a row for each weight."""
    section = table_section("weights", "", analysis.weight_table(), is_open=True)
    rows = [row[1:] for row in section["rows"] if row[0] == analysis.all_steps.name]
    return tuple(section["header"][1:]), rows
