"""docs/paper.md: every command resolves, and its numbers of runs and of GPU-hours are those of `--dry-run`."""

import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from helpers.commands import ROOT, has_plan, invoke, split_launcher
from helpers.documents import code_blocks

PAGE = ROOT / "docs" / "paper.md"
STORED_RUN = ROOT / "tests" / "data" / "run-v5"
PRINT_COMMANDS = r"""
HEAD=node-0
opdctl() { printf '%s\t' "$@"; echo; }
torchrun() { printf '%s\t' torchrun "$@"; echo; }
"""
DRY_RUN = ("train", "rollout", "score-teacher", "eval", "run continuations")
"""The commands of the page that have `--dry-run`. The others read finished runs only."""


@cache
def commands(block: str) -> list[list[str]]:
    """Return the arguments of each command that bash runs for a block, with its loops and braces expanded."""
    script = f"{PRINT_COMMANDS}\n{TRAIN_FUNCTION}\n{block}"
    result = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    return [line.split("\t")[:-1] for line in result.stdout.splitlines()]


TRAIN_FUNCTION, *BLOCKS = code_blocks(PAGE, "sh")
TRAINING_BLOCKS = [block for block in BLOCKS if "train --recipe" in block]
OTHER_COMMANDS = [words for block in BLOCKS if block not in TRAINING_BLOCKS for words in commands(block)]


@cache
def plan(command: tuple[str, ...]) -> tuple[str, float]:
    """Return the run directory and the GPU-hours of a training, by `--dry-run`, which must fit."""
    launch = split_launcher(shlex.join(command))
    result = invoke(*launch.words, "--dry-run", "--json")
    assert has_plan(result), result.err
    plan = result.json()
    assert {stage["gpus"] for stage in plan["stages"].values()} == {launch.processes}
    assert all(stage["fits"] for stage in plan["stages"].values())
    return plan["run_dir"], plan["gpu_hours"]


def test_runs_and_gpu_hours_of_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    programme: dict[str, float] = {}
    for block in TRAINING_BLOCKS:
        runs = dict(plan(tuple(words)) for words in commands(block))
        assert len(runs) == len(commands(block)), "two commands have one run directory"
        assert f"```sh\n{block}```\n\n{len(runs)} runs, at most {sum(runs.values()):,.0f} GPU-hours" in PAGE.read_text()
        assert not runs.keys() & programme.keys()
        programme |= runs
    mathematics = {run: hours for run, hours in programme.items() if "code" not in run}
    hours = sum(mathematics.values())
    assert f"{len(mathematics)} runs for mathematics, at most {hours:,.0f} GPU-hours" in PAGE.read_text()
    assert not list(tmp_path.iterdir())


def named_runs(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("runs/")]


def describe_as(run: Path) -> None:
    """Give a copy of the stored run the seed and a weight of its name, so that it can be compared with others."""
    weight, seed = run.name.removeprefix("cross_scale-").split("-seed-")
    gamma = sum(map(ord, weight)) / 1000  # another setting for each weight
    recipe = (run / "recipe.toml").read_text()
    recipe = re.sub(r"^seed = .+", f"seed = {seed}", recipe, flags=re.MULTILINE)
    (run / "recipe.toml").write_text(re.sub(r"^gamma = .+", f"gamma = {gamma}", recipe, flags=re.MULTILINE))


@pytest.mark.parametrize("words", OTHER_COMMANDS, ids=" ".join)
def test_command_runs_on_stored_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in named_runs(words):
        shutil.copytree(STORED_RUN, tmp_path / name)
        if words[0] == "compare":
            describe_as(tmp_path / name)
    words = ["2" if each in ("165", "10") else each for each in words]  # updates of the stored run
    name = " ".join(words[:2]) if words[0] == "run" else words[0]
    result = invoke(*words, *(["--dry-run"] if name in DRY_RUN else []))
    has_no_weights = "student/step-00002/model.safetensors: is missing" in result.err  # the stored run has none
    assert has_plan(result) or has_no_weights, result.err
