"""Training that is killed or stopped by a signal, and run again, ends with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import QUICKSTART, artifacts, names, sets
from helpers.training import SHORT, max_difference, train, weights

from opdctl.errors import ExitCode

# Short responses and few problems; evaluations, and students and checkpoints to prune.
KILLED = (
    *("rollout.max_tokens=16", "eval.max_tokens=16", "eval.limit=2", "eval.every_steps=1"),
    *("train.steps=3", "train.keep_latest=1", "train.keep_every_steps=2"),
)
CHANGES = ("replace", "rename", "unlink", "rmdir")


def train_until_killed(output: Path, kill_at: int | None) -> int:
    """Train in a forked process that is killed just before its `kill_at`-th change of a directory.

    Return its wait status. Parts, manifests and directories are created and removed by these functions of `os` only,
    so a kill between two of them leaves the same names.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call):
            def change(*arguments, **options):
                nonlocal count
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return call(*arguments, **options)

            return change

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        code = train(output, *KILLED).code
        (output / "changes").write_text(str(count))
        os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run that was not killed, with the number of its changes in `changes`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(folder / "warm-up", *KILLED).code == 0  # imports torch once: a fork then takes 0.6 s instead of 3.5 s
    assert train_until_killed(folder / "run", None) == 0
    return folder / "run"


def test_run_killed_before_any_change_resumes_to_the_same_artifacts(undisturbed, tmp_path):
    total = int((undisturbed / "changes").read_text())
    assert total > 100
    expected, expected_names = artifacts(undisturbed), sorted(names(undisturbed))
    for moment in range(0, total, 11):
        output = tmp_path / f"killed-{moment}"
        assert os.WTERMSIG(train_until_killed(output, moment)) == signal.SIGKILL
        assert os.waitstatus_to_exitcode(train_until_killed(output, None)) == 0, moment
        assert artifacts(output) == expected, moment
        assert sorted(names(output)) == expected_names, moment
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 3
        shutil.rmtree(output)


def test_run_killed_repeatedly_ends_with_the_same_artifacts(undisturbed, tmp_path):
    output, kills = tmp_path / "run", 0
    while os.WIFSIGNALED(train_until_killed(output, 20)):
        kills += 1
        assert kills < 50
    assert kills > 3
    assert artifacts(output) == artifacts(undisturbed)


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
    assert any(line.startswith("step   1/200") for line in running.stderr)
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
