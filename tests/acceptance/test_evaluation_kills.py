"""`opdctl eval`, killed before each file that it writes and started again."""

import signal
from pathlib import Path

import pytest
from helpers.commands import contents
from helpers.evaluations import evaluate_toy
from helpers.forks import kill_at_change


def evaluate_in_child(output: Path, kill_at: int | None) -> int:
    """Evaluate in a forked process that is killed before its `kill_at`-th file appears; return its exit code."""
    return kill_at_change(kill_at, lambda: evaluate_toy("--output", output).code, ["replace"])


def test_resumed_evaluation_has_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate_toy("--output", tmp_path / "complete").code == 0
    moments = 0
    while evaluate_in_child(output := tmp_path / f"killed-{moments}", moments) == -signal.SIGKILL:
        assert evaluate_in_child(output, None) == 0, moments
        assert contents(output) == contents(tmp_path / "complete"), moments
        moments += 1
    assert moments >= 10  # prompts, three parts with a receipt each, header, manifest, benchmark, summary
