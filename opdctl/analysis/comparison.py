"""The files of `opdctl compare --output`: figures and tables of several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdctl.analysis.by_size import by_size_rows, size_axis
from opdctl.analysis.comparison_figures import by_size_panels, comparison_panels
from opdctl.analysis.phase_tables import to_columns
from opdctl.analysis.plotting import Panel
from opdctl.analysis.report import write_figure
from opdctl.analysis.result_formats import FORMATS
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
