"""Loading recipes: files, `--set`, merging, and defaults."""

import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w
from helpers.commands import ROOT
from helpers.recipes import SMALLEST, error_lines, load_error
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.load import default_eval_recipe, load_recipe, with_benchmarks
from opdctl.recipe.schema import Model, Recipe

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_file_gets_the_nearest_name(smallest: Path) -> None:
    error = load_error([smallest.with_name("smalest.toml")], kind="missing_file")
    assert f"did you mean `{smallest}`?" in error.message


@pytest.mark.parametrize("content", [b"name = ", b"name = 'a\nb'", b"\xff\xfe", b"name = 'a'\nname = 'b'"])
def test_malformed_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert str(path) in load_error([path]).message


def test_directory_is_not_a_recipe(tmp_path: Path) -> None:
    assert str(tmp_path) in load_error([tmp_path]).message


def test_byte_order_mark_is_accepted(smallest: Path) -> None:
    smallest.write_text(SMALLEST, encoding="utf-8-sig")
    assert load_recipe([smallest]).name == "smallest"


def test_only_the_default_of_a_removed_key_is_accepted(smallest: Path) -> None:
    """Runs of earlier versions recorded vllm.data_parallel_size = 1; another value never worked."""
    assert load_recipe([smallest], ["vllm.data_parallel_size=1"]).vllm == load_recipe([smallest]).vllm
    assert "vllm.data_parallel_size" in load_error([smallest], "vllm.data_parallel_size=2").message


# ── Merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("overrides", "num_parts"),
    [
        ((), 32),  # 1,024 responses
        (("rollout.prompts_per_step=33",), 2),
        (("rollout.prompts_per_step=8", "rollout.samples_per_prompt=4"), 1),
        (("rollout.prompts_per_step=8", "rollout.num_parts=8"), 8),
    ],
)
def test_parts_have_at_most_32_responses_by_default(smallest: Path, overrides: tuple[str, ...], num_parts: int) -> None:
    """The number depends on nothing that workers or a later start could change, and the run records it."""
    recipe = load_recipe([smallest], overrides)
    assert recipe.rollout.num_parts == num_parts
    assert tomllib.loads(recipe.to_toml())["rollout"]["num_parts"] == num_parts


def test_default_that_depends_on_an_invalid_key_is_no_second_error(smallest: Path) -> None:
    (line,) = error_lines([smallest], "rollout.prompts_per_step=0")
    assert line.startswith("--set: rollout.prompts_per_step: ")


def test_later_values_override_key_by_key(smallest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("seed = 5\n[train]\nsteps = 7\nwarmup_steps = 2\n")
    recipe = load_recipe([smallest, other], ["seed=6", "train.warmup_steps=1", "train.warmup_steps=4"])
    assert (recipe.name, recipe.seed) == ("smallest", 6)
    assert (recipe.train.steps, recipe.train.warmup_steps) == (7, 4)
    assert load_recipe([other, smallest]).train.steps == 3


def test_false_removes_a_section_or_a_value(smallest: Path, tmp_path: Path) -> None:
    cross_scale, over = ROOT / "recipes" / "cross_scale.toml", tmp_path / "over.toml"
    over.write_text("prompts.template_arguments = false\nprompts.answer_column = false\nstudent.shape = false\n")
    recipe = load_recipe([cross_scale, over])
    assert (recipe.prompts.template_arguments, recipe.prompts.answer_column) == ({}, None)
    assert recipe.student.shape is None
    assert load_recipe([cross_scale], ["prompts.limit=false"]).prompts.limit is None
    assert load_recipe([cross_scale], ["train.gradient_checkpointing=false"]).train.gradient_checkpointing is False
    over.write_text("teacher = false\n")
    (line,) = error_lines([cross_scale, over])
    assert line.startswith(f"{over}: teacher: is required")
    (line,) = error_lines([cross_scale], "reference=false")  # there is none
    assert line.startswith("--set: reference: must be a table")


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
        ("prompts.where.difficulty='>= 6'", "prompts.where.difficulty", ">= 6"),
        ("prompts.where.difficulty=6", "prompts.where.difficulty", 6),
        ("prompts.min_values.difficulty=6", "prompts.where.difficulty", ">= 6"),  # the key of 0.2.0
        ("prompts.template_arguments={enable_thinking=false}", "prompts.template_arguments.enable_thinking", False),
        ("weight.gamma=0.25", "weight.gamma", 0.25),
    ],
)
def test_set_accepts_toml_values_and_bare_words(smallest: Path, override: str, key: str, value: object) -> None:
    assert load_recipe([smallest], [override]).flat()[key] == value


@pytest.mark.parametrize("override", ["seed", "=3", "train.=3", ".seed=3", "train..steps=3", ""])
def test_set_must_be_key_equals_value(smallest: Path, override: str) -> None:
    assert f"--set {override}: " in load_error([smallest], override, kind="invalid_usage").message


def test_new_weight_drops_the_previous_parameters(smallest: Path) -> None:
    before = load_recipe([smallest], ["weight.gamma=0.25"])
    after = load_recipe([smallest], ["weight.name=iw_opd", "weight.gamma=0.25", "weight.name=uniform"])
    assert before.weight.params == {"gamma": 0.25, "floor": 1.0, "signed": False}
    assert (after.weight.name, after.weight.params) == ("uniform", {})


def test_same_weight_keeps_its_parameters(smallest: Path) -> None:
    named = load_recipe([smallest], ["weight.name=iw_opd", "weight.gamma=0.25", "weight.name=iw_opd"])
    default = load_recipe([smallest], ["weight.gamma=0.25", "weight.name=iw_opd"])
    assert named.weight.params == default.weight.params == {"gamma": 0.25, "floor": 1.0, "signed": False}


def test_new_source_drops_revision_and_file_of_the_previous_one(smallest: Path, tmp_path: Path) -> None:
    hub, local = tmp_path / "hub.toml", tmp_path / "local.toml"
    hub.write_text("[prompts]\nsource = 'a/b'\nrevision = 'c'\ndata_files = 'd.parquet'\nlimit = 2000\n")
    local.write_text("[prompts]\nsource = 'p.jsonl'\n")

    def location(files: list[Path], *overrides: str) -> tuple[object, ...]:
        prompts = load_recipe(files, overrides).prompts
        return prompts.source, prompts.revision, prompts.data_files, prompts.limit

    assert location([smallest, hub], "prompts.source=a/b") == ("a/b", "c", "d.parquet", 2000)
    assert location([smallest, hub, local]) == ("p.jsonl", None, None, 2000)
    assert location([smallest, local, hub]) == ("a/b", "c", "d.parquet", 2000)
    changed = ["prompts.source=e/f", "prompts.revision=g"]
    assert location([smallest, hub], *changed) == ("e/f", "g", None, 2000)


def test_second_weight_is_independent_of_the_first(smallest: Path) -> None:
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
    lines = error_lines([smallest], "weight.times.name=prefix_onli", "weight.gamma=-1")
    assert any("weight.times.name" in line and "`prefix_only`" in line for line in lines)
    assert any("weight.gamma" in line for line in lines)


def test_with_benchmarks_replaces_the_benchmarks(smallest: Path) -> None:
    recipe = load_recipe([smallest])
    assert with_benchmarks(recipe, ["aime24", "sort12"]).eval.bench == ["aime24", "sort12"]
    assert recipe.eval.bench == ["sort12"]
    with pytest.raises(OpdctlError, match="did you mean `aime25`") as caught:
        with_benchmarks(recipe, ["aime_25"])
    assert caught.value.kind == "unknown_name"


# ── Defaults ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_default_eval_recipe() -> None:
    recipe = default_eval_recipe("toy:student", ["eval.samples=2"])
    assert (recipe.name, recipe.student.model, recipe.eval.samples) == ("eval", "toy:student", 2)


@pytest.mark.parametrize(
    ("files", "overrides", "name"),
    [
        (["base.toml"], [], "base"),
        (["base.toml", "pairs/4b-to-0.6b.toml", "weights/prefix_30.toml"], [], "base-4b-to-0.6b-prefix_30"),
        (["base.toml"], ["seed=3", "train.steps=2", "seed=4"], "base-seed-4"),
        (["base.toml", "my weight (2).toml"], [], "base-my-weight--2-"),
        (["_base.toml"], [], "base"),
        (["é.toml"], [], "run"),
        (["base.toml"], ["name=mine", "seed=3"], "mine"),
        (["base.toml", "named.toml"], ["seed=3"], "named"),
        ([], ["seed=3"], "seed-3"),
        ([], [], "run"),
    ],
)
def test_name_consists_of_those_of_the_files(tmp_path: Path, files: list[str], overrides: list[str], name: str) -> None:
    paths = [tmp_path / file for file in files]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("name = 'named'" if path.stem == "named" else "")
    base = {key: value for key, value in tomllib.loads(SMALLEST).items() if key != "name"}
    recipe = load_recipe(paths, overrides, base)
    assert recipe.name == name
    copy = tmp_path / "recipe.toml"
    copy.write_text(recipe.to_toml())
    assert load_recipe([copy], ["seed=9"]).name == name


def test_reference_of_extrapolation_is_the_initial_student(smallest: Path) -> None:
    student = ["student.dtype=float32", "student.revision=abc", "student.server=http://a:1/v1", "student.served_name=s"]
    recipe = load_recipe([smallest], [*student, "train.extrapolation=1.25"])
    assert recipe.reference == Model(model="toy:student", dtype="float32", revision="abc")
    assert list(recipe.scorers()) == ["teacher", "reference"]
    named = load_recipe([smallest], [*student, "train.extrapolation=1.25", "reference.model=toy:teacher"])
    assert named.reference == Model(model="toy:teacher")
    assert load_recipe([smallest], student).reference is None


def test_local_paths_become_absolute(smallest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "bench.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe([smallest], ["student.model=model", "eval.bench=['bench.jsonl', 'sort12']"])
    assert recipe.student.model == str(tmp_path / "model")
    assert recipe.eval.bench == [str(tmp_path / "bench.jsonl"), "sort12"]
    assert recipe.teacher is not None
    assert recipe.teacher.model == "toy:teacher"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_loads_as_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe([path], ['eval.suffix="\\u007f\\r\\n\\"\\\\boxed{}"', "seed=3"])
    copy = tmp_path / "copy.toml"
    copy.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe([copy]) == recipe
    assert load_recipe([copy]).to_toml() == recipe.to_toml()


# ── Arbitrary TOML ───────────────────────────────────────────────────────────────────────────────────────────────────


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


def load_or_error(files: list[Path]) -> Recipe | OpdctlError:
    """Return the recipe or the error; any other exception is raised."""
    try:
        return load_recipe(files)
    except OpdctlError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(DOTTED)
def test_any_toml_is_a_recipe_or_an_error(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    folder = tmp_path_factory.mktemp("any")
    base, other = folder / "base.toml", folder / "other.toml"
    base.write_text(SMALLEST)
    tree: dict[str, object] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        if not key:
            tree[section] = value
        elif isinstance(table := tree.setdefault(section, {}), dict):
            table[key] = value
    other.write_text(tomli_w.dumps(tree), encoding="utf-8")
    outcome = load_or_error([base, other])
    shutil.rmtree(folder)
    assert isinstance(outcome, Recipe) or (outcome.code == ExitCode.USAGE and str(folder) in outcome.message)
