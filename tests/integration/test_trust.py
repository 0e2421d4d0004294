"""A run directory is data: reading it runs none of its code, follows no link out of it, and waits for nothing."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import Result, invoke, rewrite_json, sets

from opdctl.artifacts import files, tables
from opdctl.artifacts.records import Response
from opdctl.errors import ExitCode
from opdctl.recipe.load import load_recorded_recipe
from opdctl.runs.run import read_run_record

EVIL = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"
UNKNOWN = {"weight": 'name = "their_weight"\nstrength = 2.0', "objective": 'name = "their_objective"'}
READING_COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "status": lambda run: ["status", run, "--verify"],
    "analyze-position": lambda run: ["analyze-position", run, "--dry-run"],
    "show": lambda run: ["run", "show", run, first_sample(run)],
    "compare": lambda run: ["compare", run, run.parent / "copy"],
    "list": lambda run: ["list", "weights", "--output", run],
    "repair": lambda run: ["run", "repair", run, "--dry-run"],
    "fork": lambda run: ["run", "fork", run, run.parent / "fork", *sets("objective.name='reverse_kl'"), "--dry-run"],
    "train": lambda run: ["train", "--output", run, "--dry-run"],
    "rollout": lambda run: ["rollout", "--output", run, "--dry-run"],
    "score-teacher": lambda run: ["score-teacher", "--output", run, "--dry-run"],
    "eval": lambda run: ["eval", "--run", run, "--dry-run"],
    "continuations": lambda run: ["run", "continuations", run, "--dry-run"],
}


def first_sample(run: Path) -> str:
    part = next(run.glob("step-00000/rollout/part-00000*.parquet"))
    return str(tables.read_rows(part, Response)[0].sample_id)


def set_recipe(run: Path, *lines: str, **sections: str) -> None:
    """Put lines at the start of a recorded recipe, and other content into sections."""
    text = re.sub(r"^plugins = .*\n", "", run.joinpath("recipe.toml").read_text(), flags=re.MULTILINE)
    for name, content in sections.items():
        before, _, rest = text.partition(f"[{name}]\n")
        text = f"{before}[{name}]\n{content}\n\n[{rest.partition('[')[2]}"
    run.joinpath("recipe.toml").write_text("\n".join([*lines, text]))


@pytest.fixture
def theirs(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Someone's run in runs/theirs below the working directory, with a plugin in it that leaves a mark."""
    run = Path(shutil.copytree(finished_run, tmp_path / "runs" / "theirs"))
    monkeypatch.chdir(tmp_path)
    (run / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    set_recipe(run, 'plugins = ["runs.theirs.evil"]')
    return run


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == ExitCode.USAGE, result.err
    assert "Untrusted code: " in result.err
    for word in words:
        assert word in result.err


# ── Code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", READING_COMMANDS)
def test_reading_commands_run_no_plugin_of_a_run(theirs: Path, tmp_path: Path, name: str) -> None:
    if name == "compare":
        shutil.copytree(theirs, theirs.parent / "copy")
    result = invoke(*READING_COMMANDS[name](theirs.relative_to(tmp_path)))
    assert not (tmp_path / "marker").exists()
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", ["status", "show", "compare", "list", "train", "eval"])
def test_components_of_a_plugin_are_shown_by_name(theirs: Path, tmp_path: Path, name: str) -> None:
    set_recipe(theirs, 'plugins = ["runs.theirs.evil"]', **UNKNOWN)
    shutil.copytree(theirs, theirs.parent / "copy")
    result = invoke(*READING_COMMANDS[name](theirs.relative_to(tmp_path)))
    if name == "show":
        assert result.code == 0, result.err
        assert "weight `their_weight` of a plugin is not run" in result.err
    assert "Unknown name" not in result.err
    assert "Internal error" not in result.err
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("command", ["train", "rollout", "score-teacher"])
def test_plugin_inside_a_run_is_refused(theirs: Path, tmp_path: Path, command: str) -> None:
    result = invoke(command, "--output", "runs/theirs")
    assert_refused(result, "runs/theirs/recipe.toml", "evil.py is inside the run directory", "--set")
    assert not (tmp_path / "marker").exists()


def test_plugin_behind_a_link_is_refused(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(theirs)
    set_recipe(theirs, 'plugins = ["linked.evil"]')
    for run in ("runs/theirs", "linked"):
        assert_refused(invoke("train", "--output", run), "is inside the run directory")
    assert not (tmp_path / "marker").exists()


def test_plugin_beside_a_run_needs_the_word_of_the_command(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive of a run and a module beside it, unpacked into the working directory."""
    monkeypatch.chdir(theirs.parent)
    (theirs.parent / "evil_beside.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    set_recipe(theirs, 'plugins = ["evil_beside"]')
    refused = invoke("train", "--output", "theirs")
    assert_refused(refused, "evil_beside.py is beside the run directory", "--set 'plugins=[\"evil_beside\"]'")
    assert not (tmp_path / "marker").exists()
    assert invoke("train", "--output", "theirs", *sets('plugins=["evil_beside"]')).code == 0
    assert (tmp_path / "marker").exists()


def test_recorded_plugin_of_the_project_is_imported_and_named(theirs: Path, tmp_path: Path) -> None:
    """A requeued job of one's project continues without new options, and says whose code runs."""
    (tmp_path / "own_plugin.py").write_text("")
    set_recipe(theirs, 'plugins = ["own_plugin"]')
    result = invoke("train", "--output", "runs/theirs")
    assert result.code == 0, result.err
    assert f"plugin `own_plugin`: {tmp_path / 'own_plugin.py'}" in result.err


@pytest.mark.parametrize("command", ["train", "eval", "rollout"])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_code_of_a_model_needs_the_word_of_the_command(theirs: Path, command: str, dry_run: list[str]) -> None:
    recipe = (theirs / "recipe.toml").read_text().replace('"runs.theirs.evil"', "")
    (theirs / "recipe.toml").write_text(recipe.replace("trust_remote_code = false", "trust_remote_code = true", 1))
    option = "--run" if command == "eval" else "--output"
    refused = invoke(command, option, "runs/theirs", *dry_run)
    assert_refused(refused, "student.trust_remote_code", "--set student.trust_remote_code=true")
    named = load_recorded_recipe(theirs / "recipe.toml", ["student.trust_remote_code=true"], "run")
    assert named.student.trust_remote_code


def test_reading_a_run_trusts_no_code_of_its_models(theirs: Path) -> None:
    recipe = (theirs / "recipe.toml").read_text()
    (theirs / "recipe.toml").write_text(recipe.replace("trust_remote_code = false", "trust_remote_code = true"))
    from opdctl.runs.run import Run

    run = Run.load(theirs)
    assert run.recipe.student.trust_remote_code
    assert not any(model.trust_remote_code for model in run.models.values())


def test_requeued_job_with_its_recipe_needs_no_new_option(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that the command names is trusted, also where the recorded one would be refused."""
    (theirs.parent / "beside.py").write_text("")
    monkeypatch.chdir(theirs.parent)
    set_recipe(theirs, 'plugins = ["beside"]')
    shutil.copy(theirs / "recipe.toml", "mine.toml")
    assert_refused(invoke("train", "--output", "theirs"))
    assert invoke("train", "--recipe", "mine.toml", "--output", "theirs").code == 0


# ── Links and special files ──────────────────────────────────────────────────────────────────────────────────────────

COMMANDS = ("status", "analyze-position", "train", "eval")


def run_command(name: str, run: Path) -> Result:
    return invoke(name, *{"train": ["--output"], "eval": ["--run"]}.get(name, []), run)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("link", ["analysis", "eval/sort12", "step-00001", "student", "heartbeats", "x/y"])
def test_no_command_writes_through_a_link(finished_copy: Path, tmp_path: Path, name: str, link: str) -> None:
    outside, path = tmp_path / "outside", finished_copy / link
    path.parent.mkdir(exist_ok=True)
    path.rename(outside) if path.exists() else outside.mkdir()
    path.symlink_to(outside)
    before = sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("outside/**/*"))
    result = run_command(name, finished_copy)
    assert result.code == ExitCode.BAD_DATA, result.err
    assert f"{path}: is a symbolic link" in result.err
    assert sorted((file, file.stat().st_mtime_ns) for file in tmp_path.rglob("outside/**/*")) == before


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", ["run.json", "recipe.toml", "step-00000/rollout/manifest.json", "metrics.jsonl"])
def test_no_command_waits_for_a_fifo(finished_copy: Path, name: str, file: str) -> None:
    path = finished_copy / file
    path.unlink()
    os.mkfifo(path)
    result = run_command(name, finished_copy)
    assert result.code == ExitCode.BAD_DATA, result.err
    assert f"{path}: is not a regular file" in result.err


def test_the_run_directory_itself_may_be_a_link(finished_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(finished_copy)
    for name in ("status", "train", "eval"):
        result = run_command(name, tmp_path / "link")
        assert result.code == 0, result.err


def test_evaluation_of_a_model_writes_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "results" / "eval").mkdir(parents=True)
    for link in ("eval/sort12", "eval"):
        path = tmp_path / "results" / link
        shutil.rmtree(path, ignore_errors=True)
        path.symlink_to(tmp_path / "outside")
        result = invoke("eval", "--model", "toy:student", "--bench", "sort12", "--run", tmp_path / "results")
        assert result.code == ExitCode.BAD_DATA, result.err
        assert f"{path}: is a symbolic link" in result.err
        path.unlink()
    assert not list((tmp_path / "outside").iterdir())


def test_links_of_a_tracker_are_its_own(finished_copy: Path) -> None:
    (finished_copy / "wandb").mkdir()
    (finished_copy / "wandb" / "latest-run").symlink_to("run-1")
    assert invoke("status", finished_copy).code == 0


# ── Bombs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

BOMBS = {
    "nested lists": "x = " + "[" * 500 + "]" * 500,
    "nested tables": "x = " + "{a = " * 300 + "1" + "}" * 300,
    "digits": "seed = " + "7" * 5_000_000,
    "hexadecimal digits": "seed = 0x" + "f" * 50_000,
    "dotted key": ".".join(["a"] * 100_000) + " = 1",
    "large": "# " + "x" * 2**20,
    "many parts": "[rollout]\nnum_parts = 1000000000\nprompts_per_step = 1000000000\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["status", "train"])
def test_recipe_that_costs_time_or_memory_is_refused(finished_copy: Path, name: str, bomb: str) -> None:
    (finished_copy / "recipe.toml").write_text(BOMBS[bomb] + "\n")
    result = run_command(name, finished_copy)
    assert result.code == ExitCode.USAGE, result.err
    assert str(finished_copy / "recipe.toml") in result.err
    assert "Internal error" not in result.err


def test_prompts_that_inflate_are_refused_before_they_are_read(finished_copy: Path) -> None:
    path = finished_copy / "prompts.parquet"
    columns = {name: pa.array(["x"]).take(pa.array([0] * 3_000_000)) for name in ("prompt_id", "answer", "teacher")}
    pq.write_table(pa.table(columns), path, compression="zstd")
    record = read_run_record(finished_copy)
    for rows in (record["prompts"]["rows"], 3_000_000):
        rewrite_json(
            finished_copy / "run.json",
            prompts={**record["prompts"], "sha256": files.sha256_file(path), "rows": rows},
        )
        result = invoke("status", finished_copy, "--verify")
        assert result.code == ExitCode.BAD_DATA, result.err
        assert f"{path}: " in result.err
        assert "3000000 rows" in result.err or "bytes of memory" in result.err
