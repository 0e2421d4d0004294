"""Several workers on one stage: they run the same command and share the parts by leases, also as Slurm arrays."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, artifacts, contents, invoke, sets

from opdctl.artifacts import leases
from opdctl.errors import ExitCode
from opdctl.recipe.load import load_recipe

PARTS = sets("rollout.num_parts=4", "train.steps=1", "rollout.max_tokens=40")
STAGES = {"rollout": "rollout", "score-teacher": "teacher"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    path = tmp_path_factory.mktemp("whole") / "run"
    result = invoke("train", "--recipe", QUICKSTART, *PARTS, "--output", path)
    assert result.code == 0, result.err
    return path


def start_workers(count: int, command: str, output: Path) -> list[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "opdctl", command, "--recipe", str(QUICKSTART), *PARTS, "--output", str(output)]
    return [
        subprocess.Popen([*words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]


def parts_made(workers: list[subprocess.Popen[str]]) -> list[int]:
    """Wait for workers and return the number of parts that each made."""
    counts = []
    for worker in workers:
        out, err = worker.communicate()
        assert worker.returncode == 0, err
        counts.append(json.loads(out)["parts_made"])
    return counts


def test_concurrent_workers_create_a_run_and_make_each_part_once(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for command, stage in STAGES.items():
        assert sum(parts_made(start_workers(2, command, output))) == 4
        assert contents(output / "step-00000" / stage) == contents(whole / "step-00000" / stage)
    assert not list(output.rglob("*.lock"))
    assert invoke("train", "--no-fill", "--output", output).code == 0
    assert artifacts(output) == artifacts(whole)
    assert invoke("status", output, "--verify").code == 0


@pytest.mark.parametrize("command", STAGES)
def test_part_of_another_worker_is_left_to_it(tmp_path: Path, monkeypatch, command: str) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    common = ["--recipe", QUICKSTART, *PARTS, "--output", tmp_path / "run"]
    assert invoke("rollout", *common).code == 0
    if command == "rollout":
        shutil.rmtree(tmp_path / "run/step-00000")
    with leases.hold_lease(tmp_path / "run" / "step-00000", f"{STAGES[command]}-part-00001"):
        result = invoke(command, *common, "--json")
        assert result.code == 0, result.err
        assert (result.json()["parts_made"], result.json()["parts"]) == (3, 0)
        assert "3 of 4 parts" in result.err
        again = invoke(command, *common, "--json")
        assert again.json()["parts_made"] == 0
    result = invoke(command, *common, "--json")
    assert (result.json()["parts_made"], result.json()["parts"]) == (1, 4)


def test_part_of_a_killed_worker_is_made_by_the_others(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    workers = start_workers(2, "rollout", output)
    end = time.monotonic() + 120
    while not list((output / "step-00000").glob(".rollout-part-*.lock")):
        assert time.monotonic() < end
        time.sleep(0.005)
    workers[0].kill()
    workers[0].communicate()
    parts_made(workers[1:])
    assert invoke("rollout", "--output", output).code == 0  # makes what the killed worker claimed last
    assert contents(output / "step-00000/rollout") == contents(whole / "step-00000/rollout")


SBATCH = """#!/usr/bin/env bash
# Runs the job as Slurm would: all tasks of an array at the same time.
count=1
for word in "$@"; do case $word in --array=0-*) count=$(( ${word#--array=0-} + 1 ));; esac; done
for ((task = 0; task < count; task++)); do
  SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_COUNT=$count bash -c "${@: -1}" >&2 &
done
for job in $(jobs -p); do wait "$job" || exit 1; done
echo "$RANDOM;cluster"
"""


def test_chain_of_slurm_jobs_makes_the_student_of_one_process(tmp_path: Path) -> None:
    """The script itself, with a replacement of sbatch that runs each job at once."""
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
    assert invoke("train", "--recipe", tmp_path / "small.toml", "--output", tmp_path / "whole").code == 0
    student = "student/step-00002/model.safetensors"
    assert (tmp_path / "run" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()


def test_following_slurm_jobs_are_requeued_and_make_the_same_student(tmp_path: Path) -> None:
    """The script itself: sbatch only records the jobs, which run here; one gets the signal before its time limit."""
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
    while not list((tmp_path / "run/heartbeats").glob("score-teacher-*")):
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
