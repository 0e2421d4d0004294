"""The progress table and the summary of a training."""

import dataclasses

import pytest
from helpers.commands import small_recipe

from opdctl.pipeline import progress
from opdctl.runs.open import open_run
from opdctl.runs.run import Run


def test_best_student_has_the_highest_accuracy(finished_run):
    summary = progress.summarize_training(Run.load(finished_run), 0, {})
    accuracies = dict(progress.latest_accuracies(Run.load(finished_run), 2))
    assert accuracies.keys() == {0, 1, 2}
    step, accuracy = summary.best
    assert accuracy == max(accuracies.values())
    assert step == min(step for step, value in accuracies.items() if value == accuracy)
    assert (summary.accuracy["before"], summary.accuracy["after"]) == (accuracies[0], accuracies[2])
    assert summary.accuracy["teacher"] is not None


def test_summary_as_json(finished_run):
    summary = progress.summarize_training(Run.load(finished_run), 0, {"update": 1.5})
    values = summary.as_dict()
    assert (values["steps"], values["seconds"]) == (2, {"update": 1.5})
    assert values["student"] == str(finished_run / "student/step-00002")
    assert values["best"] == {"step": summary.best[0], "accuracy": summary.best[1]}
    assert dataclasses.replace(summary, best=None).as_dict()["best"] is None


def test_row_has_the_latest_accuracy_and_reads_no_other_step(tmp_path, monkeypatch):
    run, asked = open_run(small_recipe(), tmp_path / "run"), []
    measured = {0: {"avg": 0.25}, 8: {"avg": 0.5}, 16: None, 2000: {"avg": 0.75}}  # 16: under another protocol

    def stored(run, bench, target):
        asked.append(int(target.removeprefix("step-")))
        return measured[asked[-1]]

    monkeypatch.setattr(progress.evaluate, "stored_summary", stored)
    metrics = dict.fromkeys(("loss", "abs_advantage", "truncated_fraction", "tokens"), 1.0)

    def shown(step):
        return progress.format_row(run, metrics | {"step": step}, 0.0)[progress.PROGRESS_COLUMNS.index("accuracy")]

    assert (shown(999), asked) == ("", [])
    for name in ("step-00016", "step-00000", "step-02000", "step-00008", "step-00008 (copy)", "teacher"):
        run.evaluation_path("sort12", name).mkdir(parents=True)
        (run.evaluation_path("sort12", name) / "summary.json").touch()
    assert (shown(999), asked) == ("50.0% @8", [16, 8])
    assert shown(1999) == "75.0% @2000"


@pytest.mark.parametrize("staleness", [0, 2])
def test_line_names_the_staleness_of_asynchronous_steps(finished_run, staleness):
    metrics = Run.load(finished_run).update(1)["metrics"] | {"staleness": staleness}
    line = progress.format_line(metrics, 10)
    assert line.startswith("step  1 ( 2 of 10)  loss")
    assert ("staleness 2" in line) == bool(staleness)


def test_line_has_the_time_of_a_start(finished_run):
    metrics = Run.load(finished_run).update(1)["metrics"]
    assert "start-up" not in progress.format_line(metrics | {"startup_seconds": 0.4}, 10)
    assert progress.format_line(metrics | {"startup_seconds": 31.4}, 10).endswith("  start-up 31 s")


def test_speed_is_that_of_a_step_that_this_command_made(finished_run):
    run = Run.load(finished_run)
    seconds = {"rollout_seconds": 2.0, "score_seconds": 1.0, "update_seconds": 1.0, "startup_seconds": 60.0}
    metrics = run.update(1)["metrics"] | seconds | {"tokens": 4000}
    column = progress.PROGRESS_COLUMNS.index("tokens/s")
    assert progress.format_row(run, metrics, 0.0)[column] == "1,000"
    assert progress.format_row(run, metrics, 0.0)[0] == "1 (2 of 2)"
    del metrics["rollout_seconds"]
    assert progress.format_row(run, metrics, 0.0)[column] == ""
