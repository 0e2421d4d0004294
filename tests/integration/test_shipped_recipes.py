"""The recipes of the repository: correct headers, commands that resolve, and the settings of the paper."""

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.commands import ROOT, Launch, has_plan, invoke, split_launcher
from helpers.documents import PAGES, shown_commands

from opdctl.artifacts.files import format_bytes
from opdctl.data.prompts import load_problems
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.losses.objectives import Objective
from opdctl.losses.token_weights import Weight
from opdctl.pipeline import costs
from opdctl.pipeline.plan import ID_BYTES
from opdctl.recipe.components import build_objective, build_token_weight
from opdctl.recipe.library import find_recipe
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Eval, Recipe

FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.rglob("*.toml"))
BASE_RECIPES = sorted(FOLDER.glob("*.toml"))
GPU_RECIPES = [path for path in RECIPES if path.stem not in ("quickstart", "perm", "calculator")]
PAIRS = {  # of the paper: student and teacher parameters
    "cross_scale": (4_022_468_096, 30_532_122_624),
    "30b-to-1.7b": (1_720_574_976, 30_532_122_624),
    "30b-to-0.6b": (596_049_920, 30_532_122_624),
    "4b-to-4b": (4_022_468_096, 4_022_468_096),
    "4b-to-1.7b": (1_720_574_976, 4_022_468_096),
    "4b-to-0.6b": (596_049_920, 4_022_468_096),
    "235b-to-30b": (30_532_122_624, 235_093_634_560),
}
EXPECTED_WEIGHTS = {
    "opd": {"name": "uniform"},
    "iw_opd": {"name": "iw_opd", "gamma": 0.5, "floor": 1.0, "signed": False},
    "prefix_30": {"name": "prefix_only", "fraction": 0.3},
    "suffix_30": {"name": "suffix_only", "fraction": 0.3},
    "prefix_boost": {"name": "prefix_boost", "fraction": 0.3, "multiplier": 1.5},
    "linear_decay": {"name": "linear_decay", "gamma": 0.5},
    "curriculum": {"name": "prefix_curriculum", "start": 0.3, "end": 1.0, "steps": 165},
    "signed_share": {"name": "iw_opd", "gamma": 0.5, "floor": 1.0, "signed": True},
    "surrogate": {"name": "iw_opd", "gamma": 1.0, "floor": 0.0, "signed": False},
    "prefix_ratio": {"name": "prefix_ratio", "alpha": 0.001, "gamma": 1.0, "floor": 0.0, "normalize": "position"},
    "prefix_ratio_blend": {"name": "prefix_ratio", "gamma": 0.5, "floor": 1.0, "normalize": "position"},
    "teacher_confidence": {"name": "teacher_confidence", "alpha": 1.0, "window": 64, "q": 0.9, "w_min": 0.0},
}


def header(path: Path) -> dict[str, str]:
    """Return the fields of the comment at the top of a recipe."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if match := re.fullmatch(r"#   (\S+(?: run)?) {2,}(.+)", line):
            name = match[1]
            fields[name] = match[2]
        elif line.startswith("#      ") and name:
            fields[name] = fields[name].removesuffix(" \\") + " " + line.lstrip("# ")
    return fields


def words_of(path: Path) -> list[str]:
    """Return the arguments of the command in the header of a recipe."""
    return split_launcher(header(path)["command"]).words


def files_of(path: Path) -> list[Path]:
    words = words_of(path)
    return [find_recipe(word) for before, word in pairwise(words) if before == "--recipe"]


def recipe_of(name: str) -> Recipe:
    (path,) = (path for path in RECIPES if path.stem == name)
    return load_recipe(files_of(path))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the recipes."""
    (tmp_path / "recipes").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_command_of_a_recipe_resolves(path: Path, checkout: Path) -> None:
    result = invoke(*words_of(path), "--dry-run", "--json")
    assert has_plan(result), result.err
    assert Path(result.json()["run_dir"]) == Path("runs") / "-".join(file.stem for file in files_of(path))
    assert files_of(path)[-1] == path
    recipe = load_recipe(files_of(path))
    assert isinstance(build_token_weight(recipe), Weight)
    assert isinstance(build_objective(recipe), Objective)
    assert [find_benchmark(name, recipe.eval).name for name in recipe.eval.bench] == recipe.eval.bench
    assert {entry.name for entry in checkout.iterdir()} == {"recipes"}  # nothing was written


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_has_command_hardware_time_and_result(path: Path, checkout: Path) -> None:
    fields = header(path)
    assert fields.keys() >= {"command", "hardware", "time", "expected"}
    assert all(len(line) <= 120 for line in path.read_text().splitlines())
    if path not in GPU_RECIPES:
        return
    assert fields["not run"] == "by us: we had neither GPUs nor the models and data."
    assert fields["time"] == time_line(invoke(*words_of(path), "--dry-run", "--json").json())


def time_line(plan: dict[str, Any]) -> str:
    """Return the time of a header: the estimate of `--dry-run`."""
    gpus = max(stage["gpus"] for stage in plan["stages"].values())
    return (
        f"at most {plan['gpu_hours']:,.0f} GPU-hours, {plan['seconds'] / 3600:.0f} h on {gpus} GPU{'s' * (gpus > 1)}: "
        "estimate of `--dry-run` for responses of maximum length"
    )


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
def test_command_of_a_recipe_can_run_on_its_hardware(path: Path, checkout: Path) -> None:
    fields, recipe = header(path), load_recipe(files_of(path))
    launch = split_launcher(fields["command"])
    processes, words = launch.processes, launch.words
    hardware = re.match(r"(\d+) GPUs? of 80 GB(?:, (\d+) on a node)?", fields["hardware"])
    assert hardware is not None
    assert (processes, launch.processes_per_node) == (int(hardware[1]), int(hardware[2] or 1))
    plan = invoke(*words, "--dry-run", "--json").json()
    assert plan["colocated"]
    assert [f"{launch} {shlex.join(words[1:])}" for launch in plan["commands"]] == [fields["command"]]
    for name, stage in plan["stages"].items():
        assert stage["gpus"] == processes, name
        assert stage["fits"], f"{name}: {stage['obstacle']} {stage['excess_bytes']}"
        assert stage["bytes"] <= 0.92 * 79 * 2**30
    assert plan["node_bytes"] < 512 * 2**30 or "TiB of CPU memory" in fields["hardware"]
    engines = processes // (recipe.vllm.tensor_parallel_size * recipe.vllm.pipeline_parallel_size)
    assert recipe.rollout.num_parts % (4 * engines) == 0


PAGE_NAMES = {"cross_scale": "30B-A3B → 4B", "235b-to-30b": "235B-A22B → 30B-A3B (tensor parallel 8)"}


@pytest.mark.parametrize("name", PAIRS)
def test_scaling_page_has_the_estimates_of_every_pair(name: str, checkout: Path) -> None:
    (path,) = (path for path in RECIPES if path.stem == name)
    plan = invoke(*words_of(path), "--dry-run", "--json").json()
    stages = plan["stages"]
    gib = [f"{stages[stage]['bytes'] / 2**30:.1f}" for stage in ("rollout", "score teacher", "update")]
    hours = [stages[stage]["gpu_hours"] for stage in ("rollout", "score teacher", "update", "save and load")]
    hours += [stages["eval student"]["gpu_hours"] + stages["eval teacher"]["gpu_hours"], plan["gpu_hours"]]
    cells = [*gib, f"{plan['node_bytes'] / 2**30:,.0f}", *(f"{value:,.0f}" for value in hours)]
    title = PAGE_NAMES.get(name, name.upper().replace("30B", "30B-A3B").replace("-TO-", " → "))
    assert f"| {title} | {' | '.join(cells)} |" in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("mean", [None, 6000])
@pytest.mark.parametrize("colocated", [True, False])
def test_scaling_page_has_the_time_of_a_step(mean: int | None, colocated: bool, checkout: Path) -> None:
    settings = [] if mean is None else [f"hardware.mean_response_tokens={mean}"]
    settings += [] if colocated else ["hardware.train_gpus=8", "vllm.gpu_memory_utilization=0.9"]
    options = [word for setting in settings for word in ("--set", setting)] + ["--follow"] * (not colocated)
    plan = invoke("train", "--recipe", "cross_scale", *options, "--dry-run", "--json").json()
    seconds = [plan["stages"][name]["seconds"] for name in ("rollout", "score teacher", "update", "save and load")]
    placement = "colocated, 32 GPUs" if colocated else "16 + 8 + 8 GPUs"
    responses = "all of 16,384 tokens" if mean is None else f"mean {mean:,}"
    cells = [f"{value:,.0f}" for value in (*seconds, sum(seconds))] + [f"{165 * sum(seconds) / 3600:.1f} h"]
    assert f"| {placement} | {responses} | {' | '.join(cells)} |" in (ROOT / "docs" / "scaling.md").read_text()


def scaled_plan(*settings: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    words = [word for setting in settings for word in ("--set", setting)]
    plan: dict[str, Any] = invoke("train", "--recipe", "cross_scale", *options, *words, "--dry-run", "--json").json()
    return plan


def growth(factor: int) -> dict[str, str]:
    """Return a column of the table: the size of a run with `factor` times the prompts and GPUs."""
    sizes = {"rollout.prompts_per_step": 1024, "prompts.limit": 57_046, "hardware.train_gpus": 32}
    settings = [f"{key}={factor * value}" for key, value in sizes.items()] + ["eval.num_parts=30"] * (factor > 1)
    plan = scaled_plan(*settings)
    update, bytes_of_step = plan["stages"]["update"], plan["rollout_bytes_per_step"] + plan["score_bytes_per_step"]
    files_of_step = 2 * plan["parts_per_step"] + 3  # parts and manifest of rollout and scores, and update.json
    engines = update["gpus"] // plan["gpus_per_engine"]["rollout"]
    return {
        "responses of a step": f"{plan['responses_per_step']:,}",
        "GPUs": f"{update['gpus']:,}",
        "GPU-hours of 165 steps": f"{plan['gpu_hours']:,.0f}",
        "artifacts of a step": format_bytes(bytes_of_step),
        "artifacts of the run": format_bytes(plan["artifact_bytes"]),
        "files of a step": f"{files_of_step:,}",
        "files of all steps": f"{plan['steps'] * files_of_step:,}",
        "read by all trainer processes in a step": format_bytes(bytes_of_step * update["gpus"]),
        "read by all engines to load a student": format_bytes(plan["model_bytes"]["student"] * engines),
        "the step's tokens on each GPU": format_bytes(update["memory"]["step's tokens"]),
        "prompts in each process, at their limit": format_bytes(plan["prompts"] * 2048 * ID_BYTES),
    }


def test_scaling_page_has_the_growth_of_a_run(checkout: Path) -> None:
    page, columns = (ROOT / "docs" / "scaling.md").read_text(), [growth(factor) for factor in (1, 10, 1000)]
    for name in columns[0]:
        assert f"| {name} | {' | '.join(column[name] for column in columns)} |" in page
    step = [path for path in (ROOT / "tests/data/run-v5/step-00000").rglob("*") if path.is_file()]
    assert len(step) == 2 * 2 + 3  # as assumed above, of two parts


def test_scaling_page_has_the_limits_of_memory_and_time(checkout: Path) -> None:
    page = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    separate = ("--follow",)
    updates = [scaled_plan(f"rollout.max_tokens={n}", options=separate)["stages"]["update"] for n in (196608, 163840)]
    assert [update["fits"] for update in updates] == [False, True]
    too_much, enough = (f"{update['bytes'] / 2**30:.1f}" for update in updates)
    assert f"the update takes {too_much} GiB and does not fit, with 163,840 it takes {enough}." in page
    alone, among = (
        scaled_plan(f"rollout.prompts_per_step={n}", "hardware.train_gpus=4")["stages"]["rollout"] for n in (1, 95)
    )
    assert among["concurrent_responses"] == 95
    assert f"take this student {alone['seconds']:.0f} seconds alone on an engine of 4 GPUs" in page
    assert f"{among['seconds'] / 60:.1f} minutes among 95 responses" in page
    teachers = [scaled_plan("vllm.gpu_memory_utilization=0.9", options=("--recipe", "pairs/235b-to-30b", *separate))]
    teachers += [scaled_plan(options=("--recipe", "pairs/235b-to-30b"))]
    apart, beside = (plan["stages"]["eval teacher"] for plan in teachers)
    assert f"leaves {beside['memory']['cache'] / 2**30:.0f} GiB of cache, so its evaluation, once, takes " in page
    assert f"takes {beside['seconds'] / 3600:.0f} hours" in page
    assert f"it has {apart['memory']['cache'] / 2**30:.0f} GiB" in page


LONGEST = {
    ("pairs/30b-to-0.6b", "0.6B"): (486, 506),
    ("pairs/30b-to-1.7b", "1.7B"): (259, 273),
    ("pairs/4b-to-4b", "4B"): (156, 173),
    ("pairs/235b-to-30b", "30B-A3B"): (14, 122),
}


@pytest.mark.parametrize(("pair", "student"), LONGEST)
def test_scaling_page_has_the_longest_responses(pair: str, student: str) -> None:
    files = [ROOT / "recipes/cross_scale.toml", ROOT / f"recipes/{pair}.toml"]

    def update_gib(gpus: int, tokens: int) -> float:
        recipe = load_recipe(files, [f"hardware.train_gpus={gpus}", f"rollout.max_tokens={tokens}"])
        assert recipe.student.shape is not None
        return costs.update_cost(recipe, recipe.student.shape, None).bytes / 2**30

    cells: list[str] = []
    for gpus, longest in zip((8, 32), LONGEST[pair, student], strict=True):
        cells += [f"{update_gib(gpus, 16_384):.1f}", str(longest)]
        assert [update_gib(gpus, 1000 * (longest + more)) <= 0.92 * 79 for more in (0, 1)] == [True, False]
    assert f"| {student} | {' | '.join(cells)} |" in (ROOT / "docs" / "scaling.md").read_text()


SLURM_SCRIPT = re.compile(
    r'^ {4}(?P<settings>(?:[A-Z]+=(?:"[^"]*"|\S+) )*)bash docs/slurm/(?P<script>\w+)\.sh (?P<recipe>\S+)', re.MULTILINE
)
SCRIPT_OPTIONS = {"colocated": [], "ray": ["--launcher", "ray"], "follow": ["--follow"], "chain": ["--no-fill"]}


def documented_launches() -> dict[str, Launch]:
    """Return the launch of each documented command and script for GPUs, but for the commands of recipe headers."""
    launches = {
        line: split_launcher(line)
        for _, line in shown_commands()
        if "--recipe cross_scale" in line and "--dry-run" not in line
    }
    for page in PAGES:
        for match in SLURM_SCRIPT.finditer(page.read_text()):
            settings = dict(word.split("=", 1) for word in shlex.split(match["settings"]))
            words = ["train", "--recipe", match["recipe"], *SCRIPT_OPTIONS[match["script"]]]
            launches[match[0].strip()] = Launch(int(settings.get("NODES", 1)), int(settings.get("GPUS", 8)), words)
    return launches


@pytest.mark.parametrize("command", documented_launches())
def test_documented_command_fits_the_gpus_of_its_launcher(command: str, checkout: Path) -> None:
    """A command without a launcher trains on one GPU. The nodes must have GPUs for whole engines."""
    launch = documented_launches()[command]
    settings = []
    if launch.words[0] == "train" and "hardware.train_gpus" not in command:  # which is what Ray starts
        settings += ["--set", f"hardware.train_gpus={launch.processes}"]
    if launch.processes > 1:
        settings += ["--set", f"hardware.gpus_per_node={launch.processes_per_node}"]
    plan = invoke(*launch.words, *settings, "--dry-run", "--json").json()
    unfit = {name: stage["obstacle"] for name, stage in plan["stages"].items() if not stage["fits"]}
    assert not unfit


def test_commands_of_every_launcher_are_documented() -> None:
    """Otherwise the test above overlooks them."""
    programs = {re.sub(r"^.* bash docs/slurm/", "", command).split()[0] for command in documented_launches()}
    assert programs == {"opdctl", "torchrun", "srun", "colocated.sh", "ray.sh", "follow.sh", "chain.sh"}


def test_every_pair_of_the_paper_has_a_recipe() -> None:
    assert {path.stem for path in (FOLDER / "pairs").glob("*.toml")} | {"cross_scale"} == PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_pair_has_the_models_of_its_name(name: str, checkout: Path) -> None:
    (path,) = (path for path in RECIPES if path.stem == name)
    parameters = invoke(*words_of(path), "--dry-run", "--json").json()["parameters"]
    assert (parameters["student"], parameters["teacher"]) == PAIRS[name]


@pytest.mark.parametrize("name", EXPECTED_WEIGHTS)
def test_weight_recipe_sets_only_the_weight(name: str) -> None:
    recipe = recipe_of(name)
    assert {"name": recipe.weight.name, **recipe.weight.params}.items() >= EXPECTED_WEIGHTS[name].items()
    (path,) = (path for path in RECIPES if path.stem == name)
    without = load_recipe(files_of(path)[:-1]).flat()
    differing = {key for key, value in recipe.flat().items() if without.get(key) != value}
    assert differing <= {"name"} | {key for key in recipe.flat() if key.startswith("weight.")}


def test_cross_scale_has_the_settings_of_the_paper() -> None:
    recipe = recipe_of("cross_scale")
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt, recipe.train.updates_per_step) == (
        1024,
        1,
        1,
    )
    train = recipe.train
    assert (train.learning_rate, train.weight_decay, train.decay_vectors, train.warmup_steps) == (1e-5, 0.01, True, 0)
    assert (recipe.seed, train.aggregate, train.denominator) == (42, "response", "all")
    assert recipe.prompts.suffix == recipe.eval.suffix
    assert (recipe.prompts.max_tokens, recipe.rollout.max_tokens, recipe.eval.max_tokens) == (2048, 16384, 16384)
    assert (recipe.eval.every_steps, recipe.train.keep_every_steps) == (10, 50)
    assert {find_benchmark(name, recipe.eval).samples_per_problem(recipe.eval) for name in recipe.eval.bench} == {32}
    assert {
        find_benchmark(name, recipe.eval).samples_per_problem(recipe.eval) for name in recipe_of("code").eval.bench
    } == {4}
    for name in ("cross_scale", "code", "two_teachers"):  # three epochs of complete steps
        recipe = recipe_of(name)
        assert recipe.prompts.num_rows is not None
        assert recipe.train.steps == 3 * (recipe.prompts.num_rows // recipe.rollout.prompts_per_step), name


def test_settings_of_the_variants() -> None:
    assert list(recipe_of("two_teachers").scorers()) == ["teacher-math", "teacher-code"]
    plain, weighted = recipe_of("exopd"), recipe_of("iw_exopd")
    assert (plain.weight.name, plain.train.extrapolation) == ("uniform", 1.25)
    assert (weighted.weight.name, weighted.train.extrapolation) == ("iw_opd", 1.25)
    assert plain.reference == plain.student
    plain, weighted = recipe_of("iw_exopd"), recipe_of("iw_exopd_lambda")
    assert (plain.weight.modulates, weighted.weight.modulates) == ("loss", "extrapolation")
    assert recipe_of("code").eval.allow_code_execution
    assert recipe_of("code").eval.code_suffix.endswith(recipe_of("code").prompts.suffix)
    assert recipe_of("lora_one_gpu").lora.rank > 0


def test_reference_of_extrapolation_is_the_student_of_the_pair(checkout: Path) -> None:
    names = ("cross_scale", "pairs/4b-to-1.7b", "variants/exopd")
    recipe = load_recipe([find_recipe(name) for name in names])
    assert recipe.reference == recipe.student
    assert recipe.reference.model == "Qwen/Qwen3-1.7B"
    options = [word for name in names for word in ("--recipe", name)]
    plans = [
        invoke("train", *options, *extra, "--dry-run", "--json").json()
        for extra in ([], ["--set", "train.extrapolation=1.0"])
    ]
    assert [plan["parameters"].get("reference") for plan in plans] == [PAIRS["4b-to-1.7b"][0], None]
    assert ["score reference" in plan["stages"] for plan in plans] == [True, False]
    assert plans[0]["gpu_hours"] > plans[1]["gpu_hours"]


@pytest.mark.parametrize("overlay", [path for path in RECIPES if path not in BASE_RECIPES], ids=lambda path: path.stem)
def test_overlay_has_no_name(overlay: Path) -> None:
    """With a name, the runs of an overlay on several pairs would have one directory."""
    assert "name" not in tomllib.loads(overlay.read_text())


BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
THINK = "\nYou need to think first then write the Python code."


CHAT = [{"role": "user", "content": "Prove it."}]
PUBLISHED: dict[tuple[str, str | None], list[dict[str, Any]]] = {
    ("Keven16/G-OPD-Training-Data", "DeepMath-103K/train_filtered_level6.parquet"): [
        {"prompt": [{"role": "user", "content": f"{text}?{BOXED}"}], "reward_model": {"ground_truth": answer}}
        for text, answer in (("a", "1"), ("b", "2"))
    ],
    ("Keven16/G-OPD-Training-Data", "Eurus/code_train.parquet"): [
        {"prompt": [{"role": "user", "content": f"Add.{THINK}"}], "reward_model": {"ground_truth": "tests " * 99}}
    ],
    ("zwhe99/DeepMath-103K", "data/train-*.parquet"): [
        {"question": text, "difficulty": difficulty, "final_answer": "1", "topic": ""}
        for text, difficulty in (("a?", 5.9), ("b?", 6.0), ("c?", 8.5))
    ],
    ("PRIME-RL/Eurus-2-RL-Data", None): [
        {"ability": ability, "prompt": [{"role": "system", "content": "Act so."}, *CHAT]}
        for ability in ("math", "code")
    ],
}
"""Rows in the form of each published data set that a recipe reads, by data set and file."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross_scale", [("0", f"a?{BOXED}", "1", None), ("1", f"b?{BOXED}", "2", None)]),
        ("deepmath", [("1", f"b?{BOXED}", "1", None), ("2", f"c?{BOXED}", "1", None)]),
        ("code", [("0", f"Add.{THINK}", None, None)]),
        ("eurus", [("1", f"Prove it.{THINK}", None, None)]),
        (
            "two_teachers",
            [
                ("math/0", f"a?{BOXED}", "1", "math"),
                ("math/1", f"b?{BOXED}", "2", "math"),
                ("code/0", f"Add.{THINK}", None, "code"),
            ],
        ),
    ],
)
def test_recipe_reads_the_published_data_as_they_are(
    name: str, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(
        source: str, subset: str | None, *, data_files: str | None, split: str, revision: str | None
    ) -> datasets.Dataset:
        assert (subset, split) == (None, "train")
        assert revision is not None
        assert len(revision) == 40
        return datasets.Dataset.from_list(PUBLISHED[source, data_files])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = load_problems(recipe_of(name).prompts)
    assert [(each.id, each.text, each.answer, each.teacher) for each in problems] == expected
    assert Eval().suffix == BOXED


def test_base_recipes() -> None:
    assert {"cross_scale", "quickstart"} == {path.stem for path in BASE_RECIPES}


@pytest.mark.parametrize("path", BASE_RECIPES, ids=lambda path: path.stem)
def test_dry_run_writes_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--recipe", path, "--dry-run")
    assert has_plan(result), result.err
    assert result.out.startswith("plan\n")
    assert "nothing was written" in result.err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = invoke("train", "--recipe", ROOT / "recipes" / "quickstart.toml", "--dry-run", "--json").json()
    # 128 prompts of 13 tokens and as many responses of 160; 3,584 prompts are 28 steps of 128.
    assert (plan["prompt_tokens_per_step"], plan["response_tokens_per_step"]) == (1664, 20480)
    assert (plan["steps"], plan["epochs"]) == (28, 1.0)
    assert plan["parameters"] == {"student": 110528, "teacher": 365664}


@pytest.mark.parametrize("path", BASE_RECIPES, ids=lambda path: path.stem)
def test_recipe_has_the_name_of_its_file(path: Path) -> None:
    assert load_recipe([path]).name == path.stem
