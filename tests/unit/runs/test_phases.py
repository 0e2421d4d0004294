"""Training phases: consecutive steps with equal settings of their updates."""

import shutil
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import QUICKSTART, invoke, small_recipe
from helpers.planted import planted_run
from hypothesis import given
from hypothesis import strategies as st

from opdctl.artifacts.files import write_json
from opdctl.artifacts.versions import versioned
from opdctl.errors import OpdctlError
from opdctl.recipe.components import build_objective, build_token_weight
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.load import load_recipe
from opdctl.runs.phases import TrainingPhase, training_phases
from opdctl.runs.run import Run


def update_settings(*overrides: str) -> dict[str, Any]:
    base = ("train.steps=8", "weight.gamma=1.0", *overrides)
    return fingerprint_settings(small_recipe(*base), "update")


def record_update(run: Run, step: int, settings: Mapping[str, Any]) -> None:
    empty = {name: {} for name in ("inputs", "trainer", "student", "metrics")}
    write_json(run.update_path(step), versioned("update") | {"step": step, "settings": settings} | empty)


def described(phases: list[TrainingPhase]) -> list[tuple[str, str]]:
    return [(phase.name, phase.weight.name) for phase in phases]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return planted_run(tmp_path / "run")


def test_phase_is_cut_where_the_settings_of_an_update_change(run):
    for step, weight in enumerate(("uniform", "uniform", "position_sigmoid", "position_sigmoid", "uniform")):
        record_update(run, step, update_settings(f"weight.name={weight}"))
    phases = training_phases(run)
    assert described(phases) == [("steps 0–1", "uniform"), ("steps 2–3", "position_sigmoid"), ("step 4", "uniform")]
    assert [phase.steps for phase in phases] == [(0, 1), (2, 3), (4,)]
    assert phases[0].changes == []
    assert ("weight.name", "uniform", "position_sigmoid") in phases[1].changes
    assert {key.partition(".")[0] for phase in phases for key, _, _ in phase.changes} == {"weight"}
    assert phases[2].changes == [(key, new, old) for key, old, new in phases[1].changes]


def test_components_are_those_of_the_recipe(run):
    weight = ("name=prefix_ratio", "gamma=0.9", "times.name=position_sigmoid", "logprobs=trainer", "floor=0.0")
    overrides = [f"weight.{setting}" for setting in weight]
    recipe = load_recipe([QUICKSTART], overrides)
    record_update(run, 0, fingerprint_settings(recipe, "update"))
    (phase,) = training_phases(run)
    assert phase.weight == recipe.weight
    assert phase.objective == recipe.objective
    made = recipe.model_copy(update={"weight": phase.weight, "objective": phase.objective})
    assert build_token_weight(made) == build_token_weight(recipe)
    assert build_objective(made) == build_objective(recipe)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({}, {"weight.logprobs": "rollout", "train.denominator": "all", "weight.floor": 1.0}),
        ({"student.model": "/home/a"}, {"student.model": "/home/b"}),
    ],
    ids=["settings that did not exist yet", "another path of the student"],
)
def test_equal_updates_are_one_phase(run, older, newer):
    base = {key: value for key, value in update_settings().items() if key not in newer}
    record_update(run, 0, base | older)
    record_update(run, 1, base | newer)
    assert described(training_phases(run)) == [("steps 0–1", "iw_opd")]


def test_setting_that_was_added_changes_from_its_previous_value(run):
    record_update(run, 0, update_settings())
    record_update(run, 1, update_settings("train.denominator=selected", "weight.floor=0.0"))
    assert training_phases(run)[1].changes == [("train.denominator", "all", "selected"), ("weight.floor", 1.0, 0.0)]


def test_record_without_settings_has_those_of_the_recipe(run):
    record_update(run, 0, {})
    record_update(run, 1, update_settings())
    (phase,) = training_phases(run)
    assert phase.weight == run.recipe.weight


def test_step_without_an_update_has_the_recorded_recipe(run):
    record_update(run, 0, update_settings())
    (run.step_path(1) / "rollout").mkdir(parents=True)
    what_if = Run(load_recipe([run.path / "recipe.toml"], ["weight.name=uniform"]), run.path, run.models, run.digests)
    assert described(training_phases(what_if)) == [("steps 0–1", "iw_opd")]
    edited = load_recipe([run.path / "recipe.toml"], ["train.learning_rate=0.5"])
    (run.path / "recipe.toml").write_text(edited.to_toml())
    first, second = training_phases(run)
    assert (first.name, second.name) == ("step 0", "step 1")
    assert [(key, new) for key, _, new in second.changes] == [("train.learning_rate", 0.5)]


def test_run_without_steps_has_no_phase(run):
    assert training_phases(run) == []


@pytest.mark.parametrize("weight", [{"weight.name": 5}, {"weight.times.name": "uniform", "weight.times": 1}])
def test_corrupt_settings_are_reported(run, weight):
    record_update(run, 0, update_settings() | weight)
    with pytest.raises(OpdctlError, match=r"update\.json: its settings") as caught:
        training_phases(run)
    assert caught.value.kind == "corrupt_artifact"


def test_fork_has_its_own_steps(finished_copy, tmp_path):
    (finished_copy / "step-00001/update.json").unlink()
    fork = tmp_path / "fork"
    assert invoke("run", "fork", finished_copy, fork, "--set", "weight.name=uniform").code == 0
    assert described(training_phases(Run.load(fork))) == [("step 1", "uniform")]


def test_recipe_edited_in_the_run_directory(finished_copy):
    file = finished_copy / "recipe.toml"
    recipe = load_recipe([file], ["weight.name=uniform", "train.steps=3"])
    file.write_text(recipe.to_toml())
    assert invoke("train", finished_copy).code == 0
    assert [phase.name for phase in training_phases(Run.load(finished_copy))] == ["steps 0–1", "step 2"]


SETTINGS = [
    update_settings(*choice)
    for choice in (
        *((), ("weight.name=uniform",), ("weight.name=position_sigmoid",), ("train.learning_rate=0.001",)),
        *(("weight.gamma=0.5",), ("objective.name=sampled_kl",), ("weight.floor=0.5",)),
    )
]


@pytest.fixture(scope="module")
def base() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield planted_run(Path(folder) / "run")


@given(st.lists(st.sampled_from(range(len(SETTINGS))), max_size=7), st.sets(st.integers(0, 6)))
def test_phases_partition_the_steps(base, choices, removed):
    """Every step with an update is in one phase; neighbouring phases differ, and the steps of one do not."""
    for step in range(8):
        shutil.rmtree(base.step_path(step), ignore_errors=True)
    for step, choice in enumerate(choices):
        if step not in removed:
            record_update(base, step, SETTINGS[choice])
    phases = training_phases(base)
    recorded = [step for step in range(len(choices)) if step not in removed]
    assert [step for phase in phases for step in phase.steps] == recorded
    for phase in phases:
        assert len({choices[step] for step in phase.steps}) == 1
    for one, other in pairwise(phases):
        assert choices[one.steps[-1]] != choices[other.steps[0]]
        assert {key: new for key, _, new in other.changes if new is not None}.items() <= other.settings.items()
        assert {key: old for key, old, _ in other.changes if old is not None}.items() <= one.settings.items()
