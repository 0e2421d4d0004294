"""Every command and every line of Python in the tutorials runs: docs/quickstart.md, notebook.md, extending.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT
from helpers.documents import code_blocks

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tutorial_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which every command of docs/quickstart.md was run, in order."""
    directory = tmp_path_factory.mktemp("quickstart")
    function = f'opdctl() {{ {shlex.quote(sys.executable)} -m opdctl "$@"; }}'
    for block in code_blocks(DOCS / "quickstart.md", "sh"):
        script = f"set -euo pipefail\n{function}\n{block}"
        result = subprocess.run(["bash", "-c", script], cwd=directory, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{block}\n{result.stderr}"
    return directory


def test_the_quickstart_makes_its_runs(tutorial_directory):
    runs = tutorial_directory / "runs"
    assert {run.name for run in runs.iterdir()} == {"first", "forked", "staged", "own"}  # uniform was a plan
    students = {"first": 3, "forked": 4, "staged": 1, "own": 1}
    assert all((runs / name / "student" / f"step-{step:05d}").is_dir() for name, step in students.items())


def test_the_notebook_loads_a_run(tutorial_directory, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tutorial_directory / "runs" / "first")
    script = "\n".join(code_blocks(DOCS / "notebook.md", "python")) + "\nprint(len(frame), len(metrics))"
    variables = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "384 3"  # three steps of 128 responses


def test_custom_components_are_short_and_run(tmp_path):
    page = DOCS / "extending.md"
    codes = code_blocks(page, "python")
    assert len(codes) == 3
    assert all(len([line for line in code.splitlines() if line.strip()]) < 20 for code in codes)
    assert {name for code in codes for name in re.findall(r"from (opdctl[\w.]*) import", code)} == {"opdctl.plugins"}
    (tmp_path / "mine.py").write_text("\n".join(codes))
    (tmp_path / "riddles.csv").write_text("riddle,answer\nabc?,c\n")
    commands = "".join(code_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    assert len(commands) == 5
    messages = ""
    for command in commands:
        small = ["--set", "eval.limit=16"] if command.startswith("opdctl train") else []
        words = [sys.executable, "-m", *shlex.split(command), *small]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        messages += result.stdout + result.stderr
    assert "unsure  `weight` if the student's entropy is above `limit` nats, else 1." in messages
    assert "limit = 0.5, weight = 2.0; this tutorial" in messages
    assert "riddles, step-00002: 1 problems" in messages
