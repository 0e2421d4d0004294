"""What analyze-position writes: report.html, one file that needs no network, and figures and tables beside it.

Whatever stems from a model, a prompt or a recipe reaches the page through the template's escaping alone.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from opdctl.analysis import captions, figures
from opdctl.analysis.position_bias import PREFIX_PERCENT, PositionBias
from opdctl.analysis.results import Analysis, Table, columns, rows
from opdctl.analysis.samples import SHADES, Sample, printable, shade_range
from opdctl.artifacts import files, tables
from opdctl.evaluation.stats import Estimate

SHOWN = 2000  # tokens of a response in the report
TITLES = {
    "position": "Discrepancy, reverse KL and token weight by position",
    "spent": "How the signal is spread over a response",
    "steps": "By training step",
    "heat": "By training step and position",
    "prefix_logp": "Log-prob of the student’s prefixes under student and teacher",
    "entropy": "How sure student and teacher are",
    "weights": "Token weights by position",
    "prefix_ratio": "The ideal prefix ratio for several exponents",
    "one_response": "One response, token by token",
    "continuations": "Going on from the student’s prefixes",
    "accuracy": "Accuracy by step",
}


def write_report(folder: Path, analysis: Analysis) -> dict[str, Any]:
    """Write report.html, summary.json, figures and tables under `folder` and return their paths and the summary."""
    drawn = figures.draw(analysis)
    for old in ("figures", "tables"):
        files.remove_directory(folder / old)
    images = {name: figures.as_bytes(figure, "svg") for name, figure in drawn.items()}
    paths = []
    for name, figure in drawn.items():
        for kind, data in (("png", figures.as_bytes(figure, "png")), ("svg", images[name])):
            paths.append(folder / "figures" / f"{name}.{kind}")
            files.write_bytes(paths[-1], data)
    table_files = [
        path
        for name, table in analysis.tables().items()
        for path in tables.write_table(folder / "tables" / name, table)
    ]
    files.write_json(folder / "summary.json", analysis.summary())
    files.write_text(folder / "report.html", page(analysis, images))
    return {
        "report": str(folder / "report.html"),
        "figures": [str(path) for path in paths],
        "tables": [str(path) for path in table_files],
        "summary": analysis.summary(),
    }


def page(analysis: Analysis, images: Mapping[str, bytes]) -> str:
    """Return the report as HTML, the figures of `images` (SVG) within it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        resources.files("opdctl.analysis").joinpath("report.html").read_text(encoding="utf-8")
    )
    said = captions.figure_captions(analysis)
    return template.render(
        analysis=analysis,
        about=captions.about(analysis),
        verdict=_verdict(analysis.verdict),
        rules=captions.RULES,
        figures=[
            {"name": name, "title": TITLES[name], "sentence": said[name], "image": base64.b64encode(image).decode()}
            for name, image in images.items()
        ],
        tables=[_shown(*each) for each in _tables(analysis)],
        samples=_samples(analysis.samples),
        scales={by: shade_range(analysis.samples, by) for by in SHADES},
    )


def write_comparison(folder: Path, found: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the figure and the tables of compared runs, a benchmark each, and return their paths."""
    paths = []
    for each in found:
        figure = figures.comparison(each)
        for kind in ("png", "svg"):
            paths.append(folder / f"{each['bench']}.{kind}")
            files.write_bytes(paths[-1], figures.as_bytes(figure, kind))
        points = [{"setting": s["label"], **point} for s in each["settings"] for point in s["curve"]]
        paths += tables.write_table(folder / each["bench"], columns(points))
    return paths


# ── Parts of the page ────────────────────────────────────────────────────────────────────────────────────────────────


def _verdict(verdict: PositionBias) -> dict[str, Any]:
    tiles = []
    if verdict.share is not None:
        tiles.append(_tile(f"share of the first {PREFIX_PERCENT} %", verdict.share, ".1%"))
    if verdict.drift is not None:
        tiles.append(_tile("change, and fraction", verdict.drift.at, ".0%"))
    if verdict.gamma is not None and verdict.multiplier is not None:
        tiles += [
            _tile("gamma of iw_opd", verdict.gamma, ".2f"),
            _tile("multiplier of prefix_boost", verdict.multiplier, ".2f"),
        ]
    css = {"none found": "none"}.get(verdict.bias, verdict.bias)
    return {"css": css, "headline": captions.headline(verdict), "more": captions.suggestions(verdict), "tiles": tiles}


def _tile(what: str, found: Estimate, form: str) -> dict[str, str]:
    value = f"{found.value:{form}}" if math.isfinite(found.value) else "none is enough"
    low, high = (f"{bound:{form}}" if math.isfinite(bound) else "∞" for bound in (found.low, found.high))
    return {"what": what, "value": value, "interval": "" if low == "∞" else f"95 %: {low} to {high}"}


def _tables(analysis: Analysis) -> list[tuple[str, Table, bool]]:
    found = [
        ("Token weights: mean, effective sample size, share of the first 30 % of the weighted signal", "weights", True)
    ]
    found += [("By twentieths of the response", "relative", False), ("By training step", "steps", False)]
    found += [("Continuations", "continuations", False)] if analysis.continuations else []
    found_tables = analysis.tables()
    return [(title, found_tables[name], shown) for title, name, shown in found]


def _shown(title: str, table: Table, shown: bool) -> dict[str, Any]:
    """Return a table with each value and its interval in one cell."""
    names = [name for name in table if not name.endswith(("_low", "_high"))]
    body = [[_cell(row, name) for name in names] for row in rows(table)]
    return {"title": title, "header": [name.replace("_", " ") for name in names], "rows": body, "open": shown}


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if math.isnan(value):
        return "–"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return f"{value:.4g}" + ("" if low is None or math.isnan(low) else f" [{low:.4g}, {high:.4g}]")


def weight_lines(analysis: Analysis) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the weights' table for the terminal: the header, and a row a weight."""
    shown = _shown("", analysis.weight_table(), True)
    return tuple(shown["header"]), shown["rows"]


def _samples(shown: Sequence[Sample]) -> list[dict[str, Any]]:
    scales = {by: shade_range(shown, by) for by in SHADES}
    return [_tokens(sample, {by: sample.shade(by, own) for by, own in scales.items()}) for sample in shown]


def _tokens(sample: Sample, shades: Mapping[str, np.ndarray]) -> dict[str, Any]:
    texts = [printable(piece) for piece in sample.pieces[:SHOWN]]
    return {
        "title": sample.title(),
        "prompt": printable(sample.prompt),
        "tokens": [
            {
                "text": text,
                "a": f"{shades['signal'][t]:.2f}",
                "w": f"{shades['weight'][t]:.2f}",
                "note": _note(sample, t),
            }
            for t, text in enumerate(texts)
        ],
        "cut": len(sample.pieces) - len(texts),
    }


def _note(sample: Sample, t: int) -> str:
    numbers = sample.tokens
    lines = [
        f"token {t + 1}: A = {numbers.advantage_T[t]:+.3f} nats",
        f"log p student {numbers.student_logp_T[t]:.3f}, teacher {numbers.teacher_logp_T[t]:.3f}",
    ]
    return "\n".join([*lines, *(f"{name} {weight_T[t]:.3f}" for name, weight_T in sample.weights.items())])
