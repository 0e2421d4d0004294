"""Training at a terminal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, sets
from helpers.terminal import run_at_terminal


def test_training_shows_step_loss_accuracy_speed_and_time_left(tmp_path):
    settings = sets("train.steps=2", "eval.every_steps=1")
    output = run_at_terminal(
        "-m", "opdctl", "train", "--recipe", str(QUICKSTART), *settings, "--output", str(tmp_path / "run")
    )
    last = [line for line in output.splitlines() if "1 (2 of 2) │" in line][-1]
    step, loss, gap, truncated, accuracy, speed, left = (c.strip() for c in last.split("│")[1:-1])
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    summary = json.loads((tmp_path / "run" / "eval" / "sort12" / "step-00001" / "summary.json").read_text())
    seconds = sum(metrics[f"{stage}_seconds"] for stage in ("rollout", "score", "update"))
    assert (step, loss, gap) == ("1 (2 of 2)", f"{metrics['loss']:+.4f}", f"{metrics['abs_advantage']:.4f}")
    assert truncated == f"{metrics['truncated_fraction']:.0%}"
    assert (accuracy, left) == (f"{summary['avg']:.1%} @1", "0:00:00")
    assert speed == f"{metrics['tokens'] / seconds:,.0f}"


@pytest.mark.parametrize("words", [["status"], ["eval", "--dry-run"], ["train"]], ids=" ".join)
def test_ascii_locale_gets_plain_characters(words, finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path / "rün"))
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "opdctl", words[0], str(run), *words[1:]]
    done = subprocess.run(command, env=variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = (done.stdout + done.stderr).decode("ascii")
    assert {"status": "r\\xfcn: 2 of 2 steps", "eval": "<= ", "train": "->"}[words[0]] in printed


@pytest.mark.parametrize("words", [["--help"], ["list", "weights"]], ids=" ".join)
def test_narrow_ascii_terminal(words):
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "20", "TERM": "dumb"}
    variables |= {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "opdctl", *words], env=variables, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
