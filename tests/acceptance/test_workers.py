"""Several workers on one stage, the parity gate, and what tells trainer and engine apart."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets

from opdctl.artifacts import leases
from opdctl.artifacts.records import TokenScores
from opdctl.artifacts.stage_dir import WorkerShard
from opdctl.cli.session import resolve_shard
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.load import load_recipe
from opdctl.registry import ENGINES
from opdctl.runs.run import load_run
from opdctl.training.metrics import mismatch_metrics

PARTS = sets("rollout.num_parts=4", "train.steps=1")


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*") if "receipt" not in path.name}


def test_shards_make_the_parts_of_one_worker_bit_for_bit_in_any_order(tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert invoke("train", "--recipe", QUICKSTART, *PARTS, "--output", whole).code == 0
    for command in ("rollout", "score-teacher"):
        for shard in ("2/3", "0/3", "1/3"):
            folder = output / "step-00000" / ("rollout" if command == "rollout" else "teacher")
            assert not (folder / "manifest.json").exists()
            result = invoke(command, "--recipe", QUICKSTART, *PARTS, "--output", output, "--shard", shard, "--json")
            assert result.code == 0, result.err
            assert result.json()["parts_made"] == (2 if shard == "0/3" else 1)
    for stage in ("rollout", "teacher"):
        assert parts(output / "step-00000" / stage) == parts(whole / "step-00000" / stage)
    assert invoke("train", "--no-fill", "--output", output).code == 0
    student = "student/step-00001/model.safetensors"
    assert (output / student).read_bytes() == (whole / student).read_bytes()


def test_a_part_that_another_worker_has_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    common = ["--recipe", QUICKSTART, *PARTS, "--output", tmp_path / "run"]
    assert invoke("rollout", *common, "--shard", "0/4").code == 0
    with leases.hold_lease(tmp_path / "run" / "step-00000", "rollout-part-00001"):
        result = invoke("rollout", *common, "--json")
        assert result.code == 0, result.err
        assert result.json()["parts_made"] == 2
        assert "3 of 4 parts are there; others are at work on the rest" in result.err
    result = invoke("rollout", *common, "--json")
    assert result.json()["parts_made"] == 1
    assert result.json()["parts"] == 4


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_shard_that_makes_no_sense_is_refused(text):
    with pytest.raises(OpdctlError, match="must read I/N"):
        resolve_shard(text)


def test_slurm_s_array_is_a_shard(monkeypatch):
    assert resolve_shard(None) == WorkerShard(0, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert resolve_shard(None) == WorkerShard(2, 4)
    assert resolve_shard("0/2") == WorkerShard(0, 2)


SBATCH = """#!/usr/bin/env bash
# Runs what it is given, as Slurm would, each task of an array after the other.
count=1
for word in "$@"; do case $word in --array=0-*) count=$(( ${word#--array=0-} + 1 ));; esac; done
for ((task = 0; task < count; task++)); do
  SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_COUNT=$count bash -c "${@: -1}" >&2
done
echo "$RANDOM;cluster"
"""


def test_the_chain_of_slurm_jobs_makes_the_student_of_one_process(tmp_path):
    """The script itself, with a stand-in for sbatch that runs each job at once."""
    script = QUICKSTART.parent.parent / "docs/slurm/chain.sh"
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "opdctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m opdctl "$@"\n')
    for name in ("sbatch", "opdctl"):
        (tmp_path / name).chmod(0o755)
    small = load_recipe([QUICKSTART], [o for o in PARTS if o != "--set"] + ["train.steps=2"])
    (tmp_path / "small.toml").write_text(small.to_toml())
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "WORKERS": "2"}
    command = ["bash", script, "small.toml", "run", "0", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "shard 1/2, by Slurm's array" in done.stderr
    assert invoke("train", "--recipe", tmp_path / "small.toml", "--output", tmp_path / "whole").code == 0
    student = "student/step-00002/model.safetensors"
    assert (tmp_path / "run" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()


def test_slurm_s_jobs_that_stay_go_back_into_the_queue_and_make_the_same_student(tmp_path):
    """The script itself; sbatch only notes the jobs, which run here, and one gets the signal before its time limit."""
    script = QUICKSTART.parent.parent / "docs/slurm/follow.sh"
    sbatch = 'for i; do [[ $i == *.sh ]] && break; shift; done; echo "$@" >> jobs'
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{sbatch}\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" >> requeued\n')
    (tmp_path / "opdctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m opdctl "$@"\n')
    for name in ("sbatch", "scontrol", "opdctl"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "small.toml").write_text(load_recipe([QUICKSTART], [*PARTS[1::2], "train.steps=2"]).to_toml())
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    subprocess.run(["bash", script, "small.toml", "run"], cwd=tmp_path, env=environment, check=True)
    lines = (tmp_path / "jobs").read_text().splitlines()
    assert [line.split()[3] for line in lines] == ["rollout", "score-teacher", "train"]

    def start(line: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["bash", *line.split()], cwd=tmp_path, env=environment)

    jobs = [start(line) for line in lines]
    heard = tmp_path / "run/followers"
    while not list(heard.glob("score-teacher-*")):
        assert jobs[1].poll() is None
        time.sleep(0.05)
    jobs[1].send_signal(signal.SIGUSR1)
    assert jobs[1].wait() == ExitCode.REQUEUE
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    jobs[1] = start(lines[1])
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert invoke("train", "--recipe", tmp_path / "small.toml", "--output", tmp_path / "whole").code == 0
    student = "student/step-00002/model.safetensors"
    assert (tmp_path / "run" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()


# ── The parity gate ──────────────────────────────────────────────────────────────────────────────────────────────────


class Biased(TransformersEngine):
    """An engine whose log-probs are 0.1 nat off."""

    def score(self, *arguments):
        return [TokenScores(found.logprobs - np.float32(0.1)) for found in super().score(*arguments)]


@pytest.fixture
def biased():
    ENGINES.register("biased")(lambda model, place: Biased(model, place.device))
    yield
    del ENGINES._factories["biased"]


@pytest.mark.parametrize(("bound", "code"), [(0.05, ExitCode.BAD_DATA), (0.2, 0), (0, 0)])
def test_an_engine_that_is_off_is_stopped_by_the_bound_before_it_writes(biased, tmp_path, bound, code):
    overrides = sets("score.engine=biased", f"pipeline.max_logprob_rms={bound}", "train.steps=1")
    result = invoke("train", "--recipe", QUICKSTART, *overrides, "--output", tmp_path / "run")
    assert result.code == code, result.err
    assert ("RMS 0.1, max 0.1 nats" in result.err) == (bound > 0)
    if code:
        assert "0.1 nats RMS from the trainer's, pipeline.max_logprob_rms is 0.05" in result.err
        assert not parts(tmp_path / "run/step-00000/teacher")


# ── Trainer and engine ───────────────────────────────────────────────────────────────────────────────────────────────


def test_mismatch_by_hand():
    # the trainer twice, once and half as sure: ratios 2, 1, 1/2; k3: 2 - 1 - log 2, 0, 1/2 - 1 + log 2
    found = mismatch_metrics(torch.tensor([math.log(2), 0.0, -math.log(2)]))
    assert found["mismatch_ratio"].tolist() == pytest.approx([2, 1, 0.5])
    assert found["mismatch_kl"].tolist() == pytest.approx([1 - math.log(2), 0, math.log(2) - 0.5], abs=1e-6)


def test_each_step_tells_how_far_the_engine_is_from_the_trainer(tmp_path):
    assert invoke("train", "--recipe", QUICKSTART, *PARTS, "--output", tmp_path / "run").code == 0
    metrics = load_run(tmp_path / "run").update(0)["metrics"]
    assert metrics["mismatch_ratio"] == pytest.approx(1, abs=1e-4)
    assert 0 <= metrics["mismatch_kl"] < 1e-6
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert "rollout_correction_squared" not in metrics


def test_workers_that_begin_a_run_at_the_same_time_do_not_disturb_one_another(tmp_path):
    common = ["--recipe", str(QUICKSTART), *PARTS, "--output", str(tmp_path / "run"), "--json"]
    command = [sys.executable, "-m", "opdctl", "rollout", *common]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    made = 0
    for worker in workers:
        out, said = worker.communicate()
        assert worker.returncode == 0, said
        made += json.loads(out)["parts_made"]
    assert made == 4  # each once
    assert (tmp_path / "run/step-00000/rollout/manifest.json").exists()
    assert not list((tmp_path / "run").rglob("*.lock"))
    assert invoke("status", tmp_path / "run", "--verify").code == 0
