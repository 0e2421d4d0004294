"""Plans of runs: totals, unknown sizes, disk space."""

from pathlib import Path

import pytest
from helpers.commands import ROOT, invoke, small_recipe

from opdctl.artifacts import files
from opdctl.errors import ExitCode, OpdctlError
from opdctl.pipeline.plan import check_space, make_plan, update_bytes, warn_of_zero_rate
from opdctl.recipe.load import load_recipe
from opdctl.runs.run import Run
from opdctl.training.optimizer import learning_rate

PAPER = ROOT / "recipes" / "cross_scale.toml"


@pytest.fixture(autouse=True)
def work_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dry_run(*overrides: str):
    return invoke("train", "--recipe", PAPER, "--dry-run", *(f"--set={each}" for each in overrides), "--json")


def test_stage_that_does_not_fit_is_marked_with_what_is_missing_and_a_remedy():
    result = dry_run("vllm.enable_sleep_mode=false", "train.gradient_checkpointing=false", "hardware.train_gpus=8")
    update = result.json()["stages"]["update"]
    assert not update["fits"]
    assert update["excess_bytes"] == update["bytes"] - int(0.92 * 79 * 2**30)
    missing = update["excess_bytes"] / 2**30
    assert f"DOES NOT FIT: {missing:.1f} GiB too much; set train.gradient_checkpointing = true" in result.err


def test_engine_without_room_for_its_cache_has_no_time():
    result = dry_run("hardware.memory_gib=2")
    plan = result.json()
    assert "DOES NOT FIT: the cache has no room" in result.err
    assert plan["stages"]["rollout"]["seconds"] is None
    assert plan["gpu_hours"] is None


def test_table_shows_what_lies_in_memory_at_the_same_time():
    result = dry_run()
    lines = [line.split() for line in result.err.splitlines() if line.startswith(("┃", "│"))]
    assert [line[1:-1] for line in lines[:2]] == [
        ["stage", "┃", "student,", "vllm", "┃", "teacher,", "vllm", "┃", "trainer", "┃", "sum", "┃", "fits"],
        ["rollout", "│", "63.2", "│", "1.5", "│", "1.4", "│", "66.1", "│", "yes"],
    ]


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
    assert repetitions["eval student"] == 18
    assert plan["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in stages.values()))
    assert plan["seconds"] == pytest.approx(sum(stages[name]["seconds"] * repetitions[name] for name in stages))
    assert plan["artifact_bytes"] == 165 * (plan["rollout_bytes_per_step"] + plan["score_bytes_per_step"])


def test_gpu_hours_are_marked_as_estimates():
    result = dry_run()
    assert result.json()["estimated"] is True
    assert "estimate, not measured on GPUs" in " ".join(result.err.split())


@pytest.mark.parametrize(("steps", "first", "expected"), [(6, 0, "steps 4 to 5"), (6, 5, "steps 5 to 5"), (4, 0, None)])
def test_steps_without_a_learning_rate_are_warned_of(steps, first, expected, capsys):
    settings = ("train.lr_scheduler_type=linear", "train.decay_steps=4", f"train.steps={steps}")
    train = small_recipe(*settings).train
    warn_of_zero_rate(train, first)
    assert (expected or "nothing") in (capsys.readouterr().err or "nothing")
    assert (learning_rate(train, steps - 1) == 0) == bool(expected)


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
