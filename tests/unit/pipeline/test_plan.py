"""Plans of runs: totals, unknown sizes, disk space."""

from pathlib import Path

import pytest
from helpers.commands import ROOT, invoke

from opdctl.artifacts import files
from opdctl.errors import ExitCode, OpdctlError
from opdctl.pipeline.plan import check_space, make_plan, update_bytes
from opdctl.recipe.load import load_recipe
from opdctl.runs.run import Run

PAPER = ROOT / "recipes" / "cross_scale.toml"


@pytest.fixture(autouse=True)
def work_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dry_run(*overrides: str):
    return invoke("train", "--recipe", PAPER, "--dry-run", *(f"--set={each}" for each in overrides), "--json")


def test_stage_that_does_not_fit_is_marked():
    result = dry_run("hardware.memory_gib=12")
    assert "DOES NOT FIT" in result.err
    plan = result.json()
    assert plan["stages"]["rollout"]["seconds"] > 0  # fewer concurrent responses
    assert plan["stages"]["score teacher"]["bytes"] > 12 * 2**30
    smaller = dry_run("hardware.memory_gib=2").json()
    assert smaller["stages"]["rollout"]["seconds"] is None
    assert smaller["gpu_hours"] is None


def test_model_of_unknown_shape_has_unknown_costs():
    result = dry_run("teacher.shape=false")
    assert "unknown: set the model's `shape`" in result.err
    plan = result.json()
    assert plan["stages"]["score teacher"] is None
    assert plan["stages"]["update"]["bytes"] > 0
    assert plan["gpu_hours"] is None
    assert plan["parameters"]["teacher"] is None


def test_totals_are_sums_over_stages_and_repetitions():
    plan = dry_run().json()
    stages, repetitions = plan["stages"], plan["repetitions"]
    assert plan["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in stages.values()))
    assert plan["seconds"] == pytest.approx(sum(stages[name]["seconds"] * repetitions[name] for name in stages))
    assert plan["artifact_bytes"] == 165 * (plan["rollout_bytes_per_step"] + plan["score_bytes_per_step"])


def test_gpu_hours_are_marked_as_estimates():
    result = dry_run()
    assert result.json()["estimated"] is True
    assert "estimate, not measured on GPUs" in " ".join(result.err.split())


def test_plan_of_a_run_with_a_different_recipe_is_refused(finished_run):
    recipe = load_recipe([finished_run / "recipe.toml"], ["weight.gamma=0.7"])
    with pytest.raises(OpdctlError) as error:
        make_plan(recipe, finished_run)
    assert error.value.kind == "recipe_mismatch"


def test_disk_space_is_checked_before_a_step(finished_run, monkeypatch, capsys):
    run = Run.load(finished_run)
    required = update_bytes(run)
    assert required == run.student.weights.num_parameters * (4 + 12)  # a float32 student, and a checkpoint each step
    monkeypatch.setattr(files, "free_space", lambda path: required - 1)
    with pytest.raises(OpdctlError) as error:
        check_space(run, ["update"])
    assert (error.value.kind, error.value.code) == ("disk_full", ExitCode.UNAVAILABLE)
    check_space(run, [])
    monkeypatch.setattr(files, "free_space", lambda path: required)
    check_space(run, ["update"])
    assert not capsys.readouterr().err
    check_space(run, ["rollout", "score", "update"])  # what may be needed is a warning
    assert str(run.path) in capsys.readouterr().err.replace("\n", "")
