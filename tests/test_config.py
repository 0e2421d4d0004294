"""Recipes: what loads, how files merge, and what a wrong one is told."""

import shutil
from pathlib import Path

import pytest
import tomli_w
from helpers.commands import ROOT, invoke
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.artifacts.stage_dir import changed_settings
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.dependencies import (
    affected_stages,
    describe_changes,
    fingerprint_settings,
    scorer_fingerprint_settings,
)
from opdctl.recipe.load import load_recipe, with_benchmarks
from opdctl.recipe.schema import Recipe

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SMALLEST = """
name = "smallest"
student.model = "toy:student"
teacher.model = "toy:teacher"
prompts.source = "toy:sort12"
prompts.limit = 2048
train.steps = 3
"""


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    return path


def refusal(files: list[Path], *overrides: str) -> OpdctlError:
    """Return the error that loading gives."""
    with pytest.raises(OpdctlError) as caught:
        load_recipe(files, overrides)
    assert caught.value.code == ExitCode.USAGE
    return caught.value


def loaded(files: list[Path]) -> Recipe | OpdctlError:
    """Return the recipe or the error; anything else is raised."""
    try:
        return load_recipe(files)
    except OpdctlError as error:
        return error


def lines(error: OpdctlError) -> list[str]:
    return error.message.splitlines()


# ── What is shipped ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_recipes_are_shipped() -> None:
    assert {"cross_scale", "quickstart"} == {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_named_as_its_file(path: Path) -> None:
    assert load_recipe([path]).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_of_a_shipped_recipe_writes_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--recipe", path, "--dry-run")
    assert result.code == 0, result.err
    assert result.out == ""
    assert "nothing was written" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_gives_its_plan_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = invoke("train", "--recipe", ROOT / "recipes" / "quickstart.toml", "--dry-run", "--json").json()
    # 64 prompts of 13 tokens and as many responses of 160; 4,096 prompts are 64 steps of 64.
    assert (plan["prompt_tokens_per_step"], plan["response_tokens_per_step"]) == (832, 10240)
    assert (plan["steps"], plan["epochs"]) == (64, 1.0)
    assert plan["parameters"] == {"student": 110528, "teacher": 365664}


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "key", "told"),
    [
        ("train.step=3", "train.step", "did you mean `steps`?"),
        ("wieght.name=uniform", "wieght", "did you mean `weight`?"),
        ("student.modle=toy:student", "student.modle", "did you mean `model`?"),
        ("train.steps=many", "train.steps", "integer"),
        ("train.steps='3'", "train.steps", "integer"),
        ("train.steps=2.0", "train.steps", "integer"),
        ("train.steps=true", "train.steps", "integer"),
        ("train.steps=0", "train.steps", "greater than 0"),
        ("rollout.temperature=inf", "rollout.temperature", "finite"),
        ("rollout.temperature=nan", "rollout.temperature", "finite"),
        ("eval.top_p=1.5", "eval.top_p", "less than or equal to 1"),
        ("student.dtype=bf16", "student.dtype", "'bfloat16'"),
        ("name=a/b", "name", "a/b"),
        ("name=..", "name", ".."),
        ("weight.name=unifrom", "weight", "did you mean `uniform`?"),
        ("weight.gama=0.5", "weight", "did you mean `gamma`?"),
        ("weight.gamma=-1", "weight", "got -1"),
        ("weight.gamma=inf", "weight", "got inf"),
        ("weight.gamma=high", "weight", "got 'high'"),
        ("objective.name=policy_gradent", "objective", "did you mean `policy_gradient`?"),
        ("objective.dual_clip=1", "objective", "got 1"),
        ("rollout.engine=transfomers", "rollout.engine", "did you mean `transformers`?"),
        ("score.engine=transfomers", "score.engine", "did you mean `transformers`?"),
        ("eval.bench=['aime25', 'amie24']", "eval.bench", "did you mean `aime24`?"),
        ("prompts.min_values.difficulty=hard", "prompts.min_values.difficulty", "number"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_wrong(smallest: Path, override: str, key: str, told: str) -> None:
    (line,) = lines(refusal([smallest], override))
    assert line.startswith(f"--set: {key}")
    assert told in line


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.num_parts=5"], "rollout.num_parts"),
        (["rollout.prompts_per_step=10", "prompts.limit=9"], "prompts.limit"),
        (["train.betas=[0.9, 1.0]"], "train.betas"),
        (["rollout.temperature=0.5"], "rollout"),
        (["rollout.top_p=0.9"], "rollout"),
        (["eval.bench=[]"], "eval.bench"),
    ],
)
def test_an_impossible_combination_is_refused(smallest: Path, overrides: list[str], key: str) -> None:
    assert lines(refusal([smallest], *overrides))[0].startswith(f"--set: {key}")


def test_as_many_parts_as_responses_are_possible(smallest: Path) -> None:
    recipe = load_recipe(
        [smallest], ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.num_parts=4"]
    )
    assert recipe.responses_per_step() == 4


def test_the_embedded_task_needs_a_count(tmp_path: Path) -> None:
    path = tmp_path / "endless.toml"
    path.write_text(SMALLEST.replace("prompts.limit = 2048", ""))
    assert "prompts.limit" in refusal([path]).message


def test_missing_keys_are_all_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text("seed = 1\n")
    missing = {f"{path}: {key}: is required" for key in ("name", "student", "prompts", "train")}
    assert set(lines(refusal([path]))) == missing | {f"{path}: teacher: is required, or [teachers]"}


def test_all_errors_come_at_once_each_with_its_file(smallest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("train.stpes = 4\nweight.gamma = -1.0\nrollout.engine = 'nothing'\n")
    error = refusal([smallest, other], "objective.clip_lo=0.1", "eval.temperature=inf", "eval.bench=['nothing']")
    assert len(lines(error)) == 6
    assert "6" in (error.hint or "")
    for file, key in [
        (other, "train.stpes"),
        (other, "weight"),
        (other, "rollout.engine"),
        ("--set", "objective"),
        ("--set", "eval.temperature"),
        ("--set", "eval.bench"),
    ]:
        assert any(line.startswith(f"{file}: {key}") for line in lines(error)), (file, key)


def test_every_wrong_parameter_of_one_component_is_named(smallest: Path) -> None:
    error = refusal([smallest], "objective.clip_lo=0.1", "objective.dual_clp=3.0", "objective.clip_high='x'")
    assert all(name in error.message for name in ("clip_lo", "dual_clp", "clip_high must be"))


def test_a_wrong_parameter_is_laid_to_the_file_it_stands_in(smallest: Path, tmp_path: Path) -> None:
    typo, named = tmp_path / "typo.toml", tmp_path / "named.toml"
    typo.write_text("weight = { name = 'iw_opd', gama = 0.5 }\n")
    named.write_text("weight.name = 'iw_opd'\n")
    assert lines(refusal([smallest, typo, named]))[0].startswith(f"{typo}: weight")


@pytest.mark.parametrize("key", ["weight.gamma", "objective.clip_high", "train.learning_rate", "eval.temperature"])
def test_a_number_too_large_for_a_float_is_refused(smallest: Path, key: str) -> None:
    assert key.partition(".")[0] in refusal([smallest], f"{key}=1{'0' * 400}").message


def test_a_file_that_is_not_there_gets_the_nearest_name(smallest: Path) -> None:
    error = refusal([smallest.with_name("smalest.toml")])
    assert "no such recipe" in error.message
    assert "did you mean `smallest.toml`?" in error.message


@pytest.mark.parametrize("content", [b"name = ", b"name = 'a\nb'", b"\xff\xfe", b"name = 'a'\nname = 'b'"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert str(path) in refusal([path]).message


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal([tmp_path]).message


def test_a_byte_order_mark_is_accepted(smallest: Path) -> None:
    smallest.write_text(SMALLEST, encoding="utf-8-sig")
    assert load_recipe([smallest]).name == "smallest"


# ── Merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_later_files_win_key_by_key_and_set_wins_over_all(smallest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("seed = 5\n[train]\nsteps = 7\nwarmup_steps = 2\n")
    recipe = load_recipe([smallest, other], ["seed=6", "train.warmup_steps=1", "train.warmup_steps=4"])
    assert (recipe.name, recipe.seed) == ("smallest", 6)
    assert (recipe.train.steps, recipe.train.warmup_steps) == (7, 4)
    assert load_recipe([other, smallest]).train.steps == 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=12", "seed", 12),
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),
        ("train.weight_decay=0", "train.weight_decay", 0),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing", True),
        ("train.betas=[0.8, 0.95]", "train.betas", [0.8, 0.95]),
        ("student.dtype=float32", "student.dtype", "float32"),
        ("student.dtype='float32'", "student.dtype", "float32"),
        ("student.model=./a=b", "student.model", "./a=b"),
        ("eval.suffix=", "eval.suffix", ""),
        ("eval.suffix=answer in one word", "eval.suffix", "answer in one word"),
        ("prompts.min_values.difficulty=6", "prompts.min_values.difficulty", 6.0),
        ("prompts.template_arguments={enable_thinking=false}", "prompts.template_arguments.enable_thinking", False),
        ("weight.gamma=0.25", "weight.gamma", 0.25),
    ],
)
def test_set_takes_toml_values_and_bare_words(smallest: Path, override: str, key: str, value: object) -> None:
    assert load_recipe([smallest], [override]).flat()[key] == value


@pytest.mark.parametrize("override", ["seed", "=3", "train.=3", ".seed=3", "train..steps=3", ""])
def test_set_must_read_key_equals_value(smallest: Path, override: str) -> None:
    assert "must read key=value" in refusal([smallest], override).message


def test_another_weight_drops_the_parameters_of_the_one_before(smallest: Path) -> None:
    before = load_recipe([smallest], ["weight.gamma=0.25"])
    after = load_recipe([smallest], ["weight.name=iw_opd", "weight.gamma=0.25", "weight.name=uniform"])
    assert before.weight.params == {"gamma": 0.25, "signed": False}
    assert (after.weight.name, after.weight.params) == ("uniform", {})


def test_the_same_weight_named_again_keeps_its_parameters(smallest: Path) -> None:
    named = load_recipe([smallest], ["weight.name=iw_opd", "weight.gamma=0.25", "weight.name=iw_opd"])
    default = load_recipe([smallest], ["weight.gamma=0.25", "weight.name=iw_opd"])
    assert named.weight.params == default.weight.params == {"gamma": 0.25, "signed": False}


def test_a_second_weight_has_parameters_of_its_own_and_stays_when_the_first_changes(smallest: Path) -> None:
    both = load_recipe(
        [smallest], ["weight.times.name=prefix_only", "weight.times.fraction=0.2", "weight.name=uniform"]
    )
    assert both.weight.times is not None
    assert (both.weight.name, both.weight.times.name) == ("uniform", "prefix_only")
    assert both.weight.times.params == {"fraction": 0.2}
    other = load_recipe([smallest], ["weight.times.name=prefix_only", "weight.times.name=linear_decay"])
    assert other.weight.times is not None
    assert other.weight.times.params == {"gamma": 0.5}
    assert load_recipe([smallest]).weight.times is None
    error = refusal([smallest], "weight.times.name=prefix_onli", "weight.gamma=-1")
    assert any("weight.times.name" in line and "`prefix_only`" in line for line in lines(error))
    assert any("weight.gamma" in line for line in lines(error))


def test_what_weight_and_objective_need_is_stored_without_being_asked_for(smallest: Path) -> None:
    recipe = load_recipe([smallest], ["weight.name=tip", "objective.name=jsd", "objective.top_k=20", "score.top_k=3"])
    assert (recipe.rollout.entropy, recipe.rollout.top_k) == (True, 16)  # of tip
    assert (recipe.score.student_top_k, recipe.score.top_k) == (True, 20)  # of tip; of jsd, more than was asked for
    assert recipe.score.hidden_states is False
    asked = load_recipe([smallest], ["weight.name=tip", "rollout.top_k=32"])
    assert asked.rollout.top_k == 32
    times = load_recipe([smallest], ["weight.times.name=prune", "objective.name=reverse_kl", "objective.support=full"])
    assert (times.rollout.top_k, times.score.top_k, times.score.hidden_states) == (16, 16, True)


def test_several_teachers_are_named_by_prompts_and_exclude_the_one(smallest: Path) -> None:
    several = ["teachers.math.model=toy:teacher", "teachers.code.model=toy:teacher", "prompts.teacher_column=domain"]
    assert "teacher: not beside [teachers]: give one or the other" in refusal([smallest], *several).message
    text = smallest.read_text().replace('teacher.model = "toy:teacher"', "")
    smallest.write_text(text)
    recipe = load_recipe([smallest], several)
    assert list(recipe.scorers()) == ["teacher-math", "teacher-code"]
    assert set(scorer_fingerprint_settings(recipe, "teacher-math")) >= {"score.engine", "teachers.math.model"}
    assert not any(key.startswith("teachers.code") for key in scorer_fingerprint_settings(recipe, "teacher-math"))
    assert "prompts.teacher_column" in refusal([smallest], *several[:2]).message
    assert "teachers.a/b" in refusal([smallest], *several, "teachers.a/b.model=toy:teacher").message


def test_extrapolation_needs_a_reference_and_the_sampled_token(smallest: Path) -> None:
    assert "needs a [reference] model" in refusal([smallest], "train.extrapolation=1.25").message
    with_reference = ["train.extrapolation=1.25", "reference.model=toy:student"]
    recipe = load_recipe([smallest], with_reference)
    assert list(recipe.scorers()) == ["teacher", "reference"]
    assert "knows no reference" in refusal([smallest], *with_reference, "objective.name=jsd").message


def test_other_benchmarks_replace_the_recipes(smallest: Path) -> None:
    recipe = load_recipe([smallest])
    assert with_benchmarks(recipe, ["aime24", "sort12"]).eval.bench == ["aime24", "sort12"]
    assert recipe.eval.bench == ["sort12"]
    with pytest.raises(OpdctlError, match="did you mean `aime25`"):
        with_benchmarks(recipe, ["aime_25"])


# ── What follows from a recipe ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_written_out_loads_as_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe([path], ['eval.suffix="\\u007f\\r\\n\\"\\\\boxed{}"', "seed=3"])
    copy = tmp_path / "copy.toml"
    copy.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe([copy]) == recipe
    assert load_recipe([copy]).to_toml() == recipe.to_toml()


@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("name", []),
        ("seed", ["prompts", "rollout", "update", "eval", "continuations"]),
        ("student.model", ["prompts", "rollout", "update"]),
        ("teacher.model", ["score"]),
        ("prompts.limit", ["prompts"]),
        ("rollout.max_tokens", ["rollout", "continuations"]),
        ("weight.gamma", ["update"]),
        ("eval.samples", ["eval"]),
        ("pipeline.device", []),
    ],
)
def test_a_key_shapes_its_stages(key: str, stages: list[str]) -> None:
    assert affected_stages(key) == stages


def test_the_settings_of_a_stage_leave_out_what_may_change(smallest: Path) -> None:
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


def test_another_weight_changes_the_update_alone(smallest: Path) -> None:
    old, new = load_recipe([smallest]), load_recipe([smallest], ["weight.name=uniform"])
    differing = {
        stage
        for stage in ("prompts", "rollout", "score", "update", "eval")
        if fingerprint_settings(old, stage) != fingerprint_settings(new, stage)
    }
    assert differing == {"update"}
    changes = changed_settings(old.flat(), new.flat())
    assert changes[:2] == [("weight.gamma", 0.5, None), ("weight.name", "iw_opd", "uniform")]
    assert (
        describe_changes(changes).splitlines()[1]
        == "weight.name 'iw_opd' → 'uniform' shapes updates, not rollouts or scores"
    )


# ── Whatever is written ──────────────────────────────────────────────────────────────────────────────────────────────

VALUES = st.recursive(
    st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.dates()
    | st.text(max_size=6)
    | st.sampled_from(["toy:student", "toy:sort12", "uniform", "iw_opd", "float32", "sort12", "cpu"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "gamma", "model", "x"]), inner)
    ),
    max_leaves=4,
)
KEYS = [
    f"{name}.{key}"
    for name, field in Recipe.model_fields.items()
    for key in getattr(field.annotation, "model_fields", ())
]
DOTTED = st.dictionaries(
    st.sampled_from([*KEYS, *Recipe.model_fields, "weight.gamma", "objective.dual_clip", "other"]), VALUES, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(DOTTED)
def test_any_toml_is_a_recipe_or_an_error_that_says_why(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, object]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    base, other = folder / "base.toml", folder / "other.toml"
    base.write_text(SMALLEST)
    tree: dict[str, object] = {}
    for dotted, value in found.items():
        section, _, key = dotted.partition(".")
        if not key:
            tree[section] = value
        elif isinstance(held := tree.setdefault(section, {}), dict):
            held[key] = value
    other.write_text(tomli_w.dumps(tree), encoding="utf-8")
    outcome = loaded([base, other])
    shutil.rmtree(folder)
    assert isinstance(outcome, Recipe) or (outcome.code == ExitCode.USAGE and str(folder) in outcome.message)
