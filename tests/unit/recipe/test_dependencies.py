"""Which stages depend on a setting, and what a changed setting affects."""

from pathlib import Path

import pytest

from opdctl.artifacts.stage_dir import changed_settings
from opdctl.recipe.dependencies import (
    affected_stages,
    describe_changes,
    fingerprint_settings,
    is_mutable,
    scorer_settings,
    unaffected_stages,
)
from opdctl.recipe.load import load_recipe, load_recorded_recipe


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("name", []),
        ("seed", ["prompts", "rollout", "update", "eval", "continuations"]),
        ("student.model", ["prompts", "rollout", "update"]),
        ("teacher.model", ["score"]),
        ("prompts.limit", ["prompts"]),
        ("rollout.max_tokens", ["rollout", "continuations"]),
        ("rollout.eos_token_ids", ["rollout", "eval", "continuations"]),
        ("student.tokenizer", ["prompts", "rollout", "update", "eval", "continuations"]),
        ("teachers.math.tokenizer", ["score"]),
        ("weight.gamma", ["update"]),
        ("eval.samples", ["eval"]),
        ("pipeline.device", []),
    ],
)
def test_affected_stages(key: str, stages: list[str]) -> None:
    assert affected_stages(key) == stages


def test_few_shot_is_in_the_fingerprint_if_it_is_set(smallest: Path) -> None:
    recipes = [load_recipe([smallest], values) for values in ([], ["eval.few_shot=2", "eval.few_shot_file=a.jsonl"])]
    default, chosen = (fingerprint_settings(recipe, "eval") for recipe in recipes)
    assert chosen.keys() - default.keys() == {"eval.few_shot", "eval.few_shot_file"}


def test_fingerprints_exclude_mutable_settings(smallest: Path) -> None:
    recipe = load_recipe([smallest])
    assert {"seed", "student.model", "weight.name", "train.learning_rate"} <= set(
        fingerprint_settings(recipe, "update")
    )
    assert not {"train.steps", "train.keep_every_steps", "train.keep_latest"} & set(
        fingerprint_settings(recipe, "update")
    )
    assert set(fingerprint_settings(recipe, "score")) == {
        "score.engine",
        "score.tokens_per_batch",
        "score.entropy",
        "score.top_k",
        "score.student_top_k",
        "score.hidden_states",
        "teacher.model",
        "teacher.revision",
        "teacher.dtype",
        "teacher.trust_remote_code",
    }
    assert "eval.samples" in fingerprint_settings(recipe, "eval")
    assert not {"eval.every_steps", "eval.bench"} & set(fingerprint_settings(recipe, "eval"))


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("rollout.eos_token_ids=[1]", "rollout"),
        ("rollout.eos_token_ids=[1]", "eval"),
        ("student.tokenizer=file", "rollout"),
        ("student.tokenizer=file", "eval"),
        ("teacher.tokenizer=class", "score"),
        ("weight.logprobs=trainer", "update"),
        ("train.denominator=selected", "update"),
        ("train.decay_vectors=true", "update"),
        ("eval.top_k=20", "eval"),
        ("rollout.sampling_top_k=20", "rollout"),
        ("eval.min_p=0.1", "eval"),
        ("rollout.repetition_penalty=1.1", "rollout"),
        ("eval.presence_penalty=1.5", "eval"),
        ("rollout.frequency_penalty=0.5", "rollout"),
        ("eval.stop=['a']", "eval"),
        ("eval.max_thinking_tokens=99", "eval"),
        ("eval.end_thinking='</think>'", "eval"),
        ("rollout.stop=['a']", "continuations"),
        ("rollout.stop_token_ids=[3]", "rollout"),
    ],
)
def test_key_that_older_artifacts_lack_is_in_a_fingerprint_if_it_is_set(
    smallest: Path, override: str, stage: str
) -> None:
    key = override.partition("=")[0]
    default, chosen = (fingerprint_settings(load_recipe([smallest], values), stage) for values in ([], [override]))
    assert chosen.keys() - default.keys() == {key}
    assert stage == "eval" or not is_mutable(key)


@pytest.mark.parametrize(
    ("weight", "older"),
    [
        ("weight={name='iw_opd'}", "weight={name='iw_opd', floor=1.0}"),
        ("weight={name='prefix_ratio', alpha=0.1, normalize='response'}", "weight={name='prefix_ratio', alpha=0.1}"),
        ("weight={name='tip', times={name='iw_opd'}}", "weight={name='tip', times={name='iw_opd', floor=1.0}}"),
    ],
)
def test_parameters_that_older_runs_lack_are_not_in_their_fingerprints(
    smallest: Path, tmp_path: Path, weight: str, older: str
) -> None:
    """A run that recorded no floor, or no normalization, has the fingerprint of the value that it used."""
    recorded = tmp_path / "recipe.toml"
    recorded.write_text(f"{smallest.read_text()}\n{older}\n")
    settings = fingerprint_settings(load_recorded_recipe(recorded), "update")
    assert settings == fingerprint_settings(load_recipe([smallest], [weight]), "update")
    assert not any(key.endswith(("floor", "normalize")) for key in settings)


def test_changed_parameters_are_in_the_fingerprint(smallest: Path) -> None:
    changed = fingerprint_settings(load_recipe([smallest], ["weight.floor=0.0"]), "update")
    assert changed["weight.floor"] == 0.0
    ratio = fingerprint_settings(load_recipe([smallest], ["weight.name=prefix_ratio"]), "update")
    assert ratio["weight.normalize"] == "position"


@pytest.mark.parametrize("overrides", [[], ["weight.signed=true", "weight.gamma=0.7"], ["weight.times.name=iw_opd"]])
def test_recorded_recipe_is_recorded_again_unchanged(smallest: Path, tmp_path: Path, overrides: list[str]) -> None:
    """Every command that opens a run compares the text, and rewrites another one."""
    text = load_recipe([smallest], overrides).to_toml()
    recorded = tmp_path / "recipe.toml"
    recorded.write_text(text)
    assert load_recorded_recipe(recorded).to_toml() == text


def test_fingerprint_of_a_teacher_excludes_other_teachers(smallest: Path) -> None:
    smallest.write_text(smallest.read_text().replace('teacher.model = "toy:teacher"', ""))
    teachers = ["teachers.math.model=toy:teacher", "teachers.code.model=toy:teacher", "prompts.teacher_column=domain"]
    settings = scorer_settings(fingerprint_settings(load_recipe([smallest], teachers), "score"), "teacher-math")
    assert set(settings) >= {"score.engine", "teachers.math.model"}
    assert not any(key.startswith("teachers.code") for key in settings)


def test_shapes_and_hardware_are_mutable() -> None:
    mutable = ("hardware.train_gpus", "student.shape", "student.shape.head_dim", "teachers.math.shape.vocab_size")
    assert all(map(is_mutable, mutable))
    assert not any(map(is_mutable, ("student.model", "student.dtype", "weight.shape")))


def test_new_weight_affects_updates_only(smallest: Path) -> None:
    old, new = load_recipe([smallest]), load_recipe([smallest], ["weight.name=uniform"])
    differing = {
        stage
        for stage in ("prompts", "rollout", "score", "update", "eval")
        if fingerprint_settings(old, stage) != fingerprint_settings(new, stage)
    }
    assert differing == {"update"}
    changes = changed_settings(old.flat(), new.flat())
    assert changes[1:3] == [("weight.gamma", 0.5, None), ("weight.name", "iw_opd", "uniform")]
    line = "weight.name 'iw_opd' → 'uniform' affects updates; rollouts and scores can be reused"
    assert describe_changes(changes).splitlines()[2] == line


@pytest.mark.parametrize(
    ("key", "old", "new", "line"),
    [
        ("weight.gamma", 0.5, 0.7, "weight.gamma 0.5 → 0.7 affects updates; rollouts and scores can be reused"),
        ("score.top_k", 0, 4, "score.top_k 0 → 4 affects scores; rollouts can be reused"),
        ("rollout.max_tokens", 9, 8, "rollout.max_tokens 9 → 8 affects rollouts and continuations"),
        ("seed", 0, 1, "seed 0 → 1 affects prompts, rollouts, updates, eval and continuations"),
    ],
)
def test_describe_changes(key: str, old: object, new: object, line: str) -> None:
    assert describe_changes([(key, old, new)]) == line


def test_unaffected_stages() -> None:
    assert unaffected_stages(["weight.gamma"]) == ["rollout", "score"]
    assert unaffected_stages(["weight.gamma", "score.top_k"]) == ["rollout"]
    assert unaffected_stages(["prompts.limit"]) == []
