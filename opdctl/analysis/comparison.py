"""The files of `opdctl compare --output`: figures and tables of several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from opdctl.analysis.by_size import by_size_rows, size_axis
from opdctl.analysis.comparison_figures import by_size_panels, comparison_figures, comparison_panels
from opdctl.analysis.page import render_template, table_section
from opdctl.analysis.phase_tables import to_columns
from opdctl.analysis.plotting import Panel
from opdctl.analysis.report import render_panels, write_figure
from opdctl.analysis.result_formats import FORMATS
from opdctl.analysis.run_comparison import RunComparison
from opdctl.artifacts import files, tables
from opdctl.evaluation.result_table import ResultTable

SUFFIXES = {"csv": "csv", "markdown": "md", "latex": "tex"}


def write_curves(folder: Path, comparisons: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write a figure and a table of the accuracy by step for each column, and return their paths."""
    paths = []
    for comparison in comparisons:
        points = [{"setting": s["label"], **point} for s in comparison["settings"] for point in s["curve"]]
        paths += _write(folder / comparison["bench"], comparison_panels(comparison), points)
    return paths


def write_comparison_report(
    folder: Path, comparison: RunComparison, accuracies: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write report.html of several runs with its figures and tables, and return the paths.

    accuracies: the comparisons of learning curves.
    """
    titles = {"signal": "The teacher’s signal in the last phase", "signal_by_step": "By training step"}
    captions = {"signal": " ".join(comparison.difference_sentences()), "signal_by_step": ""}
    figures = dict(comparison_figures(comparison))
    paths = [path for name, panels in figures.items() for path in write_figure(folder / name, panels)]
    table = comparison.difference_table()
    paths += tables.write_table(folder / "differences", table)
    for each in accuracies:
        figures[each["bench"]] = comparison_panels(each)
        titles[each["bench"]] = f"Accuracy on {each['bench']}"
        captions[each["bench"]] = f"{each['problems']} problems."
    page = render_template(
        "comparison.html",
        title="Comparison of runs",
        lines=comparison.lines(),
        figures=[
            {
                "name": name,
                "title": titles[name],
                "caption": captions[name],
                "panels": [Markup(panel) for panel in render_panels(panels, name)],
                "files": [f"{name}.pdf", f"{name}.png"],
            }
            for name, panels in figures.items()
        ],
        tables=[table_section("differences", "Last phases, and differences to the first run", table, is_open=True)],
    )
    files.write_text(folder / "report.html", page)
    return [folder / "report.html", *paths]


def write_result_table(folder: Path, table: ResultTable) -> list[Path]:
    """Write the table of results in every format and return the paths."""
    contents = {folder / f"results.{SUFFIXES[name]}": render(table) for name, render in FORMATS.items()}
    for path, text in contents.items():
        files.write_text(path, text)
    return list(contents)


def write_by_size(folder: Path, table: ResultTable) -> list[Path]:
    """Write the accuracy by model size as a figure and a table and return their paths: none if there is one size."""
    rows = by_size_rows(table)
    if not rows:
        return []
    return _write(folder / "by_size", by_size_panels(rows, size_axis(rows), table.columns[-1].name), rows)


def _write(path: Path, panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    return [*write_figure(path, panels), *tables.write_table(path, to_columns(rows))]
