"""Rollouts of agents on the embedded task: an environment's episodes are responses that are scored and learned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.agents import ENVIRONMENTS, environment_settings
from helpers.commands import QUICKSTART, sets

from opdctl.artifacts.records import Prompt, Response
from opdctl.artifacts.tables import read_rows
from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.recipe.schema import Score
from opdctl.runs.run import Run


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module agent_environments, on PYTHONPATH and in no other process of the tests."""
    (tmp_path / "code").mkdir()
    file = tmp_path / "code" / "agent_environments.py"
    file.write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(file.parent), os.environ.get("PYTHONPATH", "")]))
    sys.modules.pop("agent_environments", None)
    return file


def read_rollout(run: Path, step: int = 0) -> list[Response]:
    return Run.load(run).rollout_stage(step).read_all(Response)


def settings(function: str, *overrides: str) -> list[str]:
    return ["--recipe", str(QUICKSTART), *sets(*environment_settings(function), *overrides)]


def test_run_of_two_steps(environments, tmp_path, opdctl):
    """The log-probs of a trajectory are those of the student for its ids, and what the tool wrote is masked."""
    run = tmp_path / "run"
    result = opdctl("train", *settings("play", "rollout.entropy=true"), "--output", run)
    assert result.code == 0, result.err
    rows = read_rollout(run)
    assert len(rows) == 8
    assert {row.turns for row in rows} == {3}
    engine = TransformersEngine(Run.load(run).student, "cpu")
    scores = engine.score([ScoreRequest(row.prompt_ids, row.response_ids) for row in rows], Score(), lambda n: None)
    prompts = {prompt.prompt_id: prompt for prompt in read_rows(run / "prompts.parquet", Prompt)}
    for row, score in zip(rows, scores, strict=True):
        mask = row.loss_mask
        assert (~mask).sum() == 2
        assert np.array_equal(row.prompt_ids, prompts[row.prompt_id].prompt_ids)
        assert np.allclose(row.logprobs[mask], score.logprobs[mask], atol=1e-4)
        assert not row.logprobs[~mask].any()
        assert not row.entropies[~mask].any()
        assert row.entropies[mask].all()
        assert row.sample_id == f"{row.prompt_id}/00000/0"
        assert row.reward in (0.0, 1.0)
        assert row.tool_seconds > 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["responses"] for line in metrics] == [8, 8]
    assert metrics[0]["invalid_responses"] == 0
    assert metrics[0]["turns"] == 3
    assert 0 <= metrics[0]["reward"] <= 1
    assert metrics[0]["tool_seconds"] > 0
    assert opdctl("analyze-position", run).code == 0
    assert opdctl("run", "show", run, rows[0].sample_id).code == 0


def test_row_of_the_source_is_stored_for_an_environment_only(environments, tmp_path, opdctl, finished_run):
    assert opdctl("rollout", *settings("play"), "--output", tmp_path / "run").code == 0
    for prompt in read_rows(tmp_path / "run" / "prompts.parquet", Prompt):
        assert json.loads(prompt.row)["answer"] == prompt.answer
    assert all(prompt.row is None for prompt in read_rows(finished_run / "prompts.parquet", Prompt))


def test_async_function_selects_a_trajectory(environments, tmp_path, opdctl):
    assert opdctl("rollout", *settings("play_async"), "--output", tmp_path / "run").code == 0
    rows = read_rollout(tmp_path / "run")
    assert len(rows) == 8
    assert all(row.reward == 2 and row.turns == 1 and len(row.response_ids) <= 5 for row in rows)
    assert all(row.loss_mask is None for row in rows)


def test_episode_without_room_is_kept(environments, tmp_path, opdctl):
    assert opdctl("rollout", *settings("exhaust"), "--output", tmp_path / "run").code == 0
    rows = read_rollout(tmp_path / "run")
    assert {row.finish_reason for row in rows} == {"length"}
    assert len(rows) == 8
    assert all(len(row.response_ids) <= 60 and row.turns > 3 for row in rows)


@pytest.mark.parametrize(
    ("function", "reason"), [("fail_sometimes", "ValueError: the tool is gone"), ("hang_sometimes", "TimeoutError")]
)
def test_failed_episodes_are_named_and_counted(environments, tmp_path, opdctl, function, reason):
    run = tmp_path / "run"
    limits = ("rollout.environment_timeout_seconds=30", "train.max_invalid_responses=7", "train.steps=1")
    result = opdctl("train", *settings(function, *limits, "rollout.num_parts=1"), "--output", run)
    assert result.code == 0, result.err
    manifest = json.loads((run / "step-00000" / "rollout" / "manifest.json").read_text())
    failed = [name for part in manifest["parts"] for name in part.get("failed", [])]
    assert failed
    assert all(f"{name}: the episode failed: {reason}" in " ".join(result.err.split()) for name in failed)
    assert len(read_rollout(run)) == 8 - len(failed)
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["invalid_responses"] == len(failed)
    assert json.loads(line)["responses"] == 8 - len(failed)


def test_too_many_failed_episodes_stop_the_command(environments, tmp_path, opdctl):
    result = opdctl("train", *settings("fail_sometimes", "rollout.num_parts=1"), "--output", tmp_path / "run")
    assert (result.code, result.kind) == (5, "failed_environment")
    assert "agent_environments.py" in result.err
    assert not list((tmp_path / "run").glob("step-*/rollout/part-*"))


def test_part_whose_episodes_all_failed_is_an_error(environments, tmp_path, opdctl):
    result = opdctl("rollout", *settings("fail", "train.max_invalid_responses=99"), "--output", tmp_path / "run")
    assert (result.code, result.kind) == (5, "failed_environment")
    assert "all 4 of 4 episodes failed" in result.err


def test_changed_environment_is_refused_and_forked(environments, tmp_path, opdctl):
    run = tmp_path / "run"
    assert opdctl("train", *settings("play", "train.steps=1"), "--output", run).code == 0
    environments.write_text(f"{ENVIRONMENTS}\n# changed\n")
    assert opdctl("analyze-position", run).code == 0
    result = opdctl("train", run, "--set", "train.steps=2")
    assert (result.code, result.kind) == (4, "source_mismatch")
    environments.with_name("other_environments.py").write_text(ENVIRONMENTS)
    setting = "rollout.environment=other_environments:play"
    assert opdctl("run", "fork", run, tmp_path / "fork", "--set", setting).code == 0
    result = opdctl("train", tmp_path / "fork", "--set", "train.steps=2")
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", ["agent_environments:plai", "no_such_module:play"])
def test_missing_function_is_refused_before_anything_is_written(environments, tmp_path, opdctl, name):
    result = opdctl("train", *settings("play", f"rollout.environment={name}"), "--output", tmp_path / "run")
    assert (result.code, result.kind) == (2, "invalid_plugin")
    assert "rollout.environment" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.environment=nofunction"],
        ["rollout.engine=server"],
        ["rollout.routed_experts=true"],
        ["train.router_replay=true"],
        ["teacher.system=Sort."],
    ],
)
def test_settings_that_trajectories_cannot_have_are_refused(environments, tmp_path, opdctl, overrides):
    result = opdctl("train", *settings("play", *overrides), "--output", tmp_path / "run")
    assert (result.code, result.kind) == (2, "invalid_recipe")


def test_recorded_environment_inside_a_run_is_refused(environments, tmp_path, opdctl, monkeypatch):
    run = tmp_path / "run"
    assert opdctl("rollout", *settings("play"), "--output", run).code == 0
    (run / "agent_environments.py").write_text(ENVIRONMENTS)
    sys.modules.pop("agent_environments")
    monkeypatch.syspath_prepend(str(run))
    result = opdctl("train", run)
    assert (result.code, result.kind) == (2, "untrusted_code")


def test_killed_rollout_resumes_to_the_same_responses(environments, tmp_path, opdctl):
    """By part. The seconds of tools differ, and nothing else."""
    marker = tmp_path / "marker"
    command = [sys.executable, "-m", "opdctl", "train", *settings("die_once", "rollout.num_parts=2")]
    command += ["--output", str(tmp_path / "killed")]
    environment = {**os.environ, "AGENT_MARKER": str(marker)}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert first.returncode == 9, first.stderr
    done = list((tmp_path / "killed" / "step-00000" / "rollout").glob("part-*.receipt.json"))
    assert len(done) == 1
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    undisturbed = tmp_path / "undisturbed"
    third = subprocess.run([*command[:-1], str(undisturbed)], env=environment, capture_output=True, timeout=600)
    assert third.returncode == 0
    weights = [run / "student" / "step-00002" / "model.safetensors" for run in (tmp_path / "killed", undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("function", ["hang", "hang_in_pool"])
def test_signal_ends_a_command_whose_episodes_hang(environments, tmp_path, function):
    command = [sys.executable, "-m", "opdctl", "rollout", *settings(function), "--output", str(tmp_path / "run")]
    marker = tmp_path / "marker"
    process = subprocess.Popen(command, env={**os.environ, "AGENT_MARKER": str(marker)}, stderr=subprocess.PIPE)
    while not marker.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert b"Stopped by SIGTERM" in err


def test_two_workers_share_the_parts(environments, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "opdctl",
        "rollout",
        *settings("play", "rollout.num_parts=4"),
        "--output",
        str(run),
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len({row.sample_id for row in read_rollout(run)}) == 8


def test_plan_names_the_environment(environments, tmp_path, opdctl):
    result = opdctl("train", *settings("play"), "--dry-run", "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert "agent_environments:play" in result.out
    assert "agent_environments" not in sys.modules
