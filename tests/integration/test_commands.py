"""The command line: help without torch, exit codes and kinds of errors, and JSON alone on stdout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import QUICKSTART, Result, contents, invoke, sets

from opdctl.artifacts.versions import SCHEMA_VERSION
from opdctl.models.directory import find_or_download
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Model

COMMANDS = ("rollout", "score-teacher", "train", "eval", "analyze-position", "status")
VERBS = ("compare", "list", "run")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, so that no file that a command writes is missed."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run, made command by command, and what each printed. Read only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    settings = sets("eval.every_steps=1", "eval.limit=4", "eval.max_tokens=40", "rollout.max_tokens=40")
    begin = ["--recipe", QUICKSTART, *settings, "--output", run, "--json"]
    results = {
        "rollout": invoke("rollout", *begin),
        "score-teacher": invoke("score-teacher", "--output", run, "--json"),
        "train": invoke("train", "--output", run, "--json"),
        "eval": invoke("eval", "--output", run, "--json"),
        "analyze-position": invoke("analyze-position", run, "--json"),
        "status": invoke("status", run, "--json"),
    }
    for name, result in results.items():
        assert result.code == 0, f"{name}: {result.err}"
    return {"run": run, **results}


@pytest.fixture
def copy(finished: dict[str, Any], tmp_path: Path) -> Path:
    """A private copy of the finished run."""
    return Path(shutil.copytree(finished["run"], tmp_path / "run"))


def words(result: Result) -> str:
    """Return stderr as one line."""
    return " ".join(result.err.split())


def check_error(result: Result, code: int, kind: str, *values: str) -> None:
    """Check exit code, kind and values of an error: on stderr, without a traceback, and nothing on stdout."""
    assert (result.code, result.kind) == (code, kind), result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for text in values:
        assert text in words(result), text


def check_nothing_written(folder: Path = Path()) -> None:
    assert [path for path in folder.rglob("*") if path.name in ("run.json", "recipe.toml", "prompts.parquet")] == []
    assert not (folder / "runs").exists()


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


# ── Help ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_command() -> None:
    done = python("-m", "opdctl", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(command in done.stdout for command in (*COMMANDS, *VERBS))


def test_help_of_every_command_shows_an_example_and_imports_no_torch() -> None:
    script = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from opdctl.cli.main import app\n"
        "found = {c: CliRunner().invoke(app, [c, '--help']) for c in sys.argv[1:]}\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules))\n"
        "print(json.dumps([{c: [r.exit_code, r.stdout] for c, r in found.items()}, heavy]))\n"
    )
    found, heavy = json.loads(python("-c", script, *COMMANDS, "compare", "list").stdout)
    assert heavy == []
    for command, (code, text) in found.items():
        assert code == 0
        assert f"opdctl {command}" in text


@pytest.mark.parametrize(
    "args",
    [
        *([command, "--recipe", "quickstart", "--set", "train.stepz=1"] for command in COMMANDS[:4]),
        ["train", "--recipe", "quickstart", "--push", "no-owner"],
    ],
    ids=lambda args: f"{args[0]} {args[3]}",
)
def test_invalid_recipe_or_option_imports_no_torch(args: list[str], tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from opdctl.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as end: code = end.code\n"
        "print(json.dumps([code, sorted({'torch', 'transformers'} & set(sys.modules))]))\n"
    )
    done = python("-c", script, *args, "--output" if args[0] != "eval" else "--run", str(tmp_path / "run"))
    assert json.loads(done.stdout) == [2, []]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args", [["trian"], ["train", "--recpie", "a.toml"], ["train", "--step", "1"], ["status"], ["rollout", "--step=-1"]]
)
def test_wrong_option_is_invalid_usage(args: list[str]) -> None:
    result = invoke(*args)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err


# ── Invalid recipes and inputs ────────────────────────────────────────────────────────────────────────────────────────


def test_typo_in_a_recipe_is_refused_with_file_key_and_nearest_name(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(QUICKSTART.read_text().replace("learning_rate", "lerning_rate").replace("gamma", "gama"))
    result = invoke("train", "--recipe", recipe)
    names = (f"{recipe}: train.lerning_rate", "`learning_rate`", f"{recipe}: weight", "`gamma`")
    check_error(result, 2, "invalid_recipe", *names)
    check_nothing_written()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("override", "code", "kind", "values"),
    [
        ("student.model=./no/such/model", 2, "missing_model", ["student.model", "./no/such/model", "hint:"]),
        ("teacher.model=/no/such/model", 2, "missing_model", ["teacher.model", "/no/such/model", "hint:"]),
        ("student.model=toy:studnet", 2, "unknown_name", ["student.model", "toy:studnet", "`toy:student`"]),
        ("prompts.source=prompts.jsonl", 2, "missing_file", ["prompts.jsonl"]),
        ("prompts.source=toy:sort21", 2, "unknown_name", ["prompts.source", "toy:sort21", "`toy:sort12`"]),
        ("prompts.max_tokens=12", 3, "invalid_data", ["prompts.max_tokens = 12", "hint:", "drop"]),
    ],
)
def test_invalid_inputs_are_refused_before_anything_is_written(
    override: str, code: int, kind: str, values: list[str], dry: list[str]
) -> None:
    check_error(invoke("train", "--recipe", QUICKSTART, *sets(override), *dry), code, kind, *values)
    check_nothing_written()


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("rollout", "--recipe", QUICKSTART, *sets(f"student.model={tmp_path / 'empty'}"))
    check_error(result, 2, "missing_model", "student.model", str(tmp_path / "empty"), "config.json")
    check_nothing_written()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_teacher_with_another_tokenizer_is_refused_with_the_ids_that_differ(tmp_path: Path, dry: list[str]) -> None:
    teacher = Path(shutil.copytree(find_or_download(Model(model="toy:teacher"), "teacher.model"), tmp_path / "teacher"))
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert (vocabulary["a"], vocabulary["b"]) == (2, 3)
    vocabulary["a"], vocabulary["b"] = 3, 2
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = invoke("train", "--recipe", QUICKSTART, *sets(f"teacher.model={teacher}"), *dry)
    ids = ("id 2: student 'a', teacher 'b'", "id 3: student 'b', teacher 'a'", "hint:")
    check_error(result, 2, "incompatible_tokenizer", *ids)
    check_nothing_written()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("content", "value"), [(b"", ""), (b'{"prompt": "\xff"}\n', ":1:"), (b'{"promt": "a"}\n', "`promt`")]
)
def test_invalid_prompts_are_refused(tmp_path: Path, content: bytes, value: str, dry: list[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    result = invoke("train", "--recipe", QUICKSTART, *sets(f"prompts.source={path}"), *dry)
    check_error(result, 3, "invalid_data", str(path), value)
    check_nothing_written()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_too_few_prompts_are_refused(tmp_path: Path, dry: list[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}\n')
    result = invoke("rollout", "--recipe", QUICKSTART, *sets(f"prompts.source={path}"), *dry)
    assert (result.code, result.kind) == (3, "invalid_data")
    assert "error: Invalid data" in result.err
    assert "rollout.prompts_per_step = 8" in result.err
    check_nothing_written()


@pytest.mark.parametrize("command", ["rollout", "score-teacher", "train"])
def test_command_without_recipe_and_run_is_refused_with_the_two_ways_to_give_one(command: str) -> None:
    check_error(invoke(command), 2, "missing_run", "give the path of a run", "--recipe FILE")


def test_missing_recipe_file_is_refused() -> None:
    check_error(invoke("train", "--recipe", "nowhere.toml"), 2, "missing_file", "nowhere.toml")


def test_unknown_recipe_name_gets_the_nearest_one() -> None:
    check_error(invoke("train", "--recipe", "quickstrat"), 2, "missing_file", "`quickstart`")


def test_eval_without_a_run_is_refused() -> None:
    check_error(invoke("eval"), 2, "missing_run", "runs/", "hint:")


@pytest.mark.parametrize(
    "args", [["status"], ["analyze-position"], ["train", "--output"], ["rollout", "--output"], ["eval", "--output"]]
)
def test_directory_without_a_run_is_refused(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "here").mkdir()
    for name in ("here", "nowhere"):
        check_error(invoke(*args, tmp_path / name), 2, "missing_run", name, "recipe.toml", "hint:")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_directory_of_other_files_is_not_written_into(tmp_path: Path, dry: list[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    result = invoke("train", "--recipe", QUICKSTART, *sets(), "--output", tmp_path / "thesis", *dry)
    check_error(result, 2, "unusable_output", str(tmp_path / "thesis"), "hint:")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_recipe_beside_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    recipe = tmp_path / "mine" / "recipe.toml"
    recipe.write_text("# my own words\n" + QUICKSTART.read_text())
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    result = invoke("rollout", "--recipe", recipe, *sets("rollout.max_tokens=2"), "--output", tmp_path / "mine")
    assert recipe.read_text().startswith("# my own words")
    check_error(result, 2, "unusable_output", str(tmp_path / "mine"))


def test_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        result = invoke("rollout", "--recipe", QUICKSTART, *sets(), "--output", output)
        check_error(result, 2, "unusable_output", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_hub_model_without_a_network_is_unavailable() -> None:
    args = ["--recipe", str(QUICKSTART), *sets("student.model=nobody/nothing")]
    done = python("-m", "opdctl", "rollout", *args, HF_HUB_OFFLINE="1")
    result = Result(done.returncode, done.stdout, done.stderr)
    check_error(result, 5, "failed_download", "student.model", "nobody/nothing", "hint:", "directory")
    check_nothing_written()


def test_hub_prompts_without_a_network_are_unavailable() -> None:
    done = python(
        "-m", "opdctl", "rollout", "--recipe", str(QUICKSTART), *sets("prompts.source=no/thing"), HF_HUB_OFFLINE="1"
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    check_error(result, 5, "failed_download", "prompts.source", "no/thing", "hint:")
    check_nothing_written()


# ── On an existing run ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bench", ["amie24", "sort12,amie24", "sort12,,aime24", ""])
def test_unknown_benchmark_is_refused(finished: dict[str, Any], bench: str) -> None:
    check_error(invoke("eval", "--output", finished["run"], "--bench", bench), 2, "unknown_name")


def test_unknown_benchmark_gets_the_nearest_name(finished: dict[str, Any]) -> None:
    check_error(invoke("eval", "--output", finished["run"], "--bench", "amie24"), 2, "unknown_name", "`aime24`")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_missing_data_file_is_refused(copy: Path, dry: list[str]) -> None:
    result = invoke("eval", "--output", copy, "--bench", "aime24", "--data", "nowhere.jsonl", *dry)
    check_error(result, 2, "missing_file", "nowhere.jsonl")


def test_data_directory_without_the_benchmark_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    result = invoke("eval", "--output", copy, "--bench", "aime24", "--data", tmp_path / "data")
    check_error(result, 2, "missing_file", "aime24", str(tmp_path / "data"))


@pytest.mark.parametrize("choice", [["--bench", "aime24"], ["--set", "eval.samples=2"]])
def test_failed_evaluation_leaves_the_recipe_of_the_run_unchanged(copy: Path, choice: list[str]) -> None:
    before = (copy / "recipe.toml").read_bytes()
    assert invoke("eval", "--output", copy, *choice, "--data", "nowhere.jsonl").code == 2
    assert (copy / "recipe.toml").read_bytes() == before


def test_two_benchmarks_are_reported_as_a_list(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "eval")  # without the suffix, whose letters the embedded models lack, the settings are others
    (tmp_path / "aime24.jsonl").write_text('{"problem": "ab", "answer": "7"}\n')
    args = ["--bench", "sort12,aime24", "--data", tmp_path / "aime24.jsonl", "--set", "eval.suffix="]
    result = invoke("eval", "--output", copy, *args, "--json")
    assert result.code == 0, result.err
    assert result.json()["schema_version"] == SCHEMA_VERSION
    assert [(s["bench"], s["problems"]) for s in result.json()["benches"]] == [("sort12", 4), ("aime24", 1)]
    assert result.json()["benches"][1]["verdicts"] == {"no_answer": 1}


def test_benchmark_on_the_command_line_is_not_recorded(copy: Path) -> None:
    recipe = copy / "recipe.toml"
    recipe.write_text(load_recipe([recipe], ['eval.bench=["aime24"]']).to_toml())
    assert invoke("eval", "--output", copy, "--bench", "sort12").code == 0
    assert load_recipe([recipe]).eval.bench == ["aime24"]


def test_evaluation_of_a_missing_model_is_refused(finished: dict[str, Any]) -> None:
    result = invoke("eval", "--output", finished["run"], "--model", "./nowhere")
    check_error(result, 2, "missing_model", "--model", "./nowhere")


@pytest.mark.parametrize("command", ["rollout", "score-teacher", "eval"])
def test_step_beyond_the_last_is_refused(finished: dict[str, Any], command: str) -> None:
    kind = "missing_checkpoint" if command == "eval" else "invalid_usage"
    check_error(invoke(command, "--output", finished["run"], "--step", "9"), 2, kind, "9")


def test_step_without_a_student_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    begin = ["--recipe", QUICKSTART, *sets("rollout.max_tokens=4"), "--output", tmp_path / "run"]
    assert invoke("rollout", *begin).code == 0
    for command in ("rollout", "score-teacher"):
        check_error(invoke(command, *begin, "--step", "1"), 2, "missing_checkpoint", "step 1", "opdctl train")
    assert not (tmp_path / "run" / "step-00001").exists()


def test_other_recipe_is_refused_with_the_change_and_writes_nothing(finished: dict[str, Any]) -> None:
    before = contents(finished["run"])
    for dry in ([], ["--dry-run"]):
        result = invoke("train", "--output", finished["run"], "--set", "weight.gamma=0.75", *dry)
        check_error(result, 4, "recipe_mismatch", "weight.gamma 0.5 → 0.75", "hint:", "another --output")
    assert contents(finished["run"]) == before


def test_json_is_one_object_on_stdout(finished: dict[str, Any]) -> None:
    for command in COMMANDS:
        result = finished[command]
        assert result.out.count("\n") == 1, command
        assert result.json()["schema_version"] == SCHEMA_VERSION, command
        assert result.err, command


def test_json_has_the_documented_keys(finished: dict[str, Any]) -> None:
    run = str(finished["run"])
    rollout = finished["rollout"].json()
    assert (rollout["run_dir"], rollout["stage"], rollout["step"]) == (run, "rollout", 0)
    assert (rollout["parts"], rollout["parts_made"], rollout["rows"]) == (2, 2, 8)
    assert min(rollout["seconds"], rollout["startup_seconds"]) > 0
    score = finished["score-teacher"].json()
    assert (score["stage"], score["rows"], score["tokens"]) == ("score-teacher", 8, rollout["tokens"])
    train = finished["train"].json()
    assert (train["run_dir"], train["steps"]) == (run, 2)
    assert set(train["accuracy"]) == {"before", "after", "teacher"}
    assert all(0 <= share <= 1 for share in train["accuracy"].values())
    assert set(train["seconds"]) == {"startup", "rollout", "score", "update", "eval"}
    assert (Path(train["student"]) / "model.safetensors").is_file()
    found = finished["eval"].json()
    assert (found["bench"], found["problems"], found["samples"]) == ("sort12", 4, 1)
    assert found["ci"][0] <= found["avg"] <= found["ci"][1]
    assert found["avg"] == train["accuracy"]["after"]
    analysis = finished["analyze-position"].json()
    assert all(Path(path).is_file() for path in (analysis["report"], *analysis["figures"], *analysis["tables"]))
    status = finished["status"].json()
    assert (status["steps_done"], status["steps"]) == (2, 2)
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    assert [stage["stage"] for stage in status["stages"]] == ["rollout", "teacher", "update"] * 2


def test_every_command_names_the_next_one(finished: dict[str, Any]) -> None:
    assert "next: opdctl score-teacher" in finished["rollout"].err
    assert "next: opdctl train" in finished["score-teacher"].err
    for command in ("train", "eval", "status"):
        assert "opdctl analyze-position" in finished[command].err


@pytest.mark.parametrize(
    "args",
    [["rollout", "--step", "0"], ["score-teacher", "--step", "1"], ["rollout"], ["score-teacher"], ["train"], ["eval"]],
    ids=" ".join,
)
def test_finished_command_makes_nothing_again(finished: dict[str, Any], args: list[str]) -> None:
    made = [*finished["run"].rglob("*.parquet"), *finished["run"].rglob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in made}
    result = invoke(*args, "--output", finished["run"])
    assert result.code == 0, result.err
    assert "nothing to do" in result.err or "all 2 steps are done" in result.err
    assert (result.out == "") == (args[0] in ("rollout", "score-teacher"))  # the others report accuracies
    assert {path: path.stat().st_mtime_ns for path in made} == before


@pytest.mark.parametrize("args", [["rollout"], ["score-teacher"], ["train"], ["eval"]], ids=" ".join)
def test_finished_command_still_prints_json(finished: dict[str, Any], args: list[str]) -> None:
    result = invoke(*args, "--output", finished["run"], "--json")
    assert result.code == 0
    assert result.json()["schema_version"] == SCHEMA_VERSION


def test_quiet_prints_json_only(finished: dict[str, Any]) -> None:
    result = invoke("status", finished["run"], "--quiet", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json()["steps_done"] == 2


def test_status_reports_a_corrupt_part_with_its_repair(copy: Path) -> None:
    part = sorted((copy / "step-00001" / "teacher").glob("*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:-1])
    result = invoke("status", copy, "--json")
    assert result.code == 3
    assert [s["stage"] for s in result.json()["stages"] if s["state"] == "corrupt"] == ["teacher"]
    assert result.json()["next"] == f"opdctl run repair {copy}"


def test_misspelt_run_gets_the_nearest_name(finished: dict[str, Any]) -> None:
    result = invoke("status", finished["run"].with_name("rum"))
    check_error(result, 2, "missing_run", "rum", f"`{finished['run']}`")


def test_run_directory_that_cannot_be_created_is_one_error(tmp_path: Path) -> None:
    start = ("rollout", "--recipe", QUICKSTART, "--output")
    check_error(invoke(*start, "/proc/nothing/run"), 2, "unusable_output", "/proc/nothing/run")
    (tmp_path / "file").write_text("")
    check_error(invoke(*start, tmp_path / "file"), 2, "unusable_output", str(tmp_path / "file"))


def test_student_that_is_its_own_teacher_is_warned_of(tmp_path: Path) -> None:
    settings = sets("teacher.model=toy:student", "rollout.max_tokens=4", "rollout.prompts_per_step=2")
    result = invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert "student and teacher are identical" in words(result)


def test_training_without_evaluations_reports_no_accuracy(tmp_path: Path) -> None:
    settings = sets("train.steps=1", "eval.every_steps=0", "rollout.max_tokens=8", "rollout.prompts_per_step=4")
    result = invoke("train", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert "1 of 1 steps" in result.out
    assert "accuracy" not in result.out
    assert "not measured" not in result.out
