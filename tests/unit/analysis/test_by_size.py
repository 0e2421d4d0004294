"""Accuracy and relative gain by model size, on planted runs of the toy models."""

import json
from pathlib import Path

import pytest
from helpers.commands import rewrite_json
from helpers.evaluations import plant_run

from opdctl.analysis.by_size import by_size_rows, find_parameters, size_axis
from opdctl.analysis.comparison import write_by_size
from opdctl.analysis.comparison_figures import by_size_panels
from opdctl.analysis.report import render_panels
from opdctl.evaluation.compared_runs import load_compared_runs
from opdctl.evaluation.result_table import ResultTable, tabulate_results
from opdctl.evaluation.statistics import compare_paired

STUDENT, TEACHER = 110_528, 365_664  # parameters of the toy models
LARGE = "student.model=toy:teacher"
UNIFORM = "weight.name=uniform"


def tabulate(*paths: Path) -> ResultTable:
    return tabulate_results(*load_compared_runs(paths))


def plant_sizes(tmp_path: Path) -> list[Path]:
    return [
        plant_run(tmp_path / "small-opd", {"sort12": {8: "1100"}}, UNIFORM),
        plant_run(tmp_path / "small-iw", {"sort12": {8: "1110"}}),
        plant_run(tmp_path / "large-opd", {"sort12": {8: "1111"}}, UNIFORM, LARGE),
        plant_run(tmp_path / "large-iw", {"sort12": {8: "1110"}}, LARGE),
    ]


def test_gain_is_relative_to_the_baseline_of_the_same_models(tmp_path: Path) -> None:
    rows = by_size_rows(tabulate(*plant_sizes(tmp_path)))
    assert [(row["setting"], row["student_parameters"], row["compression"]) for row in rows] == [
        ("uniform", STUDENT, pytest.approx(TEACHER / STUDENT)),
        ("iw_opd", STUDENT, pytest.approx(TEACHER / STUDENT)),
        ("uniform", TEACHER, 1),
        ("iw_opd", TEACHER, 1),
    ]
    # 0.75 / 0.5 - 1 and 0.75 / 1 - 1
    assert [row["gain"] for row in rows] == [None, 0.5, None, -0.25]
    # one problem of four differs: the interval of the difference, divided by 0.5
    assert rows[1]["gain_low"] == pytest.approx(compare_paired([1, 1, 0, 0], [1, 1, 1, 0]).ci[0] / 0.5)
    assert size_axis(rows) == "student_parameters"


def test_figure_and_table_are_written(tmp_path: Path) -> None:
    names = {path.name for path in write_by_size(tmp_path / "out", tabulate(*plant_sizes(tmp_path)))}
    assert names == {f"by_size.{kind}" for kind in ("png", "pdf", "csv", "parquet")}
    rows = by_size_rows(tabulate(*plant_sizes(tmp_path)))
    svg = "".join(render_panels(by_size_panels(rows, size_axis(rows), "Avg"), "by_size"))
    for text in ("uniform", "iw_opd", "111K", "366K", "Relative gain over the baseline"):
        assert text in svg


def test_students_of_one_size_are_told_apart_by_compression(tmp_path: Path) -> None:
    paths = [
        plant_run(tmp_path / "one", {"sort12": {8: "1100"}}),
        plant_run(tmp_path / "other", {"sort12": {8: "1100"}}, "teacher.model=toy:student-spread"),
    ]
    rows = by_size_rows(tabulate(*paths))
    assert [row["compression"] for row in rows] == [pytest.approx(TEACHER / STUDENT), 1]
    assert size_axis(rows) == "compression"
    assert "3.3×" in render_panels(by_size_panels(rows, size_axis(rows), "Avg"), "by_size")[0]


def test_runs_with_the_same_models_or_sizes_have_no_figure(tmp_path: Path) -> None:
    paths = plant_sizes(tmp_path)
    assert write_by_size(tmp_path / "out", tabulate(*paths[:2])) == []
    same_size = plant_run(tmp_path / "spread", {"sort12": {8: "1100"}}, "student.model=toy:student-spread")
    assert write_by_size(tmp_path / "out", tabulate(paths[0], same_size)) == []
    assert not (tmp_path / "out").exists()


SHAPE = (
    "{num_hidden_layers = 1, hidden_size = 8, num_attention_heads = 1, num_key_value_heads = 1, head_dim = 8, "
    "intermediate_size = 8, vocab_size = 10}"
)
# attention 4 · 8 · 8, feed-forward 3 · 8 · 8, norms 4 · 8; two matrices of 10 · 8, and the last norm
SHAPE_PARAMETERS = 256 + 192 + 32 + 160 + 8


@pytest.mark.parametrize(
    ("source", "parameters"),
    [("record", STUDENT), ("directory", STUDENT), ("shape", SHAPE_PARAMETERS), ("nothing", None)],
)
def test_number_of_parameters_is_recorded_or_read_or_that_of_the_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, parameters: int | None
) -> None:
    shape = [f"student.shape={SHAPE}"] if source == "shape" else []
    path = plant_run(tmp_path / "run", {"sort12": {8: "1100"}}, *shape)
    if source != "record":  # as in runs of older versions
        models = json.loads((path / "run.json").read_text())["models"]
        del models["student"]["parameters"]
        if source != "directory":
            models["student"]["path"] = str(tmp_path / "gone")
        rewrite_json(path / "run.json", models=models)
    runs, _ = load_compared_runs([path])
    assert find_parameters(runs[0], "student") == parameters
    by_size_rows(tabulate(path, plant_run(tmp_path / "large", {"sort12": {8: "1100"}}, LARGE)))
    assert ("no figure by size" in capsys.readouterr().err) == (parameters is None)
