"""The table of compared runs as text, CSV, Markdown and LaTeX."""

import csv
import io
from pathlib import Path

import pytest
from helpers.evaluations import plant_run

from opdctl.analysis.result_formats import escape_latex, escape_markdown, lay_out, to_csv, to_latex, to_markdown
from opdctl.evaluation.compared_runs import load_compared_runs
from opdctl.evaluation.result_table import ResultTable, tabulate_results

PATTERNS = {"uniform": ("10000000", "11000000"), "iw_opd": ("11100000", "11110000")}


@pytest.fixture
def table(tmp_path: Path) -> ResultTable:
    """Two settings with two seeds on two benchmarks, and the teacher of one run."""
    paths = [
        plant_run(
            tmp_path / f"{weight}-{seed}",
            {"perm": {8: "10", "teacher": "11"}, "sort12": {8: pattern, "teacher": "11111110"}},
            f"weight.name={weight}",
            f"seed={seed}",
        )
        for weight, patterns in PATTERNS.items()
        for seed, pattern in enumerate(patterns)
    ]
    return tabulate_results(*load_compared_runs(paths))


def test_text_has_means_spreads_and_differences(table: ResultTable) -> None:
    layout = lay_out(table)
    assert layout.header == ("setting", "step", "seeds", "perm", "sort12", "Avg")
    # sort12: uniform 1/8 and 2/8, iw_opd 3/8 and 4/8; each difference is 2/8, so the interval is that over problems
    assert layout.text_rows() == [
        ["uniform", "8", "2", "50.0 ± 0.0", "18.8 ± 8.8", "34.4 ± 4.4"],
        ["iw_opd", "8", "2", "50.0 ± 0.0", "43.8 ± 8.8", "46.9 ± 4.4"],
        ["difference to uniform", "", "", "+0.0 [−100.0, +100.0]", "+25.0 [−19.0, +62.6]", "+12.5 [−42.1, +65.9]"],
        ["toy:teacher (teacher)", "–", "2", "100.0 ± 0.0", "87.5 ± 0.0", "93.8 ± 0.0"],
    ]
    assert "Differences in points [95% interval, paired by seed]." in layout.notes


def test_csv_has_unrounded_fractions(table: ResultTable) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(rows) == 9
    row = next(row for row in rows if (row["setting"], row["benchmark"]) == ("iw_opd", "sort12"))
    assert (row["mean"], row["n"], row["seeds"], row["steps"], row["problems"]) == ("0.4375", "2", "0 1", "8 8", "8")
    assert float(row["sd"]) == pytest.approx(0.0883883476)
    assert float(row["low"]) == 0  # clipped
    assert float(row["high"]) == 1
    assert row["difference"] == "0.25"
    # by problem 0, 1/2, 1, 1/2 and 4 times 0: 2² / 1.5 differ, so 1 and -1 are added (5 - 8/3) / 4 times; t 2.364624
    n = 8 + 2 * 7 / 12
    half_width = 2.364624 * (((1.5 + 2 * 7 / 12) / n - (2 / n) ** 2) / (n - 1)) ** 0.5
    bounds = [float(row[f"difference_{bound}"]) for bound in ("low", "high")]
    assert bounds == pytest.approx([2 / n - half_width, 2 / n + half_width], abs=1e-6)
    baseline = next(row for row in rows if row["setting"] == "uniform")
    assert (baseline["difference"], baseline["pairing"]) == ("", "")


def test_markdown_has_the_best_means_in_bold(table: ResultTable) -> None:
    lines = to_markdown(table).splitlines()
    assert lines[:6] == [
        "| setting | step | seeds | perm | sort12 | Avg |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| uniform | 8 | 2 | **50.0** ± 0.0 | 18.8 ± 8.8 | 34.4 ± 4.4 |",
        "| iw_opd | 8 | 2 | **50.0** ± 0.0 | **43.8** ± 8.8 | **46.9** ± 4.4 |",
        "| difference to uniform |  |  | +0.0 [−100.0, +100.0] | +25.0 [−19.0, +62.6] | +12.5 [−42.1, +65.9] |",
        "| toy:teacher (teacher) | – | 2 | 100.0 ± 0.0 | 87.5 ± 0.0 | 93.8 ± 0.0 |",  # no setting: never bold
    ]
    assert lines[-1].endswith("Avg: the mean over the other columns.")


def test_latex_is_a_tabular(table: ResultTable) -> None:
    lines = [line for line in to_latex(table).splitlines() if not line.startswith("%")]
    assert lines == [
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"setting & step & seeds & perm & sort12 & Avg \\",
        r"\midrule",
        r"uniform & 8 & 2 & \textbf{50.0} $\pm$ 0.0 & 18.8 $\pm$ 8.8 & 34.4 $\pm$ 4.4 \\",
        r"iw\_opd & 8 & 2 & \textbf{50.0} $\pm$ 0.0 & \textbf{43.8} $\pm$ 8.8 & \textbf{46.9} $\pm$ 4.4 \\",
        r"difference to uniform &  &  & +0.0 [$-$100.0, +100.0] & +25.0 [$-$19.0, +62.6] & +12.5 [$-$42.1, +65.9] \\",
        r"toy:teacher (teacher) & -- & 2 & 100.0 $\pm$ 0.0 & 87.5 $\pm$ 0.0 & 93.8 $\pm$ 0.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("iw_opd 30% & $x #1 {a}", r"iw\_opd 30\% \& \$x \#1 \{a\}"),
        (r"a\b~c^d<e>", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\textless{}e\textgreater{}"),
        ("−1.0 ± 2", r"$-$1.0 $\pm$ 2"),
    ],
)
def test_latex_characters_are_escaped(text: str, escaped: str) -> None:
    assert escape_latex(text) == escaped


def test_markdown_characters_are_escaped() -> None:
    assert escape_markdown(r"a|b*c\d `e` <f> iw_opd") == r"a\|b\*c\\d \`e\` \<f> iw_opd"


def test_single_setting_has_no_bold_and_students_at_several_steps_are_listed(tmp_path: Path) -> None:
    paths = [plant_run(tmp_path / f"{seed}", {"sort12": {8 + seed: "10"}}, f"seed={seed}") for seed in (0, 1)]
    text = to_markdown(tabulate_results(*load_compared_runs(paths)))
    assert "| quickstart | 8, 9 | 2 | 50.0 ± 0.0 |" in text


def test_selection_of_the_best_step_is_called_optimistic(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "run", {"sort12": {4: "11", 8: "10"}})
    layout = lay_out(tabulate_results(*load_compared_runs([run]), "best"))
    assert layout.text_rows() == [["quickstart", "4", "1", "100.0 [0.0, 100.0]"]]
    assert any("optimistic" in note for note in layout.notes)
