"""The table of compared runs as text, CSV, Markdown and LaTeX. Reads and writes no files."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opdctl.evaluation.compared_runs import AVERAGE
from opdctl.evaluation.result_table import ResultCell, ResultRow, ResultTable
from opdctl.evaluation.statistics import Estimate

LEFT_COLUMNS = 1  # left-justified
LATEX_CHARACTERS = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
}


@dataclass(frozen=True)
class Field:
    """One field of the printed table: a number or a label, which may be bold, and the spread of the number."""

    main: str
    spread: str = ""
    is_bold: bool = False


@dataclass(frozen=True)
class Layout:
    """The printed table, whatever the format. notes: what the numbers are, as sentences."""

    header: Sequence[str]
    rows: Sequence[Sequence[Field]]
    notes: Sequence[str]

    def text_rows(self) -> list[list[str]]:
        return [[f"{field.main} {field.spread}".rstrip() for field in row] for row in self.rows]


def lay_out(table: ResultTable) -> Layout:
    """Return the printed table: a line for each row, and one with the differences to its baseline if it has one.

    Accuracies are in percent, differences in percentage points. Bold is the highest mean of a column among the settings
    of a pair of models.
    """
    names = [column.name for column in table.columns]
    lines = []
    for row in table.rows:
        accuracies = [_accuracy_field(row.cells[name], _is_best(table, row, name)) for name in names]
        lines.append([Field(row.label), Field(_format_steps(row)), Field(str(len(row.models))), *accuracies])
        if row.pairing:
            differences = [_difference_field(row.cells[name]) for name in names]
            lines.append([Field(f"difference to {table.baseline}"), Field(""), Field(""), *differences])
    return Layout(("setting", "step", "seeds", *names), lines, _notes(table))


def _format_steps(row: ResultRow) -> str:
    steps = [str(model.step) for model in row.models if model.step is not None]
    return ", ".join(steps if len(set(steps)) > 1 else steps[:1]) or "–"


def _accuracy_field(cell: ResultCell, is_bold: bool) -> Field:
    mean = f"{100 * cell.mean.value:.1f}"
    if math.isnan(cell.deviation):
        return Field(mean, _scale(cell.mean).format_interval(".1f"), is_bold)
    return Field(mean, f"± {100 * cell.deviation:.1f}", is_bold)


def _difference_field(cell: ResultCell) -> Field:
    assert cell.difference is not None
    scaled = _scale(cell.difference)
    return Field(_sign(f"{scaled.value:+.1f}"), _sign(scaled.format_interval("+.1f")))


def _sign(number: str) -> str:
    return number.replace("-", "−")


def _scale(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _is_best(table: ResultTable, row: ResultRow, column: str) -> bool:
    """Whether no setting of the same pair of models has a higher mean, as printed; False without another one."""
    if row.setting is None:
        return False
    same_pair = [each for each in table.rows if each.setting and each.setting.pair == row.setting.pair]
    means = [round(100 * each.cells[column].mean.value, 1) for each in same_pair]
    return len(means) > 1 and round(100 * row.cells[column].mean.value, 1) == max(means)


def _notes(table: ResultTable) -> list[str]:
    counts = {len(row.models) > 1 for row in table.rows}
    spreads = ["of several seeds ± their standard deviation"] * (True in counts)
    spreads += ["of a single seed [95% interval over problems]"] * (False in counts)
    selection = {
        "last": "the newest step of each run that is evaluated on all columns",
        "best": f"of each run the step with the highest {table.columns[-1].name}, which is optimistic, since it was "
        "selected on the same problems",
    }
    notes = [f"Accuracy in percent, {', '.join(spreads)}.", f"Students: {selection.get(table.at, f'step {table.at}')}."]
    if pairings := sorted({row.pairing for row in table.rows if row.pairing}):
        notes.append(f"Differences in points [95% interval, {' or '.join(pairings)}].")
    for column in table.columns:
        if len(column.weights) > 1 and column.name != AVERAGE:
            notes.append(f"{column.name}: the {column.problems} problems of {' and '.join(column.weights)}.")
    if table.columns[-1].name == AVERAGE:
        notes.append(f"{AVERAGE}: the mean over the other columns.")
    return notes


# ── Formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def table_records(table: ResultTable) -> list[dict[str, Any]]:
    """Return one record for each row and column, with unrounded fractions. None: there is no such number."""
    return [
        {
            "setting": row.label,
            "benchmark": column.name,
            "problems": column.problems,
            "seeds": row.seeds,
            "steps": [model.step for model in row.models],
            "n": len(row.models),
            "mean": cell.mean.value,
            "sd": None if math.isnan(cell.deviation) else cell.deviation,
            "low": cell.mean.low,
            "high": cell.mean.high,
            "difference": cell.difference.value if cell.difference else None,
            "difference_low": cell.difference.low if cell.difference else None,
            "difference_high": cell.difference.high if cell.difference else None,
            "pairing": row.pairing,
        }
        for row in table.rows
        for column in table.columns
        for cell in (row.cells[column.name],)
    ]


def to_csv(table: ResultTable) -> str:
    """Return the records as CSV. Seeds and steps are separated by spaces."""
    records, buffer = table_records(table), io.StringIO()
    writer = csv.DictWriter(buffer, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    for record in records:
        lists = {key: " ".join("" if each is None else str(each) for each in record[key]) for key in ("seeds", "steps")}
        writer.writerow(record | lists)
    return buffer.getvalue()


def to_markdown(table: ResultTable) -> str:
    """Return the table in Markdown, with the notes below."""
    layout = lay_out(table)
    alignment = ["---"] * LEFT_COLUMNS + ["---:"] * (len(layout.header) - LEFT_COLUMNS)
    rows = [[_join(field, escape_markdown, "**{}**") for field in row] for row in layout.rows]
    lines = [f"| {' | '.join(cells)} |" for cells in ([*map(escape_markdown, layout.header)], alignment, *rows)]
    return "\n".join([*lines, "", escape_markdown(" ".join(layout.notes)), ""])


def to_latex(table: ResultTable) -> str:
    """Return the table as a `tabular` of the package booktabs, with the notes as comments."""
    layout = lay_out(table)
    rows = [" & ".join(_join(field, escape_latex, r"\textbf{{{}}}") for field in row) + r" \\" for row in layout.rows]
    lines = [
        "% \\usepackage{booktabs}",
        *(f"% {note}" for note in layout.notes),
        f"\\begin{{tabular}}{{{'l' * LEFT_COLUMNS}{'r' * (len(layout.header) - LEFT_COLUMNS)}}}",
        "\\toprule",
        " & ".join(map(escape_latex, layout.header)) + r" \\",
        "\\midrule",
        *rows,
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join([*lines, ""])


FORMATS: dict[str, Callable[[ResultTable], str]] = {"csv": to_csv, "markdown": to_markdown, "latex": to_latex}


def _join(field: Field, escape: Callable[[str], str], bold: str) -> str:
    main = escape(field.main)
    return f"{bold.format(main) if field.is_bold else main} {escape(field.spread)}".rstrip()


def escape_markdown(text: str) -> str:
    r"""Return the text with a backslash before what a Markdown table interprets: escape_markdown("a|b") is "a\|b"."""
    return re.sub(r"([\\|*`<])", r"\\\1", text)


def escape_latex(text: str) -> str:
    r"""Return the text for LaTeX: escape_latex("iw_opd 30%") is "iw\_opd 30\%"."""
    return "".join(LATEX_CHARACTERS.get(character, character) for character in text)
