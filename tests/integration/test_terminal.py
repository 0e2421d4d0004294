"""Training at a terminal."""

import json

from helpers.commands import QUICKSTART, sets
from helpers.terminal import run_at_terminal


def test_training_shows_step_loss_accuracy_speed_and_time_left(tmp_path):
    settings = sets("train.steps=2", "eval.every_steps=1")
    output = run_at_terminal(
        "-m", "opdctl", "train", "--recipe", str(QUICKSTART), *settings, "--output", str(tmp_path / "run")
    )
    last = [line for line in output.splitlines() if "2/2 │" in line][-1]
    step, loss, gap, truncated, accuracy, speed, left = (c.strip() for c in last.split("│")[1:-1])
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    summary = json.loads((tmp_path / "run" / "eval" / "sort12" / "step-00001" / "summary.json").read_text())
    seconds = sum(metrics[f"{stage}_seconds"] for stage in ("rollout", "score", "update"))
    assert (step, loss, gap) == ("2/2", f"{metrics['loss']:+.4f}", f"{metrics['abs_advantage']:.4f}")
    assert truncated == f"{metrics['truncated_fraction']:.0%}"
    assert (accuracy, left) == (f"{summary['avg']:.1%} @1", "0:00:00")
    assert speed == f"{metrics['tokens'] / seconds:,.0f}"
