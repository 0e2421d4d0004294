"""One rule names a run in every command: the argument, else `--run`, else the newest run under runs/, with a message.

Each command of the command line is called, so that a new one must follow the rule too.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from helpers.commands import QUICKSTART, Result, contents, invoke

from opdctl import console
from opdctl.artifacts import tables
from opdctl.artifacts.records import Response
from opdctl.cli.main import app

WITHOUT_A_RUN = {"compare": "several runs or evaluations", "list": "what a command can name"}
"""Commands that do not work on one run, and what they are about."""
WORDS = {
    "run show": ["SAMPLE_ID"],
    "run export": ["out.parquet"],
    "run sync": ["memory://run-names/x"],
    "run import": ["responses.jsonl"],
    "run fork": ["forked", "--set", "weight.gamma=0.25"],
}
"""Further arguments."""


def leaf_commands(group: typer.core.TyperGroup, prefix: str = "") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Yield every command with its words, such as "run fork"."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from leaf_commands(command, f"{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = {name: command for name, command in leaf_commands(typer.main.get_command(app)) if name not in WITHOUT_A_RUN}


@pytest.fixture(scope="module")
def folder(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs "older" and "newest" under runs/. Read only."""
    made = tmp_path_factory.mktemp("folder")
    for name, time in (("newest", 2_000_000_000), ("older", 1_000_000_000)):
        run = Path(shutil.copytree(finished_run, made / "runs" / name))
        os.utime(run, (time, time))
    (made / "responses.jsonl").write_text('{"prompt_ids": [5, 6], "response_ids": [7, 1]}\n')
    return made


def call(name: str, run_words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Call a command in `folder`. Of those that have --dry-run nothing is made."""
    monkeypatch.chdir(folder)
    console.info_once.cache_clear()  # every call prints its messages
    part = next(Path("runs/older").glob("step-00000/rollout/part-00000*.parquet"), None)
    sample = str(tables.read_rows(part, Response)[0].sample_id) if part else "sample"
    words = [sample if word == "SAMPLE_ID" else word for word in WORDS.get(name, [])]
    dry = ["--dry-run"] if any("--dry-run" in param.opts for param in COMMANDS[name].params) else []
    return invoke(*name.split(), *run_words, *words, *dry)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_a_run_in_one_way(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    for chosen in ("runs/older", "runs/newest"):
        by_argument = call(name, [chosen], folder, monkeypatch)
        assert by_argument.code == 0, by_argument.err
        assert "newest run" not in by_argument.err
        for option in ("--run", "--output"):
            assert call(name, [option, chosen], folder, monkeypatch) == by_argument
    by_default = call(name, [], folder, monkeypatch)
    message = "using the newest run, runs/newest\n"
    assert message in by_default.err
    assert Result(0, by_default.out, by_default.err.replace(message, "")) == by_argument
    assert contents(folder) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_two_different_runs_are_refused(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = call(name, ["runs/older", "--run", "runs/newest"], folder, monkeypatch)
    assert (result.code, result.kind) == (2, "invalid_usage")
    assert "RUN_DIR runs/older, and --run runs/newest" in result.err


@pytest.mark.parametrize("name", COMMANDS)
def test_no_run_at_all_is_an_error_with_the_way_to_start_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = call(name, [], tmp_path, monkeypatch)
    assert (result.code, result.kind) == (2, "missing_run")
    assert "under runs/" in result.err
    assert "`opdctl train --recipe FILE`" in result.err
    assert list(tmp_path.iterdir()) == []


def test_prune_removes_nothing_of_a_run_that_is_not_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    result = invoke("run", "prune")
    assert (result.code, result.kind) == (2, "invalid_usage")
    command = result.err.split("`")[1]
    assert command == "opdctl run prune runs/newest"
    assert contents(folder) == before
    assert invoke(*shlex.split(command)[1:], "--dry-run").code == 0


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("run show", "SAMPLE_ID"),
        ("run export", "FILE"),
        ("run import", "FILES"),
        ("run fork", "NEW_RUN_DIR"),
        ("run sync", "URL"),
    ],
)
def test_missing_word_after_the_run_is_named(
    name: str, word: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = invoke(*name.split(), "--run", "runs/older")
    assert (result.code, result.kind) == (2, "invalid_usage")
    assert f"{word} is missing" in result.err


@pytest.mark.parametrize("given", ["quickstart", str(QUICKSTART)])
@pytest.mark.parametrize("name", ["train", "rollout", "eval"])
def test_recipe_in_the_place_of_a_run_is_named(name: str, given: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(name, given)
    assert (result.code, result.kind) == (2, "missing_run")
    assert f"give it as --recipe {given}" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--run", "--output", None])
def test_recipe_with_a_name_of_a_run_starts_it_there(option: str | None, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = invoke("train", *([option] if option else []), "mine", "--recipe", QUICKSTART, "--dry-run", "--json")
    assert plan.json()["run_dir"] == "mine"
    assert invoke("train", "--recipe", QUICKSTART, "--dry-run", "--json").json()["run_dir"] == "runs/quickstart"
