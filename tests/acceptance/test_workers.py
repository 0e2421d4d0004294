"""Several workers on one stage: they run the same command and share the parts by leases."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, artifacts, contents, invoke, sets

from opdctl.artifacts import leases

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
