import json
import shutil

import pytest
from helpers.commands import QUICKSTART
from hypothesis import given
from hypothesis import strategies as st

from opdctl.artifacts.stage_dir import changed_settings
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.dependencies import as_overrides
from opdctl.recipe.load import load_recipe
from opdctl.runs.compatibility import artifact_changes, check_same_recipe, describe_reusable_artifacts
from opdctl.runs.run import Run, read_recipe

values = st.fixed_dictionaries(
    {},
    optional={
        "weight.name": st.sampled_from(["uniform", "iw_opd", "prefix_ratio"]),
        "train.learning_rate": st.floats(1e-6, 1e-2),
        "train.betas": st.lists(st.floats(0, 0.99), min_size=2, max_size=2),
        "rollout.max_tokens": st.integers(1, 999),
        "score.entropy": st.booleans(),
        "objective.name": st.sampled_from(["policy_gradient", "power", "sampled_kl"]),
        "plugins": st.just([]),
    },
)


@given(values)
def test_suggested_overrides_give_the_requested_recipe(settings):
    recorded = load_recipe([QUICKSTART])
    requested = load_recipe([QUICKSTART], [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    overrides = as_overrides(changed_settings(recorded.flat(), requested.flat()))
    assert overrides is not None
    assert load_recipe([QUICKSTART], overrides) == requested


def mismatch(run, *overrides) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        check_same_recipe(read_recipe(run, overrides), run)
    assert (caught.value.kind, caught.value.code) == ("recipe_mismatch", ExitCode.RECIPE_MISMATCH)
    return caught.value


@pytest.mark.parametrize("overrides", [(), ("train.steps=9", "name=other", "eval.samples=2", "pipeline.threads=2")])
def test_mutable_settings_fit(finished_run, overrides):
    check_same_recipe(read_recipe(finished_run, overrides), finished_run)
    assert artifact_changes(read_recipe(finished_run), read_recipe(finished_run, overrides)) == []


def test_mismatch_names_the_change_and_the_ways_to_resolve_it(finished_run):
    error = mismatch(finished_run, "weight.gamma=0.7")
    assert "weight.gamma 0.5 → 0.7 affects updates" in error.message
    assert f"`opdctl train {finished_run}`" in error.hint
    assert (
        f"`opdctl run fork {finished_run} {finished_run}-fork --set weight.gamma=0.7 --set train.steps=4`" in error.hint
    )
    assert "step 2" in error.hint
    assert "another --output" in error.hint


@pytest.mark.parametrize("override", ["seed=1", "lora.rank=2", "teacher.dtype=bfloat16", "prompts.limit=16"])
def test_mismatch_of_immutable_settings_suggests_no_fork(finished_run, override):
    assert "run fork" not in mismatch(finished_run, override).hint


def test_removed_setting_is_suggested_as_a_recipe_file(finished_copy):
    recipe = read_recipe(finished_copy, ['objective.name="power"'])
    (finished_copy / "recipe.toml").write_text(recipe.to_toml())
    with pytest.raises(OpdctlError) as caught:
        check_same_recipe(load_recipe([finished_copy / "recipe.toml"], ['weight.name="uniform"']), finished_copy)
    assert "--set 'weight.name=\"uniform\"'" in caught.value.hint


def test_reusable_artifacts_are_those_of_steps_without_an_update(finished_copy):
    run = Run.load(finished_copy)
    assert describe_reusable_artifacts(run, [("weight.gamma", 0.5, 0.7)]) == []
    (finished_copy / "step-00001/update.json").unlink()
    (line,) = describe_reusable_artifacts(run, [("weight.gamma", 0.5, 0.7)])
    assert "rollouts of 1 steps and scores of 1 steps" in line
    (line,) = describe_reusable_artifacts(run, [("score.top_k", 0, 4)])
    assert "rollouts of 1 steps" in line
    assert "scores" not in line
    assert describe_reusable_artifacts(run, [("rollout.max_tokens", 40, 80)]) == []
    shutil.rmtree(finished_copy / "step-00001/teacher")
    (line,) = describe_reusable_artifacts(run, [("weight.gamma", 0.5, 0.7)])
    assert "scores" not in line
