"""The shipped recipes: each one's header holds, its command resolves, and it sets what it says."""

import json
import re
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT, invoke

from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import find
from opdctl.losses.objectives import Objective
from opdctl.losses.token_weights import Weight
from opdctl.recipe.components import build_objective, build_token_weight
from opdctl.recipe.dependencies import is_mutable
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe

FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))
PAIRS = {  # of the paper: student and teacher parameters
    "cross_scale": (4_022_468_096, 30_532_122_624),
    "30b-to-1.7b": (1_720_574_976, 30_532_122_624),
    "30b-to-0.6b": (596_049_920, 30_532_122_624),
    "4b-to-4b": (4_022_468_096, 4_022_468_096),
    "4b-to-1.7b": (1_720_574_976, 4_022_468_096),
    "4b-to-0.6b": (596_049_920, 4_022_468_096),
    "235b-to-30b": (30_532_122_624, 235_093_634_560),
}
WEIGHTS = {
    "all_tokens": {"name": "uniform"},
    "prefix_30": {"name": "prefix_only", "fraction": 0.3},
    "suffix_30": {"name": "suffix_only", "fraction": 0.3},
    "prefix_boost": {"name": "prefix_boost", "fraction": 0.3, "multiplier": 1.5},
    "linear_decay": {"name": "linear_decay", "gamma": 0.5},
    "curriculum": {"name": "prefix_curriculum", "start": 0.3, "end": 1.0, "steps": 165},
    "signed_share": {"name": "iw_opd", "gamma": 0.5, "signed": True},
    "prefix_ratio": {"name": "prefix_ratio", "alpha": 0.1},
    "teacher_confidence": {"name": "teacher_confidence"},
}


def header(path: Path) -> dict[str, str]:
    """Return what the comment at the head of a recipe says, by its first word."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if match := re.fullmatch(r"#   (\S+(?: run)?) {2,}(.+)", line):
            name = match[1]
            found[name] = match[2]
        elif line.startswith("#      ") and name:
            found[name] += " " + line.lstrip("# ")
    return found


def words_of(path: Path) -> list[str]:
    """Return the words of the command in a recipe's header, after `opdctl`."""
    program, *words = shlex.split(header(path)["command"])
    assert program == "opdctl"
    return words


def files_of(path: Path) -> list[Path]:
    words = words_of(path)
    return [ROOT / word for before, word in pairwise(words) if before == "--recipe"]


def recipe_of(name: str) -> Recipe:
    (path,) = (path for path in RECIPES if path.stem == name)
    return load_recipe(files_of(path))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, and stand-ins for the data that `recipes/prompts.py` writes."""
    (tmp_path / "recipes").symlink_to(FOLDER)
    rows = [{"id": str(i), "domain": ("math", "code")[i % 2], "prompt": "?", "answer": None} for i in range(1024)]
    (tmp_path / "data").mkdir()
    for name in ("code", "math-code"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_command_of_a_recipe_resolves_and_its_components_build(path: Path, checkout: Path) -> None:
    result = invoke(*words_of(path), "--dry-run", "--json")
    assert result.code == 0, result.err
    assert Path(result.json()["run_dir"]) == Path("runs") / path.stem
    assert files_of(path)[-1] == path
    recipe = load_recipe(files_of(path))
    assert isinstance(build_token_weight(recipe), Weight)
    assert isinstance(build_objective(recipe), Objective)
    assert [find(name, recipe.eval).name for name in recipe.eval.bench] == recipe.eval.bench
    assert {entry.name for entry in checkout.iterdir()} == {"recipes", "data"}  # nothing was written


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_command_hardware_time_and_result(path: Path, checkout: Path) -> None:
    said = header(path)
    assert said.keys() >= {"command", "hardware", "time", "expected"}
    assert all(len(line) <= 120 for line in path.read_text().splitlines())
    if path.stem in ("quickstart", "perm"):
        return
    assert said["not run"].startswith("by us")
    assert said["time"] == time_line(invoke(*words_of(path), "--dry-run", "--json").json())


def time_line(plan: dict[str, Any]) -> str:
    """Return what a header says of the time: `--dry-run`'s own figure."""
    stages = plan["stages"].values()
    gpus = max(stage["gpus"] for stage in stages)
    assert all(stage["bytes"] <= plan["hardware"]["memory_gib"] * 2**30 for stage in stages)
    return (
        f"at most {plan['gpu_hours']:,.0f} GPU-hours, {plan['seconds'] / 3600:.0f} h on {gpus} GPU{'s' * (gpus > 1)}: "
        "`--dry-run`'s estimate, every response at its limit"
    )


def test_every_pair_of_the_paper_has_a_recipe() -> None:
    assert {path.stem for path in (FOLDER / "pairs").glob("*.toml")} | {"cross_scale"} == PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_of_the_models_it_names(name: str, checkout: Path) -> None:
    (path,) = (path for path in RECIPES if path.stem == name)
    parameters = invoke(*words_of(path), "--dry-run", "--json").json()["parameters"]
    assert (parameters["student"], parameters["teacher"]) == PAIRS[name]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_s_recipe_sets_that_weight_alone(name: str) -> None:
    recipe = recipe_of(name)
    assert {"name": recipe.weight.name, **recipe.weight.params}.items() >= WEIGHTS[name].items()
    (path,) = (path for path in RECIPES if path.stem == name)
    without = load_recipe(files_of(path)[:-1]).flat()
    differing = {key for key, value in recipe.flat().items() if without.get(key) != value}
    assert differing <= {"name"} | {key for key in recipe.flat() if key.startswith("weight.")}


def test_the_paper_s_settings_are_those_of_the_recipe() -> None:
    recipe = recipe_of("cross_scale")
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt, recipe.train.updates_per_step) == (
        1024,
        1,
        1,
    )
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.warmup_steps) == (1e-5, 0.01, 0)
    assert (recipe.prompts.max_tokens, recipe.rollout.max_tokens, recipe.eval.max_tokens) == (2048, 16384, 16384)
    assert (recipe.eval.every_steps, recipe.train.keep_every_steps) == (10, 50)
    assert {find(name, recipe.eval).samples_under(recipe.eval) for name in recipe.eval.bench} == {32}
    assert {find(name, recipe.eval).samples_under(recipe.eval) for name in recipe_of("code").eval.bench} == {4}
    for name in ("cross_scale", "code", "two_teachers"):  # three epochs of whole steps
        of = recipe_of(name)
        assert of.prompts.limit is not None
        assert of.train.steps == 3 * (of.prompts.limit // of.rollout.prompts_per_step), name


def test_the_variants_are_what_they_say() -> None:
    assert list(recipe_of("two_teachers").scorers()) == ["teacher-math", "teacher-code"]
    plain, weighted = recipe_of("exopd"), recipe_of("iw_exopd")
    assert (plain.weight.name, plain.train.extrapolation) == ("uniform", 1.25)
    assert (weighted.weight.name, weighted.train.extrapolation) == ("iw_opd", 1.25)
    assert plain.reference is not None
    assert plain.reference.model == plain.student.model
    assert recipe_of("code").eval.allow_code_execution
    assert recipe_of("lora_one_gpu").lora.rank > 0


def test_a_section_of_an_earlier_file_can_be_taken_away(tmp_path: Path) -> None:
    over = tmp_path / "over.toml"
    over.write_text("prompts.min_values = false\nstudent.shape = false\n")
    recipe = load_recipe([FOLDER / "cross_scale.toml", over])
    assert (recipe.prompts.min_values, recipe.student.shape) == ({}, None)
    over.write_text("teacher = false\n")
    with pytest.raises(OpdctlError, match=r"over\.toml: teacher: is required"):
        load_recipe([FOLDER / "cross_scale.toml", over])
    with pytest.raises(OpdctlError, match="must be a table"):
        load_recipe([FOLDER / "cross_scale.toml"], ["reference=false"])  # there is none


def test_what_a_dry_run_counts_with_changes_nothing_of_a_run() -> None:
    free = ("hardware.train_gpus", "student.shape", "student.shape.layers", "teachers.math.shape.tied")
    assert all(map(is_mutable, free))
    assert not any(map(is_mutable, ("student.model", "student.dtype", "weight.shape")))


def test_the_prompts_of_the_code_recipes_are_made_of_the_data_sets(tmp_path: Path) -> None:
    spec = spec_from_file_location("recipe_prompts", FOLDER / "prompts.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    turns = [{"role": "system", "content": "Act so."}, {"role": "user", "content": "Add two numbers."}]
    found = list(script.code([{"ability": "math", "prompt": turns}, {"ability": "code", "prompt": turns}]))
    assert found == [{"id": "code-1", "domain": "code", "prompt": "Add two numbers.", "answer": None}]
    rows = [{"difficulty": d, "question": "1 + 1?", "final_answer": 2} for d in (5.5, 6.0)]
    assert list(script.math(rows)) == [{"id": "math-1", "domain": "math", "prompt": "1 + 1?", "answer": "2"}]
