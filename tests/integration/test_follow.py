"""Sampling ahead (pipeline.max_staleness) and waiting for inputs (`--follow`), in one process."""

import os
import shutil
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
from opdctl.errors import ExitCode
from opdctl.runs.heartbeats import read_heartbeats, send_heartbeats
from opdctl.runs.run import Run

STAGES = ("rollout", "score-teacher", "train")
THREE = ("train.steps=3",)
AHEAD = (*THREE, "pipeline.max_staleness=1")


def arguments(output: Path, *overrides: str) -> list[object]:
    return ["--recipe", QUICKSTART, *sets(*overrides), "--output", output]


@pytest.fixture(scope="module")
def ahead(tmp_path_factory) -> Path:
    """A run whose step 1 was sampled before the update of step 0."""
    path = tmp_path_factory.mktemp("ahead") / "run"
    for command in (("rollout",), ("rollout", "--step", 1), ("score-teacher",), ("score-teacher", "--step", 1)):
        result = invoke(*command, *arguments(path, *AHEAD))
        assert result.code == 0, result.err
    result = invoke("train", "--no-fill", *arguments(path, *AHEAD))
    assert result.code == 0, result.err
    assert "staleness 1" in result.err
    return path


@pytest.fixture
def copy(ahead, tmp_path) -> Path:
    return Path(shutil.copytree(ahead, tmp_path / "run"))


def rows(run: Run, step: int, index: int) -> list[Response]:
    return read_rows(run.rollout_stage(step).verify(index), Response)


def test_responses_sampled_ahead_record_their_policy_and_are_corrected_for(ahead):
    """The importance weight of each token is computed by a separate engine with the student in training."""
    run = Run.load(ahead)
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


def test_regenerated_part_is_sampled_by_the_pinned_policy(copy):
    path = Run.load(copy).rollout_stage(1).verify(0)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert invoke("run", "repair", copy).code == 0
    result = invoke("rollout", "--step", 1, "--output", copy)
    assert result.code == 0, result.err
    assert path.read_bytes() == data


def test_step_beyond_the_bound_is_refused(copy):
    result = invoke("rollout", "--step", 3, "--output", copy, "--set", "train.steps=5")
    assert result.code == 0, result.err
    result = invoke("rollout", "--step", 4, "--output", copy, "--set", "train.steps=5")
    assert (result.code, result.kind) == (ExitCode.USAGE, "missing_checkpoint")
    assert "--step 4" in result.err


def test_lower_bound_refuses_stale_rollouts_without_an_update(copy):
    longer = ["--output", copy, "--set", "train.steps=5"]
    assert invoke("rollout", "--step", 3, *longer).code == 0
    now = [*longer, "--set", "pipeline.max_staleness=0"]
    assert invoke("rollout", "--step", 1, *now).code == 0  # has its update
    result = invoke("train", *now)
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "stale_rollout")
    assert f"{copy / 'step-00003'}: sampled by policy version 2; pipeline.max_staleness = 0" in result.err
    assert Run.load(copy).current_step() == 3
    shutil.rmtree(copy / "step-00003")
    result = invoke("train", *now)
    assert result.code == 0, result.err


@pytest.mark.parametrize("objective", ["sampled_kl", "reverse_kl"])
def test_objective_without_rollout_correction_is_refused_with_staleness(objective, tmp_path):
    result = invoke("rollout", *arguments(tmp_path / "run", *AHEAD, f"objective.name={objective}"))
    assert (result.code, result.kind) == (ExitCode.USAGE, "invalid_recipe")
    assert "pipeline.max_staleness" in result.err
    assert f"`{objective}`" in result.err


# ── Waiting ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stage", "what"), [("score-teacher", "responses"), ("train", "teacher scores")])
def test_stage_that_waits_too_long_reports_what_it_waited_for(stage, what, tmp_path):
    result = invoke(stage, "--follow", *arguments(tmp_path / "run", "pipeline.follow_timeout_seconds=0.1"))
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "expired_wait")
    assert f"step 0: no {what} for 0.1 s" in result.err
    assert not list((tmp_path / "run" / "heartbeats").iterdir())


def test_status_shows_heartbeats(finished_copy, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    run = Run.load(finished_copy)
    with send_heartbeats(run, "rollout") as heartbeat:
        heartbeat.wait_for(7, lambda: True, "student")
        until(lambda: read_heartbeats(run)[0].state == "running")
        result = invoke("status", finished_copy, "--json")
        assert result.code == 0
        assert f"step 7, running  (0 s ago, process {os.getpid()} on" in result.err
        (beat,) = result.json()["heartbeats"]
        assert (beat["stage"], beat["step"], beat["pid"], beat["state"]) == ("rollout", 7, os.getpid(), "running")
        (path,) = (finished_copy / "heartbeats").glob("rollout-*.json")
        left = path.with_name("train-elsewhere-1.json")
        left.write_bytes(path.read_bytes())
        os.utime(left, (time.time() - 2 * leases.LEASE_SECONDS,) * 2)
        assert "no heartbeat for 120 s" in invoke("status", finished_copy).out


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_following_takes_no_step(tmp_path):
    for command in ("rollout", "score-teacher"):
        result = invoke(command, "--follow", "--step", 1, *arguments(tmp_path / "run"))
        assert (result.code, result.kind) == (ExitCode.USAGE, "invalid_usage")
        assert "--step" in result.err
