"""The training loop: time of the stages, collapse, pruning."""

import pytest
from helpers.commands import invoke, small_recipe
from helpers.training import train

from opdctl.errors import ExitCode
from opdctl.pipeline import loop
from opdctl.pipeline.progress import summarize_training
from opdctl.runs.open import open_run
from opdctl.runs.run import Run


def test_clock_covers_every_stage(tmp_path):
    overrides = ("eval.every_steps=1", "eval.limit=2", "eval.max_tokens=40", "rollout.max_tokens=40", "train.steps=1")
    run = open_run(small_recipe(*overrides), tmp_path / "run")
    clock = loop.run_training(run, "cpu")
    assert all(seconds > 0 for seconds in clock.seconds.values())
    accuracy = summarize_training(run, 0, clock.seconds).accuracy
    assert set(accuracy) == {"before", "after", "teacher"}
    assert all(0 <= value <= 1 for value in accuracy.values())


@pytest.mark.parametrize(
    ("bound", "relaxed"),
    [
        ("train.max_truncated_fraction=0.9", "train.max_truncated_fraction=1.0"),
        ("train.min_entropy=50.0", "train.min_entropy=0.0"),
    ],
)
def test_collapse_stops_training_until_the_bound_is_relaxed(tmp_path, bound, relaxed):
    settings = ("train.steps=6", "rollout.max_tokens=4", bound)
    result = train(tmp_path / "run", *settings)
    assert (result.code, result.kind) == (ExitCode.FAILED, "collapsed_training")
    assert bound.partition("=")[0] in result.err
    assert "in steps 1 to 3" in result.err
    assert ("100%, 100%, 100%" in result.err) == ("truncated" in bound)
    assert Run.load(tmp_path / "run").current_step() == 3
    assert train(tmp_path / "run", *settings).code == ExitCode.FAILED  # again
    assert train(tmp_path / "run", *settings, relaxed, "train.steps=4").code == 0


def test_students_are_pruned_except_those_to_keep(tmp_path):
    output = tmp_path / "run"
    settings = ("train.steps=6", "rollout.max_tokens=4", "train.keep_every_steps=4", "train.keep_latest=1")
    assert train(output, *settings).code == 0
    assert Run.load(output).kept_steps() == [0, 4, 6]
    assert [path.name for path in (output / "trainer").iterdir()] == ["step-00006"]
    result = invoke("eval", "--output", output, "--step", "3")
    assert (result.code, result.kind) == (ExitCode.USAGE, "missing_checkpoint")
    assert "0, 4, 6" in result.err
