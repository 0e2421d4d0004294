"""The training loop: time of the stages, collapse, pruning."""

import pytest
from helpers.clocks import PlantedClock
from helpers.commands import invoke, small_recipe
from helpers.training import copy_scored_run, train

from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.pipeline import loop
from opdctl.pipeline.progress import summarize_training
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.training.trainer import Trainer


def test_clock_covers_every_stage(tmp_path):
    overrides = ("eval.every_steps=1", "eval.limit=2", "eval.max_tokens=40", "rollout.max_tokens=40", "train.steps=1")
    run = open_run(small_recipe(*overrides), tmp_path / "run")
    clock = loop.run_training(run, "cpu")
    assert all(seconds > 0 for seconds in clock.seconds.values())
    accuracy = summarize_training(run, 0, clock.seconds).accuracy
    assert set(accuracy) == {"before", "after", "teacher"}
    assert all(0 <= value <= 1 for value in accuracy.values())


SECONDS = {"load": 100.0, "sample a part": 2.0, "score a part": 3.0, "load the trainer": 1000.0, "update": 5.0}


@pytest.fixture
def planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PlantedClock(monkeypatch)
    clock.delay(TransformersEngine, "load_weights", SECONDS["load"])
    clock.delay(TransformersEngine, "stream_completions", SECONDS["sample a part"])
    clock.delay(TransformersEngine, "stream_scores", SECONDS["score a part"])
    clock.delay(Trainer, "__init__", SECONDS["load the trainer"])
    clock.delay(Trainer, "_update", SECONDS["update"])


def timed(run: Run, step: int) -> dict[str, float]:
    """Return the times of a step, and check that each rate is that of its time."""
    metrics = run.update(step)["metrics"]
    times = {name.removesuffix("_seconds"): value for name, value in metrics.items() if name.endswith("_seconds")}
    rates = {name.partition("_")[0]: value for name, value in metrics.items() if name.endswith("_per_second")}
    assert rates == {stage: metrics["tokens"] / value for stage, value in times.items() if stage != "startup"}
    return times


def test_time_of_a_stage_is_without_the_load_of_its_model(tmp_path, planted_times):
    run = open_run(small_recipe("rollout.max_tokens=8"), tmp_path / "run")  # two parts
    clock = loop.run_training(run, "cpu")
    work = {"rollout": 4.0, "score": 6.0, "update": 5.0}
    assert timed(run, 0) == {**work, "startup": 1200.0}  # student, teacher, trainer
    assert timed(run, 1) == {**work, "startup": 103.0}  # the next student, with its probe
    assert clock.seconds == {"rollout": 8.0, "score": 12.0, "update": 10.0, "eval": 0.0, "startup": 1303.0}


@pytest.mark.parametrize(("lost", "timed_now"), [("*", {"score"}), ("part-00000-*", set())])
def test_stage_of_which_another_command_made_a_part_has_no_rate(finished_run, tmp_path, planted_times, lost, timed_now):
    run = copy_scored_run(finished_run, tmp_path / "run")
    for path in (run.step_path(0) / "teacher").glob(lost):
        path.unlink()
    run = Run.load(run.path, "run")
    loop.run_training(run, "cpu")
    first, second = timed(run, 0), timed(run, 1)
    assert first.keys() == {"update", "startup"} | timed_now
    assert first.get("score", 6.0) == 6.0
    assert first["startup"] == 1100.0  # the teacher and the trainer
    assert second.keys() == {"rollout", "score", "update", "startup"}


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
    assert "in steps 0 to 2" in result.err
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
