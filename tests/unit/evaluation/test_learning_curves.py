"""Runs compared by their accuracy by step, on planted evaluations."""

from pathlib import Path

import numpy as np
import pytest
from helpers.evaluations import change_protocol, plant_curve
from scipy import stats

from opdctl.errors import OpdctlError
from opdctl.evaluation import learning_curves
from opdctl.evaluation.compared_runs import load_compared_runs
from opdctl.evaluation.learning_curves import accuracy_curve


def compare_curves(paths, target=None, benches=None):
    runs, columns = load_compared_runs(paths, benches)
    return [learning_curves.compare_curves(runs, column, target) for column in columns]


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    curves = {
        "uniform-0": ({0: 0.1, 8: 0.4, 16: 0.6}, "weight.name=uniform", "seed=0"),
        "uniform-1": ({0: 0.2, 8: 0.5, 16: 0.7}, "weight.name=uniform", "seed=1"),
        "iw_opd-0": ({0: 0.1, 8: 0.7, 16: 0.8}, "seed=0"),
        "iw_opd-1": ({0: 0.2, 8: 0.6, 16: 0.9}, "seed=1"),
    }
    return [plant_curve(tmp_path / name, *arguments) for name, arguments in curves.items()]


def test_seeds_are_one_setting_with_mean_steps_to_the_target(runs):
    (comparison,) = compare_curves(runs)
    uniform, iw_opd = comparison["settings"]
    assert (uniform["label"], iw_opd["label"]) == ("uniform", "iw_opd")
    assert [point["accuracy"] for point in uniform["curve"]] == pytest.approx([0.15, 0.45, 0.65])
    assert comparison["target"] == pytest.approx(0.65)  # the highest that both reach
    # uniform: never with seed 0, at step 16 with seed 1; iw_opd: at steps 8 and 16
    assert (uniform["steps_to_target"], uniform["reached"]) == (16, 1)
    assert (iw_opd["steps_to_target"], iw_opd["reached"]) == (12, 2)
    half_width = stats.t.ppf(0.975, 1) * np.std([0.6, 0.7], ddof=1) / np.sqrt(2)
    assert uniform["curve"][2]["low"] == pytest.approx(max(0.65 - half_width, 0))


def test_labels_are_the_settings_that_differ(tmp_path):
    settings = (["weight.gamma=1.0"], ["weight.gamma=2.0"], ["weight.name=uniform"], ["train.learning_rate=1e-3"])
    paths = [plant_curve(tmp_path / str(n), {0: 0.1}, *overrides) for n, overrides in enumerate(settings)]
    (comparison,) = compare_curves(paths)
    assert [setting["label"] for setting in comparison["settings"]] == [
        "iw_opd gamma=1.0 learning_rate=0.0002",
        "iw_opd gamma=2.0 learning_rate=0.0002",
        "uniform learning_rate=0.0002",
        "iw_opd gamma=0.5 learning_rate=0.001",
    ]


def test_single_seed_has_the_interval_of_its_problems(runs):
    (comparison,) = compare_curves(runs[1:3], target=0.7)
    assert [setting["steps_to_target"] for setting in comparison["settings"]] == [16, 8]
    point = comparison["settings"][0]["curve"][2]
    assert (point["low"], point["high"], point["seeds"]) == pytest.approx((0.6, 0.8, 1))


def test_incomparable_runs_are_rejected(runs, tmp_path):
    other = plant_curve(tmp_path / "other", {0: 0.1}, digest="another")
    without_evaluations = plant_curve(tmp_path / "none", {})
    other_steps = plant_curve(tmp_path / "steps", {4: 0.1}, "weight.name=uniform", "seed=2")
    for paths, kind, part in (
        ([runs[0], runs[0]], "invalid_usage", "a run occurs twice"),
        ([runs[0], other], "different_problems", str(other / "eval/sort12/step-00000")),
        ([runs[0], without_evaluations], "missing_evaluation", str(without_evaluations)),
        ([runs[0], other_steps], "missing_evaluation", str(other_steps)),
        ([runs[0], tmp_path / "typo"], "missing_run", str(tmp_path / "typo")),
    ):
        with pytest.raises(OpdctlError) as caught:
            compare_curves(paths)
        assert caught.value.kind == kind
        assert part in caught.value.message


def test_benchmarks_can_be_selected(runs):
    assert [comparison["bench"] for comparison in compare_curves(runs, benches=["sort12"])] == ["sort12"]
    with pytest.raises(OpdctlError) as caught:
        compare_curves(runs, benches=["perm"])
    assert caught.value.kind == "missing_evaluation"


def test_different_protocol_is_warned_of(runs, tmp_path, capsys):
    other = plant_curve(tmp_path / "other", {0: 0.1})
    change_protocol(other / "eval/sort12/step-00000", temperature=0)
    compare_curves([runs[0], other])
    assert "differ in temperature" in " ".join(capsys.readouterr().err.split())


def test_evaluations_under_an_older_protocol_are_skipped(tmp_path):
    run = plant_curve(tmp_path / "run", {0: 0.1, 8: 0.2, 16: 0.3})
    change_protocol(run / "eval/sort12/step-00008", temperature=0)
    assert [point["step"] for point in accuracy_curve(run)["curve"]] == [0, 16]


def test_run_without_evaluations_has_no_curve(tmp_path):
    assert accuracy_curve(plant_curve(tmp_path / "none", {})) is None
