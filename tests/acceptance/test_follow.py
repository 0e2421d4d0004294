"""Stages that follow the run directory (`--follow`): several processes, kills and signals."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers import forks
from helpers.commands import QUICKSTART, invoke, sets

from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows
from opdctl.errors import ExitCode
from opdctl.runs.heartbeats import read_heartbeats
from opdctl.runs.run import Run

STAGES = ("rollout", "score-teacher", "train")
THREE = ("train.steps=3", "rollout.max_tokens=40")


def arguments(output: Path, *overrides: str) -> list[object]:
    return ["--recipe", QUICKSTART, *sets(*overrides), "--output", output]


def start(stage: str, output: Path, *overrides: str) -> int:
    """Follow with a stage in a forked process, and return its process id."""
    return forks.fork(lambda: invoke(stage, "--follow", *arguments(output, *overrides)).code)


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def any_exists(*paths: Path) -> bool:
    return any(path.exists() for path in paths)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    result = invoke("train", *arguments(path, *THREE))
    assert result.code == 0, result.err
    return path


def test_killed_and_restarted_stages_make_the_student_of_one_process(alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    children = {stage: start(stage, output, *THREE) for stage in STAGES}
    moments = {
        "rollout": "step-00001/rollout/manifest.json",
        "score-teacher": "step-00001/teacher/in_progress.json",
        "train": "step-00001/teacher/manifest.json",
    }
    for stage, moment in moments.items():
        until(partial(any_exists, output / moment, output / "step-00001/teacher/manifest.json"))
        os.kill(children[stage], signal.SIGKILL)
        forks.wait(children[stage])
        children[stage] = start(stage, output, *THREE)
    assert [forks.wait(child) for child in children.values()] == [0, 0, 0]
    one, three = Run.load(alone), Run.load(output)
    for step in one.kept_steps():
        name = "model.safetensors"
        assert (one.student_at(step).path / name).read_bytes() == (three.student_at(step).path / name).read_bytes()
    assert [three.update(step)["metrics"]["staleness"] for step in range(3)] == [0, 0, 0]
    assert not list(output.rglob("policy_version.json"))
    assert invoke("status", output, "--verify").code == 0


def test_stages_that_sample_ahead_stay_within_the_bound(tmp_path: Path) -> None:
    overrides = ("train.steps=4", "pipeline.max_staleness=2", "rollout.num_parts=4", "rollout.max_tokens=40")
    children = [start(stage, tmp_path / "run", *overrides) for stage in ("rollout", *STAGES)]
    assert [forks.wait(child) for child in children] == [0, 0, 0, 0]
    run = Run.load(tmp_path / "run")
    for step in range(4):
        lag, stage = run.update(step)["metrics"]["staleness"], run.rollout_stage(step)
        assert 0 <= lag <= 2
        rows = [row for index in range(4) for row in read_rows(stage.verify(index), Response)]
        assert {row.policy_version for row in rows} == {step - lag}
    assert invoke("status", run.path, "--verify").code == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGUSR1, ExitCode.REQUEUE), (signal.SIGTERM, ExitCode.REQUEUE), (signal.SIGINT, ExitCode.INTERRUPTED)],
)
def test_signal_ends_a_waiting_stage_with_its_exit_code(tmp_path: Path, number: int, code: int) -> None:
    output = tmp_path / "run"
    child = start("score-teacher", output, *THREE)
    until(
        lambda: (
            (output / "run.json").exists()
            and any(beat.state != "starting" for beat in read_heartbeats(Run.load(output)))
        )
    )
    os.kill(child, number)
    assert forks.wait(child) == code
    assert not read_heartbeats(Run.load(output))
