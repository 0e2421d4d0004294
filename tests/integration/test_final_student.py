"""Responses of the final student: the step after the last one of a finished run is sampled and scored when asked."""

import shutil
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, contents, invoke, sets

from opdctl.artifacts.records import Response
from opdctl.runs.run import Run

FINAL = 2
"""The number of updates of `finished_run`."""


@pytest.fixture
def sampled(finished_copy: Path) -> Path:
    """A finished run whose final student has responses and scores."""
    for command in ("rollout", "score-teacher"):
        result = invoke(command, "--output", finished_copy, "--step", FINAL)
        assert result.code == 0, result.err
    return finished_copy


def status(path: Path) -> dict:
    return invoke("status", path, "--verify", "--json").json()


def test_final_student_samples_the_prompts_of_the_next_step(finished_copy: Path) -> None:
    before = contents(finished_copy)
    result = invoke("rollout", "--output", finished_copy, "--step", FINAL, "--json")
    assert result.code == 0, result.err
    value = result.json()
    assert (value["step"], value["rows"], value["parts_made"]) == (FINAL, 8, 2)
    assert value["next"] == f"opdctl score-teacher {finished_copy} --step {FINAL}"
    run = Run.load(finished_copy)
    rows = run.rollout_stage(FINAL).read_all(Response)
    assert [row.sample_id for row in rows] == [name for name, _ in run.samples(FINAL)]
    assert {row.policy_version for row in rows} == {FINAL}
    assert not {row.prompt_id for row in rows} & {prompt.prompt_id for _, prompt in run.samples(0)}
    after = contents(finished_copy)
    assert all("step-00002/rollout" in name for name in after.keys() - before.keys())
    assert {name: after[name] for name in before} == before


def test_scores_follow_and_status_is_that_of_a_finished_run(finished_copy: Path) -> None:
    assert invoke("rollout", "--output", finished_copy, "--step", FINAL).code == 0
    states = {each["stage"]: each["state"] for each in status(finished_copy)["stages"] if each["step"] == FINAL}
    assert states == {"rollout": "done", "teacher": "missing"}
    result = invoke("score-teacher", "--output", finished_copy, "--step", FINAL, "--json")
    assert result.code == 0, result.err
    assert (result.json()["parts_made"], result.json()["rows"]) == (2, 8)
    value = status(finished_copy)
    assert {each["stage"]: each["state"] for each in value["stages"] if each["step"] == FINAL} == {
        "rollout": "done",
        "teacher": "done",
    }
    assert (value["steps_done"], value["next"]) == (2, f"opdctl analyze-position {finished_copy}")
    assert result.json()["next"] == value["next"]
    again = invoke("rollout", "--output", finished_copy, "--step", FINAL)
    assert "step-00002/rollout is finished" in "".join(again.err.split("\n"))


def test_analysis_reads_the_step(sampled: Path) -> None:
    result = invoke("analyze-position", sampled, "--json")
    assert result.code == 0, result.err
    assert result.json()["summary"]["steps"] == [0, 1, FINAL]


def test_continuations_of_the_final_student(sampled: Path) -> None:
    overrides = ("--set", "continuations.responses=2", "--set", "continuations.prefix_percents=[50]")
    result = invoke("run", "continuations", sampled, "--step", FINAL, *overrides, "--json")
    assert result.code == 0, result.err
    assert result.json()["summary"]["student"] == "step-00002"


def test_continued_training_uses_these_responses(sampled: Path, finished_run: Path, tmp_path: Path) -> None:
    stages = contents(sampled / "step-00002")
    undisturbed = Path(shutil.copytree(finished_run, tmp_path / "undisturbed"))
    for path in (sampled, undisturbed):
        result = invoke("train", "--output", path, "--set", "train.steps=3", "--set", "eval.every_steps=0")
        assert result.code == 0, result.err
    after = contents(sampled / "step-00002")
    assert {name: after[name] for name in stages} == stages
    assert "rollout_seconds" not in Run.load(sampled).update(FINAL)["metrics"]
    weights = "student/step-00003/model.safetensors"
    assert (sampled / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_fork_reuses_these_responses(sampled: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    result = invoke("run", "fork", sampled, fork, "--set", "weight.gamma=0.7", "--set", "train.steps=3")
    assert result.code == 0, result.err
    rollout = "step-00002/rollout"
    assert contents(fork / rollout) == contents(sampled / rollout)


def test_fork_of_a_finished_run_has_the_step_only(sampled: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    assert invoke("run", "fork", sampled, fork, "--set", "weight.gamma=0.7").code == 0
    for command in ("rollout", "score-teacher"):
        result = invoke(command, "--output", fork, "--json")
        assert result.code == 0, result.err
        assert (result.json()["step"], result.json()["parts_made"]) == (FINAL, 0)


@pytest.mark.parametrize("command", ["rollout", "score-teacher"])
def test_steps_beyond_the_final_student_are_rejected(finished_run: Path, command: str) -> None:
    result = invoke(command, "--output", finished_run, "--step", FINAL + 1)
    assert (result.code, result.kind) == (2, "invalid_usage")
    assert "has steps 0 to 2" in result.err


def test_unfinished_run_has_no_final_student(tmp_path: Path) -> None:
    """Not even with asynchronous rollouts, by which an earlier student would sample the responses."""
    path = tmp_path / "run"
    overrides = sets("pipeline.max_staleness=5", "rollout.max_tokens=8")
    assert invoke("rollout", "--recipe", QUICKSTART, *overrides, "--output", path).code == 0
    result = invoke("rollout", "--output", path, "--step", FINAL)
    assert (result.code, result.kind) == (2, "invalid_usage")
    assert not (path / "step-00002").exists()
