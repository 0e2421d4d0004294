"""The output of analyze-position: report.html, one file without network access, and figures and tables beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdctl.analysis import figures
from opdctl.analysis.page import render_page
from opdctl.analysis.page_svg import render_panel
from opdctl.analysis.paper import write_overview
from opdctl.analysis.plotting import Panel, compose, figure_bytes
from opdctl.analysis.results import Analysis
from opdctl.artifacts import files, tables

FIGURE_FORMATS = ("pdf", "png")
PAPER_FILE = "paper.md"


def write_report(folder: Path, analysis: Analysis, *, for_paper: bool = False) -> dict[str, Any]:
    """Write report.html, summary.json and tables under `folder` and return their paths and the summary.

    for_paper: also write the figures as files, and the table of the paper's figures.
    """
    panels = figures.figure_panels(analysis)
    for name in ("figures", "tables"):
        files.remove_directory(folder / name)
    figure_paths = []
    if for_paper:
        figure_paths = [path for name in panels for path in write_figure(folder / "figures" / name, panels[name])]
        write_overview(folder / PAPER_FILE, analysis)
    else:
        (folder / PAPER_FILE).unlink(missing_ok=True)
    table_paths = [
        path
        for name, table in analysis.tables().items()
        for path in tables.write_table(folder / "tables" / name, table)
    ]
    files.write_json(folder / "summary.json", analysis.summary())
    rendered = {name: render_panels(panels[name], name) for name in panels}
    files.write_text(folder / "report.html", render_page(analysis, rendered, has_files=for_paper))
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
