"""report.html from planted artifacts: escaping, long responses, numbers with their intervals."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.planted import plant, planted_run

from opdctl.analysis import analyze, captions, figures, page, report, samples, token_view
from opdctl.analysis.plotting import draw_panel
from opdctl.artifacts import files

HOSTILE_TEXT = "</span><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x1b[31m\u202e"


def render(run) -> str:
    """Return the page without drawing its figures."""
    analysis = analyze.analyze_run(run)
    panels = {name: ["<svg/>"] for name in captions.figure_captions(analysis)}
    return page.render_page(analysis, panels, has_files=False)


def test_hostile_names_and_tokens_are_escaped(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "<script>alert(1)<")
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    monkeypatch.setattr(samples, "token_decoder", lambda run: lambda ids: [HOSTILE_TEXT for _ in ids])
    text = render(run)
    assert text.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)" in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_long_response_is_shortened(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.full(token_view.MAX_RESPONSE_TOKENS + 5, -1.0)])
    text = render(run)
    assert "… 5 more tokens" in text
    assert text.count("data-n=") == token_view.MAX_RESPONSE_TOKENS  # of one response, chosen for several reasons
    assert "Chosen: step 0: median of the mean |A|, greatest mean |A|, greatest |A| of a token, longest" in text


def test_the_page_has_a_bounded_number_of_tokens(tmp_path):
    run = planted_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    for step in (0, 1, 2):
        plant(run, step, [-rng.exponential(size=3000) for _ in range(9)])
    text = render(run)
    assert text.count("<article") > 4
    assert 0.9 * token_view.MAX_PAGE_TOKENS < text.count("data-n=") <= token_view.MAX_PAGE_TOKENS


def test_tables_and_figures_are_written_in_both_formats(tmp_path):
    run = planted_run(tmp_path / "run")
    for step in range(2):
        plant(run, step, [np.array([-1.0, -3.0]), np.array([-3.0])])
    folder = run.path / "analysis"
    written = report.write_report(folder, analyze.analyze_run(run), for_paper=True)
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        *("position", "cumulative_signal", "steps", "heatmap", "prefix_logp", "weights", "prefix_ratio"),
        *("one_response", "correlations"),
    }
    assert {str(path) for path in (folder / "figures").iterdir()} == set(written["figures"])
    for path in map(Path, written["figures"]):
        assert path.read_bytes().startswith({".png": b"\x89PNG\r", ".pdf": b"%PDF-"}[path.suffix])
    for name in (
        "position",
        "relative",
        "cumulative_signal",
        "steps",
        "steps_relative",
        "weights",
        "correlations",
        "prefix_ratio",
    ):
        with (folder / "tables" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        table = pq.read_table(folder / "tables" / f"{name}.parquet")
        assert rows[0] == table.column_names
        assert len(rows) == table.num_rows + 1
    rows = pq.read_table(folder / "tables" / "position.parquet").to_pylist()
    assert [row["tokens"] for row in rows] == [2, 1, 2, 1]
    assert rows[0]["abs_advantage"] == 2.0
    assert rows[1]["abs_advantage_low"] is None  # a single response has no interval
    assert files.read_json(folder / "summary.json") == written["summary"]


def test_figures_of_the_paper_have_their_numbers_or_the_command_that_makes_them(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.array([-1.0, -3.0])] * 3)
    analysis = analyze.analyze_run(run)
    folder = run.path / "analysis"
    report.write_report(folder, analysis, for_paper=True)
    lines = (folder / "paper.md").read_text().splitlines()
    rows = {cells[1]: cells for line in lines[4:] if (cells := [cell.strip() for cell in re.split(r"(?<!\\)\|", line)])}
    assert list(rows) == ["1a", "1b", "2a", "2b", "3a", "3b", "3c", "4a", "4b", "4c"]
    for number, cells in rows.items():
        has_numbers = number in ("3b", "3c", "4a", "4b", "4c")  # one step, without evaluations and continuations
        assert bool(cells[2]) == has_numbers
        assert ("no numbers yet: `opdctl " in cells[3]) != has_numbers
        if has_numbers:
            file = re.search(r"\((.*)\)", cells[2])[1]
            assert (folder / file).is_file()
            assert "3.0" in cells[3] or "2" in cells[3]
    page = (folder / "report.html").read_text()
    assert 'href="figures/position.pdf"' in page
    report.write_report(folder, analysis)
    assert not (folder / "paper.md").exists()
    assert "figures/position.pdf" not in (folder / "report.html").read_text()


def test_second_report_is_identical_and_replaces_the_first(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.linspace(-1, 0, 10)] * 3)

    def contents() -> dict[str, bytes]:
        report.write_report(run.path / "analysis", analyze.analyze_run(run, "uniform"), for_paper=True)
        return {path.name: path.read_bytes() for path in (run.path / "analysis").rglob("*") if path.is_file()}

    first = contents()
    (run.path / "analysis" / "figures" / "old.png").write_bytes(b"")
    assert contents() == first


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        ({"x": 0.123456}, "0.1235"),
        ({"x": 0.5, "x_low": 0.25, "x_high": 1.0}, "0.5 [0.25, 1]"),
        ({"x": 0.5, "x_low": float("nan"), "x_high": float("nan")}, "0.5"),
        ({"x": float("nan"), "x_low": 0.0, "x_high": 1.0}, "–"),
        ({"x": None}, "–"),
        ({"x": 3}, "3"),
    ],
)
def test_cell_has_a_value_and_its_interval(row, cell):
    assert page._format_cell(row, "x") == cell


def test_long_table_is_shortened():
    section = page.table_section("steps", "", {"step": list(range(page.MAX_SHOWN_ROWS + 7))}, is_open=False)
    assert section["omitted"] == 7
    assert [row for (row,) in section["rows"]] == [*map(str, range(50)), *map(str, range(57, 107))]


def test_report_uses_no_words_of_earlier_versions(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.linspace(-1, 0, 10)] * 30)
    other = r"<style>.*?</style>|<script>.*?</script>|base64,[^\"]*|<pre.*?</pre>"
    text = re.sub(other, "", render(run), flags=re.DOTALL)
    assert not re.search(r"\b(verdict|spent|unspent|drift|share|in the mean|whole)\b|\d %", text)


def test_missing_steps_are_gaps(tmp_path: Path) -> None:
    run = planted_run(tmp_path / "run")
    for step in (0, 1, 4):
        plant(run, step, [np.array([-1.0, -2.0, -3.0])] * 3)
    analysis = analyze.analyze_run(run)
    (panel,) = figures.heatmap_panels(analysis)
    heatmap = draw_panel(panel)[1]
    (image,) = heatmap.images
    assert image.get_extent() == [-0.5, 4.5, 0, 100]
    empty_I = np.ma.getmaskarray(np.ma.masked_invalid(image.get_array())).all(axis=0)
    assert empty_I.tolist() == [False, False, True, True, False]
    kl = draw_panel(figures.step_panels(analysis)[0])[1]
    line, dots = kl.lines[:2]
    assert np.isnan(line.get_ydata()).tolist() == empty_I.tolist()
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(dots.get_xdata()) == [4]


def test_page_lists_the_training_phases_if_the_recipe_changed(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.array([-1.0, -2.0])] * 2)
    analysis = analyze.analyze_run(run)
    assert page._training_section(analysis) == []
    (first,) = analysis.training
    second = replace(first, name="step 1", weight="uniform", changes=[("weight.name", "iw_opd", "<uniform>")])
    text = page.render_page(replace(analysis, training=[first, second]), {}, has_files=False)
    assert "<td>uniform</td><td>weight.name: iw_opd → &lt;uniform&gt;</td>" in text
    assert "recipe.toml of the newest steps" in text
