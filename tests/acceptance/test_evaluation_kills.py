"""`opdctl eval`, killed before each file that it writes and started again."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import contents
from helpers.evaluations import evaluate_toy


def evaluate_in_child(output: Path, kill_at: int | None) -> int:
    """Evaluate in a forked process that is killed just before its `kill_at`-th file appears; return its wait status."""
    child = os.fork()
    if child == 0:
        replace, count = os.replace, 0

        def counted(*args: Any) -> None:
            nonlocal count
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            replace(*args)

        os.replace = counted  # type: ignore[assignment]
        os._exit(evaluate_toy("--output", output).code)
    return os.waitpid(child, 0)[1]


def test_resumed_evaluation_has_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate_toy("--output", tmp_path / "complete").code == 0
    moments = 0
    while os.WIFSIGNALED(evaluate_in_child(output := tmp_path / f"killed-{moments}", moments)):
        assert evaluate_in_child(output, None) == 0, moments
        assert contents(output) == contents(tmp_path / "complete"), moments
        moments += 1
    assert moments >= 10  # prompts, three parts with a receipt each, header, manifest, benchmark, summary
