"""Runs compared by their accuracy by step: planted evaluations, what they come to, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from helpers.commands import invoke, small_recipe
from scipy import stats

from opdctl.artifacts import files
from opdctl.cli import analyze
from opdctl.evaluation import learning_curves
from opdctl.runs.open import open_run

PROTOCOL = dict.fromkeys(
    ("samples", "temperature", "top_p", "max_tokens", "suffix", "template_arguments", "grader", "engine", "dtype"), 1
)


def plant_run(path: Path, accuracies: dict[int, float], *overrides: str, digest: str = "d") -> Path:
    """A run directory whose students reached these accuracies."""
    open_run(small_recipe(*overrides), path)
    for step, accuracy in accuracies.items():
        folder = path / "eval" / "sort12" / f"step-{step:05d}"
        folder.mkdir(parents=True)
        summary = {"bench": "sort12", "problems": 100, "samples": 1, "avg": accuracy, "protocol": PROTOCOL}
        summary |= {"ci": [accuracy - 0.1, accuracy + 0.1], "benchmark": {"digest": digest}}
        files.write_json(folder / "summary.json", summary)
    return path


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    curves = {
        "uniform-0": ({0: 0.1, 8: 0.4, 16: 0.6}, "weight.name=uniform", "seed=0"),
        "uniform-1": ({0: 0.2, 8: 0.5, 16: 0.7}, "weight.name=uniform", "seed=1"),
        "iw_opd-0": ({0: 0.1, 8: 0.7, 16: 0.8}, "seed=0"),
        "iw_opd-1": ({0: 0.2, 8: 0.6, 16: 0.9}, "seed=1"),
    }
    return [plant_run(tmp_path / name, *own) for name, own in curves.items()]


def test_seeds_are_one_setting_and_the_steps_to_a_target_are_counted(runs):
    (found,) = learning_curves.compare(runs)
    uniform, iw_opd = found["settings"]
    assert (uniform["label"], iw_opd["label"]) == ("uniform", "iw_opd")
    assert [point["accuracy"] for point in uniform["curve"]] == pytest.approx([0.15, 0.45, 0.65])
    assert found["target"] == pytest.approx(0.65)  # what both reach
    # uniform: never by seed 0, at step 16 by seed 1; iw_opd: at steps 8 and 16
    assert (uniform["steps_to_target"], uniform["reached"]) == (16, 1)
    assert (iw_opd["steps_to_target"], iw_opd["reached"]) == (12, 2)
    half = stats.t.ppf(0.975, 1) * np.std([0.6, 0.7], ddof=1) / np.sqrt(2)
    assert uniform["curve"][2]["low"] == pytest.approx(max(0.65 - half, 0))


def test_settings_are_called_by_what_tells_them_apart(tmp_path):
    settings = (["weight.gamma=1.0"], ["weight.gamma=2.0"], ["weight.name=uniform"], ["train.learning_rate=1e-3"])
    paths = [plant_run(tmp_path / str(number), {0: 0.1}, *own) for number, own in enumerate(settings)]
    (found,) = learning_curves.compare(paths)
    assert [setting["label"] for setting in found["settings"]] == [
        "iw_opd gamma=1.0 learning_rate=0.0002",
        "iw_opd gamma=2.0 learning_rate=0.0002",
        "uniform learning_rate=0.0002",
        "iw_opd gamma=0.5 learning_rate=0.001",
    ]


def test_one_seed_has_the_interval_of_its_problems(runs):
    (found,) = learning_curves.compare(runs[1:3], target=0.7)
    assert [setting["steps_to_target"] for setting in found["settings"]] == [16, 8]
    point = found["settings"][0]["curve"][2]
    assert (point["low"], point["high"], point["seeds"]) == pytest.approx((0.6, 0.8, 1))
    assert "target 70.0%: uniform reaches it after 16 steps" in analyze.comparison_line(found)


def test_the_command_writes_figures_and_tables_where_it_is_told(runs, tmp_path):
    result = invoke("analyze-position", "--compare", *runs, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"sort12.{kind}" for kind in ("png", "svg", "csv", "parquet")}
    assert result.json()["comparisons"][0]["bench"] == "sort12"
    assert "steps to 65.0%" in result.err


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    other = plant_run(tmp_path / "other", {0: 0.1}, digest="another")
    none = plant_run(tmp_path / "none", {})
    for paths, code, said in (
        ([runs[0]], 2, "two different runs"),
        ([runs[0], runs[0]], 2, "two different runs"),
        ([runs[0], other], 4, "step-00000 and " + str(other / "eval/sort12/step-00000") + " were asked other problems"),
        ([runs[0], none], 2, "no benchmark that all"),
        ([runs[0], tmp_path / "typo"], 2, "no run directory"),
    ):
        result = invoke("analyze-position", "--compare", *paths, "--output", tmp_path / "out")
        assert (result.code, said in result.err) == (code, True), result.err
        assert not (tmp_path / "out").exists()


def test_a_different_protocol_is_warned_of(runs, tmp_path):
    other = plant_run(tmp_path / "other", {0: 0.1})
    path = other / "eval" / "sort12" / "step-00000" / "summary.json"
    files.write_json(path, files.read_json(path) | {"protocol": PROTOCOL | {"temperature": 0}})
    result = invoke("analyze-position", "--compare", runs[0], other, "--output", tmp_path / "out")
    assert (result.code, "temperature differ" in result.err) == (0, True)


def test_several_runs_without_compare_are_refused(runs):
    result = invoke("analyze-position", *runs)
    assert (result.code, "--compare" in result.err) == (2, True)


def test_one_run_s_evaluations_under_another_protocol_are_left_out(tmp_path):
    run = plant_run(tmp_path / "run", {0: 0.1, 8: 0.2, 16: 0.3})
    path = run / "eval" / "sort12" / "step-00008" / "summary.json"
    files.write_json(path, files.read_json(path) | {"protocol": PROTOCOL | {"temperature": 0}})
    assert [point["step"] for point in learning_curves.accuracy_curve(run)["curve"]] == [0, 16]
    assert learning_curves.accuracy_curve(plant_run(tmp_path / "none", {})) is None
