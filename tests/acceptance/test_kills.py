"""Training that is killed or stopped by a signal, and run again, ends with the same bits."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import QUICKSTART, artifacts, invoke, names, sets
from helpers.forks import kill_at_change
from helpers.training import SHORT, max_difference, train, weights
from torch import Tensor

from opdctl.errors import ExitCode
from opdctl.runs.repair import find_corrupt_artifacts
from opdctl.runs.run import Run
from opdctl.training import checkpoint

# Short responses and few problems; evaluations, and students and checkpoints to prune.
KILLED = (
    *("rollout.max_tokens=16", "eval.max_tokens=16", "eval.limit=2", "eval.every_steps=1"),
    *("train.steps=3", "train.keep_latest=1", "train.keep_every_steps=2"),
)
CHANGES_BETWEEN_KILLS = 35
"""More than the last step needs, which is lost as a whole: about 20, and those that remove what a killed one left."""


def train_until_killed(output: Path, kill_at: int | None) -> int:
    """Train in a forked process that is killed before its `kill_at`-th change of a directory; return its exit code."""
    return kill_at_change(kill_at, lambda: train(output, *KILLED).code)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run that was not killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(folder / "warm-up", *KILLED).code == 0  # imports torch once: a fork then takes 0.6 s instead of 3.5 s
    assert train_until_killed(folder / "run", None) == 0
    return folder / "run"


def test_run_killed_before_any_change_resumes_to_the_same_artifacts(undisturbed, tmp_path):
    expected, expected_names = artifacts(undisturbed), sorted(names(undisturbed))
    for moment in itertools.count(0, 11):
        output = tmp_path / f"killed-{moment}"
        first = train_until_killed(output, moment)
        assert first in (0, -signal.SIGKILL), moment
        assert train_until_killed(output, None) == 0, moment
        assert artifacts(output) == expected, moment
        assert sorted(names(output)) == expected_names, moment
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 3
        shutil.rmtree(output)
        if first == 0:
            break
    assert moment > 100


def test_run_killed_repeatedly_ends_with_the_same_artifacts(undisturbed, tmp_path):
    output, kills = tmp_path / "run", 0
    while train_until_killed(output, CHANGES_BETWEEN_KILLS) == -signal.SIGKILL:
        kills += 1
        assert kills < 50
    assert kills > 3
    assert artifacts(output) == artifacts(undisturbed)


def test_run_killed_while_a_trainer_state_is_written_resumes_to_the_same_artifacts(undisturbed, tmp_path):
    """The next rollout is made meanwhile. Commands cope with a step that has no trainer state yet."""
    output = tmp_path / "run"

    def save_until_killed(directory: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
        sizes = save(directory, state)
        while not (output / "step-00002/rollout/manifest.json").exists():
            if list(output.glob("trainer/.tmp-*step-00001")):
                return sizes
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_until_killed)
        assert train_until_killed(output, None) == -signal.SIGKILL
    run = Run.load(output)
    assert run.current_step() == 2
    assert [path.name for path in output.glob("trainer/step-*")] == ["step-00001"]
    assert invoke("status", output, "--verify").code == 0
    assert not find_corrupt_artifacts(run)
    fork = invoke("run", "fork", output, tmp_path / "fork", "--set", "train.learning_rate=1e-3")
    assert (fork.code, fork.kind) == (ExitCode.USAGE, "missing_checkpoint")
    assert "not written yet" in fork.err
    assert train_until_killed(output, None) == 0
    assert artifacts(output) == artifacts(undisturbed)
    assert sorted(names(output)) == sorted(names(undisturbed))


def test_trainer_state_is_complete_before_the_next_update(undisturbed, tmp_path, monkeypatch):
    """A save that begins after the next rollout writes the weights and moments of its step."""
    output, save = tmp_path / "run", checkpoint.save

    def save_late(directory: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
        following = output / f"step-{int(directory.name[-5:]):05d}"
        while int(directory.name[-5:]) < 3 and not (following / "teacher/manifest.json").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        return save(directory, state)

    monkeypatch.setattr(checkpoint, "save", save_late)
    for path, late in ((output, True), (tmp_path / "other", False)):
        if not late:
            monkeypatch.setattr(checkpoint, "save", save)
        assert train(path, *KILLED, "train.keep_latest=9").code == 0
    assert artifacts(output) == artifacts(tmp_path / "other")
    assert len(list(output.glob("trainer/*"))) == 3


def test_process_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    settings = (*SHORT, "train.steps=12")
    words = ["train", "--recipe", QUICKSTART, *sets(*settings), "--output", tmp_path / "run"]
    command = [sys.executable, "-m", "opdctl", *map(str, words)]
    for delay in np.random.default_rng(0).uniform(0, 0.5, 3):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stderr is not None
        assert any(line.startswith("step ") for line in process.stderr)  # the first step of this process
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert train(tmp_path / "undisturbed", *settings).code == 0
    assert max_difference(weights(tmp_path / "undisturbed", 12), weights(tmp_path / "run", 12)) == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, ExitCode.REQUEUE),
        (signal.SIGUSR1, ExitCode.REQUEUE),
        (signal.SIGINT, ExitCode.INTERRUPTED),
    ],
)
def test_signal_stops_training_and_the_same_command_resumes(finished_run, tmp_path, number, code):
    output = tmp_path / "run"
    arguments = ["--recipe", str(QUICKSTART), *sets(*SHORT, "train.steps=200"), "--output", str(output)]
    command = [sys.executable, "-m", "opdctl", "train", *arguments]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert any(line.startswith("step   0 (  1 of 200)") for line in running.stderr)
    running.send_signal(number)
    _, messages = running.communicate()
    assert running.returncode == code
    assert not list(output.rglob(".tmp-*"))
    assert "run the same command again to resume" in messages
    assert "Traceback" not in messages
    resumed = train(output, *SHORT, "train.steps=2")
    assert resumed.code == 0, resumed.err
    for step in (0, 1):
        name = f"step-0000{step}/rollout/part-00000-of-00002.parquet"
        assert (output / name).read_bytes() == (finished_run / name).read_bytes()
