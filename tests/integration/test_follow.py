"""Stages that stay: three processes that share a run directory, drawing ahead, and what each learns of the others."""

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import QUICKSTART, invoke, sets

from opdctl.artifacts import leases
from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows
from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.heartbeats import read_heartbeats, send_heartbeats
from opdctl.runs.run import Run, load_run

STAGES = ("rollout", "score-teacher", "train")
THREE = ("train.steps=3",)
AHEAD = (*THREE, "pipeline.max_staleness=1")


def arguments(output: Path, *overrides: str) -> list[object]:
    return ["--recipe", QUICKSTART, *sets(*overrides), "--output", output]


def start(stage: str, output: Path, *overrides: str) -> int:
    """Follow with a stage in a forked process, and return its number."""
    child = os.fork()
    if child == 0:
        os._exit(invoke(stage, "--follow", *arguments(output, *overrides)).code)
    return child


def code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of a single process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    result = invoke("train", *arguments(path, *THREE))
    assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def ahead(tmp_path_factory) -> Path:
    """A run whose step 1 was drawn before step 0 was learnt from."""
    path = tmp_path_factory.mktemp("ahead") / "run"
    for command in (("rollout",), ("rollout", "--step", 1), ("score-teacher",), ("score-teacher", "--step", 1)):
        result = invoke(*command, *arguments(path, *AHEAD))
        assert result.code == 0, result.err
    result = invoke("train", "--no-fill", *arguments(path, *AHEAD))
    assert result.code == 0, result.err
    assert "lag 1" in result.err.splitlines()[1]
    return path


@pytest.fixture
def copy(ahead, tmp_path) -> Path:
    return Path(shutil.copytree(ahead, tmp_path / "run"))


def test_three_followers_make_the_student_of_one_process_whichever_is_killed_and_started_again(alone, tmp_path):
    output = tmp_path / "run"
    followers = {stage: start(stage, output, *THREE) for stage in STAGES}
    moments = {
        "rollout": "step-00001/rollout/manifest.json",
        "score-teacher": "step-00001/teacher/in_progress.json",
        "train": "step-00001/teacher/manifest.json",
    }
    for stage, moment in moments.items():
        until((output / moment).exists)
        os.kill(followers[stage], signal.SIGKILL)
        code(followers[stage])
        followers[stage] = start(stage, output, *THREE)
    assert [code(child) for child in followers.values()] == [0, 0, 0]
    for step in range(4):
        name = "model.safetensors"
        one, three = (load_run(path) for path in (alone, output))
        if step in one.kept_steps():
            assert (one.student_at(step).path / name).read_bytes() == (three.student_at(step).path / name).read_bytes()
    assert [three.update(step)["metrics"]["staleness"] for step in range(3)] == [0, 0, 0]
    assert not list(output.rglob("policy_version.json"))
    assert invoke("status", output, "--verify").code == 0


def test_followers_that_draw_ahead_keep_within_the_bound_and_end(tmp_path):
    overrides = ("train.steps=4", "pipeline.max_staleness=2", "rollout.num_parts=4")
    followers = [start(stage, tmp_path / "run", *overrides) for stage in ("rollout", *STAGES)]
    assert [code(child) for child in followers] == [0, 0, 0, 0]
    run = load_run(tmp_path / "run")
    for step in range(4):
        lag = run.update(step)["metrics"]["staleness"]
        assert 0 <= lag <= 2
        assert {row.policy_version for index in range(4) for row in rows(run, step, index)} == {step - lag}
    assert invoke("status", run.path, "--verify").code == 0


def rows(run: Run, step: int, index: int) -> list[Response]:
    return read_rows(run.rollout_stage(step).verify(index), Response)


def test_responses_drawn_ahead_say_so_and_are_corrected_for(ahead):
    """The importance weight of each token, by an engine of its own with the student that learns."""
    run = load_run(ahead)
    own = [row for index in range(2) for row in rows(run, 1, index)]
    assert {row.policy_version for row in own} == {0}
    assert all("/00001/" in row.sample_id for row in own)
    engine = TransformersEngine(run.student_at(1), "cpu")
    scores = engine.score([ScoreRequest(r.prompt_ids, r.response_ids) for r in own], run.recipe.score, lambda n: None)
    ratios = [np.exp(now.logprobs.astype(float) - row.logprobs) for now, row in zip(scores, own, strict=True)]
    metrics = run.update(1)["metrics"]
    assert metrics["staleness"] == 1
    assert metrics["rollout_correction"] == pytest.approx(np.concatenate(ratios).clip(max=5).mean(), rel=1e-5)
    assert metrics["rollout_correction"] != pytest.approx(1, abs=1e-3)
    assert run.update(0)["metrics"]["rollout_correction"] == pytest.approx(1, abs=1e-4)


def test_whoever_makes_a_part_later_draws_it_with_the_student_that_was_settled(copy):
    run = load_run(copy)
    path = run.rollout_stage(1).verify(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    result = invoke("rollout", "--step", 1, "--repair", "--output", copy)
    assert result.code == 0, result.err
    assert path.read_bytes() == whole


def test_no_step_is_drawn_further_ahead_than_the_bound(copy):
    result = invoke("rollout", "--step", 3, "--output", copy, "--set", "train.steps=5")
    assert result.code == 0, result.err
    result = invoke("rollout", "--step", 4, "--output", copy, "--set", "train.steps=5")
    assert result.code == ExitCode.USAGE
    assert "step 4 has no student yet, 2 updates are done" in result.err


def test_a_lower_bound_refuses_what_was_drawn_ahead_and_is_still_to_be_learnt_from(copy):
    longer = ["--output", copy, "--set", "train.steps=5"]
    assert invoke("rollout", "--step", 3, *longer).code == 0
    now = [*longer, "--set", "pipeline.max_staleness=0"]
    assert invoke("rollout", "--step", 1, *now).code == 0  # learnt from already
    result = invoke("train", *now)
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert "step-00003: drawn by the student of step 2; pipeline.max_staleness = 0 wants that of step 3" in result.err
    assert load_run(copy).current_step() == 3
    shutil.rmtree(copy / "step-00003")
    result = invoke("train", *now)
    assert result.code == 0, result.err


@pytest.mark.parametrize("objective", ["sampled_kl", "reverse_kl"])
def test_an_objective_that_cannot_correct_is_refused_with_staleness(objective, tmp_path):
    result = invoke("rollout", *arguments(tmp_path / "run", *AHEAD, f"objective.name={objective}"))
    assert result.code == ExitCode.USAGE
    assert f"pipeline.max_staleness: objective `{objective}` has no rollout correction" in result.err


# ── Waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stage", "what"), [("score-teacher", "the responses"), ("train", "the teacher's scores")])
def test_a_stage_that_waits_too_long_gives_up_and_says_for_what(stage, what, tmp_path):
    result = invoke(stage, "--follow", *arguments(tmp_path / "run", "pipeline.follow_timeout_seconds=0.1"))
    assert result.code == ExitCode.UNAVAILABLE
    assert f"step 0: waited 0.1 s for {what}" in result.err
    assert not list((tmp_path / "run" / "heartbeats").iterdir())


def test_a_cluster_s_signal_ends_a_stage_that_waits_with_75(alone, tmp_path):
    output = tmp_path / "run"
    child = start("score-teacher", output)
    until(
        lambda: (
            (output / "run.json").exists() and any(sign.state != "starts" for sign in read_heartbeats(load_run(output)))
        )
    )
    os.kill(child, signal.SIGUSR1)
    assert code(child) == ExitCode.REQUEUE
    assert not read_heartbeats(load_run(output))


def test_status_tells_who_waits_and_who_has_gone_silent(alone, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    run = load_run(alone)
    with send_heartbeats(impatient(run), "rollout") as follower:
        assert read_heartbeats(run)[0].state == "starts"
        with pytest.raises(OpdctlError, match="waited"):
            follower.wait_for(7, lambda: False, "a student")
        until(lambda: read_heartbeats(run)[0].state == "waits for a student")
        result = invoke("status", alone, "--json")
        assert result.code == 0
        assert f"rollout   step 7, waits for a student  (0 s ago, process {os.getpid()} on" in result.err
        (sign,) = result.json()["followers"]
        assert (sign["stage"], sign["step"], sign["pid"]) == ("rollout", 7, os.getpid())
    assert not read_heartbeats(run)


def test_nobody_gives_up_while_another_is_at_work(alone, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    run = impatient(load_run(alone))
    with send_heartbeats(run, "train") as waiting:
        with send_heartbeats(run, "rollout") as working:
            working.wait_for(0, lambda: True, "a student")
            until(lambda: any(sign.state == "works" for sign in read_heartbeats(run)))
            end = time.monotonic() + 0.3
            waiting.wait_for(0, lambda: time.monotonic() > end, "the teacher's scores")
        with pytest.raises(OpdctlError, match="waited"):
            waiting.wait_for(1, lambda: False, "the teacher's scores")


def impatient(run: Run) -> Run:
    pipeline = run.recipe.pipeline.model_copy(update={"follow_timeout_seconds": 0.05})
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"pipeline": pipeline}))


def test_what_a_dead_follower_left_is_shown_as_dead_and_forgotten_by_the_next(alone):
    run = load_run(alone)
    with send_heartbeats(run, "train"):
        left = alone / "heartbeats" / "rollout-elsewhere-1.json"
        (own,) = (alone / "heartbeats").glob("train-*.json")
        left.write_bytes(own.read_bytes())
        unfinished = left.with_name(".tmp-1-rollout-elsewhere-1.json")  # as it is being written anew
        unfinished.write_bytes(own.read_bytes())
        assert len(read_heartbeats(run)) == 2
        unfinished.unlink()
    os.utime(left, (time.time() - 2 * leases.LEASE_SECONDS,) * 2)
    assert "no sign of life for 120 s" in invoke("status", alone).err
    with send_heartbeats(run, "train"):
        assert not left.exists()


@pytest.mark.parametrize("option", [("--step", 1), ("--repair",)])
def test_following_takes_no_single_step(option, tmp_path):
    result = invoke("rollout", "--follow", *option, *arguments(tmp_path / "run"))
    assert result.code == ExitCode.USAGE
    assert f"give it without {option[0]}" in result.err
