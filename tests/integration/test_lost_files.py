"""The table of docs/run-directory.md, row by row: each kind of file of a run is removed, or damaged, and then the
commands that the messages name are run literally, until the run is whole."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import ROOT, contents, invoke, rewrite_json

from opdctl.artifacts import files

MAX_COMMANDS = 6
ALL, STUDENT, NEXT = "every byte is back", "the newest student is as before", "the next student is the same"
FINISHED = {  # rows of the table: the file that is lost, and what must hold after the commands
    "recipe.toml": ("recipe.toml", ALL),
    "run.json": ("run.json", ALL),
    "prompts.parquet": ("prompts.parquet", ALL),
    "step-*/rollout/part-*": ("step-00001/rollout/part-00000*", ALL),
    "step-*/rollout/manifest.json": ("step-00001/rollout/manifest.json", ALL),
    "step-*/teacher/part-*": ("step-00001/teacher/part-00001*", ALL),
    "step-*/teacher/manifest.json": ("step-00001/teacher/manifest.json", ALL),
    "update.json of the last step": ("step-00001/update.json", NEXT),  # has times
    "update.json of an earlier step": ("step-00000/update.json", NEXT),
    "the directory of an earlier step": ("step-00000", NEXT),
    "the newest student": ("student/step-00002", ALL),
    "an earlier student": ("student/step-00001", STUDENT),
    "README.md of a student": ("student/step-00002/README.md", STUDENT),
    "the newest trainer state": ("trainer/step-00002", NEXT),
    "an earlier trainer state": ("trainer/step-00001", STUDENT),
    "metrics.jsonl": ("metrics.jsonl", STUDENT),
    "eval/*/*/part-*": ("eval/sort12/step-00002/part-*", ALL),
    "eval/*/*/manifest.json": ("eval/sort12/step-00001/manifest.json", ALL),
    "eval/*/*/prompts/": ("eval/sort12/step-00001/prompts/part-*", STUDENT),
    "eval/*/*/summary.json": ("eval/sort12/step-00002/summary.json", ALL),
    "eval/*/benchmark.json": ("eval/sort12/benchmark.json", STUDENT),
}
INTERRUPTED = {
    "run.json": "run.json",
    "step-*/rollout/part-*": "step-00001/rollout/part-00000-of-00002.parquet",
    "step-*/rollout/in_progress.json": "step-00001/rollout/in_progress.json",
    "step-*/rollout/part-*.receipt.json": "step-00001/rollout/part-00000*.receipt.json",
    "step-*/teacher/part-*": "step-00000/teacher/part-00001*",
    "update.json of the last step": "step-00000/update.json",
    "the newest student": "student/step-00001",
    "the newest trainer state": "trainer/step-00001",
    "metrics.jsonl": "metrics.jsonl",
}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage(path: Path) -> None:
    """Change a bit of the first file of a directory; cut a file and put a zero byte before it."""
    if path.is_dir():
        path = min(file for file in path.rglob("*") if file.is_file() and file.name != "README.md")
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.write_bytes(b"\0" + path.read_bytes()[:-20])


def follow_advice(run: Path, first: str) -> list[str]:
    """Run the first command that each message names until one names no other than the analysis. Return them."""
    command, done = first, []
    while not command.startswith("opdctl analyze-position"):
        assert len(done) < MAX_COMMANDS, done
        result = invoke(*shlex.split(command)[1:])
        done.append(command)
        found = re.findall(r"`(opdctl [^`]+)`|^ *next *:? +(opdctl .+)$", result.out + result.err, flags=re.MULTILINE)
        named = [each or other for each, other in found]
        assert named, (command, result.out, result.err)
        command = first if result.code == 0 and named[0] in done else named[0]
    return done


def lose(run: Path, pattern: str, how: Callable[[Path], None]) -> None:
    paths = sorted(run.glob(pattern))
    assert paths
    for path in paths:
        how(path)


def without_corrupt(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run).items() if not name.startswith("corrupt/")}


def student(run: Path, step: int) -> bytes:
    return (run / f"student/step-0000{step}/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def third_student(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The student after one more step."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("third") / "run"))
    return continued(run)


def continued(run: Path) -> bytes:
    result = invoke("train", "--output", run, "--set", "train.steps=3", "--set", "eval.every_steps=0")
    assert result.code == 0, result.err
    return student(run, 3)


@pytest.mark.parametrize("how", [remove, damage])
@pytest.mark.parametrize("row", FINISHED)
def test_file_of_a_finished_run(
    finished_copy: Path, third_student: bytes, row: str, how: Callable[[Path], None]
) -> None:
    run, (pattern, outcome) = finished_copy, FINISHED[row]
    wanted = contents(run)
    lose(run, pattern, how)
    follow_advice(run, f"opdctl status {run} --verify")
    assert student(run, 2) == wanted["student/step-00002/model.safetensors"]
    if outcome == ALL:
        assert without_corrupt(run) == wanted
    elif outcome == NEXT:
        assert continued(run) == third_student


@pytest.fixture
def interrupted_run(finished_copy: Path) -> Path:
    """A run that was killed in the rollout of its second step, of which the first of two parts exists."""
    run, rollout = finished_copy, finished_copy / "step-00001/rollout"
    for path in ("step-00001/teacher", "step-00001/update.json", "student/step-00002", "trainer/step-00002"):
        remove(run / path)
    manifest = json.loads((rollout / "manifest.json").read_text())
    files.write_json(rollout / f"{manifest['parts'][0]['name']}.receipt.json", manifest["parts"][0])
    remove(rollout / manifest["parts"][1]["name"])
    (rollout / "manifest.json").rename(rollout / "in_progress.json")
    rewrite_json(rollout / "in_progress.json", parts=...)
    return run


@pytest.mark.parametrize("how", [remove, damage])
@pytest.mark.parametrize("row", INTERRUPTED)
def test_file_of_an_interrupted_run(
    interrupted_run: Path, finished_run: Path, row: str, how: Callable[[Path], None]
) -> None:
    lose(interrupted_run, INTERRUPTED[row], how)
    follow_advice(interrupted_run, f"opdctl status {interrupted_run} --verify")
    assert student(interrupted_run, 2) == student(finished_run, 2)


def test_every_row_of_the_table_is_tested() -> None:
    text = (ROOT / "docs/run-directory.md").read_text()
    table = text[text.index("| file | what its loss costs") :].split("\n\n")[0]
    rows = {line.split(" | ")[0].removeprefix("| ").replace("\\*", "*") for line in table.splitlines()[2:]}
    elsewhere = {"analysis/", "step-*/rollout/import.json", "tracking.json"}  # test_import.py, test_tracking.py
    assert rows - elsewhere == FINISHED.keys() | INTERRUPTED.keys()
