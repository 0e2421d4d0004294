"""Kills, power cuts and errors at any call, and full and read-only disks (which need root)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import faults
from helpers.commands import QUICKSTART, ROOT, Result, artifacts, invoke, sets
from helpers.faults import power_cut, system_error

from opdctl.artifacts import files, leases
from opdctl.errors import ExitCode
from opdctl.pipeline import loop


@pytest.fixture(autouse=True)
def restored_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness shortens them."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", leases.LEASE_SECONDS)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", leases.HEARTBEAT_SECONDS)


def run_harness(folder: Path, name: str, *options: str) -> str:
    """Run a harness and return its summary.

    In a process of its own: the threads of other tests may hold locks that a forked worker would wait for.
    """
    command = [sys.executable, "-m", f"helpers.{name}", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = ("--steps", "2", "--set", "rollout.prompts_per_step=12")


def test_killed_workers_make_the_student_of_an_undisturbed_run(tmp_path: Path) -> None:
    summary = run_harness(tmp_path, "faults", "--kills", "4", *SMALL)
    assert summary.startswith("4 kills (")  # the time decides which stage is hit


def test_killed_workers_that_score_files_write_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    assert run_harness(tmp_path, "faults", "--files", "--kills", "3").startswith("3 kills of workers")


def test_double_signals_at_random_moments(tmp_path: Path) -> None:
    """Each ends with a signal's exit code; the run is that of an undisturbed one."""
    assert run_harness(tmp_path, "faults", "--signals", "3", *SMALL).startswith("3 double signals (")


def test_workers_that_sleep_at_random_moments_change_nothing(tmp_path: Path) -> None:
    assert run_harness(tmp_path, "sleeps", "--moments", "3", "--seed", "1").startswith("3 sleeps (")


@pytest.mark.parametrize(("fault", "start"), [(power_cut, 4), (system_error, 2)])
def test_rerun_after_a_fault_of_the_disk_ends_the_same(fault, start, tmp_path):
    """Every ninth call; the harness covers all calls."""
    assert "every rerun ended the same" in faults.fail_at_calls(tmp_path, fault, start, stride=9)


# ── Disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def fill(place: Path, left: int) -> Path:
    """Fill a disk up to `left` bytes."""
    ballast = place / "ballast"
    ballast.write_bytes(bytes(files.free_space(place) - left))
    return ballast


def train(output: Path, *overrides: str) -> Result:
    return invoke("train", "--recipe", QUICKSTART, *sets("rollout.max_tokens=40", *overrides), "--output", output)


def test_step_that_does_not_fit_is_refused_before_it_starts(disk: Path) -> None:
    assert train(disk / "run", "train.steps=1").code == 0
    ballast = fill(disk, 2**20)  # a student of 0.4 MiB and a state of 1.3 MiB need more
    result = train(disk / "run", "train.steps=2")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "disk_full")
    assert "1.7 MiB" in result.err
    assert not (disk / "run/step-00001").exists()
    ballast.unlink()
    assert train(disk / "run", "train.steps=2").code == 0


@pytest.mark.parametrize("left", [2**12, 2**14, 2**19, 2**20])
def test_full_disk_loses_no_finished_artifact(disk: Path, tmp_path: Path, monkeypatch, left: int) -> None:
    """The disk is full in the responses, the trainer state or the student; training resumes when there is space."""
    assert train(disk / "run", "train.steps=1").code == 0
    before = artifacts(disk / "run")
    fill(disk, left)
    monkeypatch.setattr(loop, "check_space", lambda run, stages: None)  # as if another process had filled the disk
    result = train(disk / "run", "train.steps=2", "train.keep_latest=9")
    assert result.code == ExitCode.UNAVAILABLE, result.err
    assert result.kind in ("disk_full", "failed_write")
    assert "no space left on" in result.err.lower()
    assert "Traceback" not in result.err
    assert not list(disk.rglob(".tmp-*"))
    found = artifacts(disk / "run")
    assert {name: found[name] for name in before} == before
    remount(disk, "size=32m")
    assert train(disk / "run", "train.steps=2", "train.keep_latest=9").code == 0
    assert train(tmp_path / "whole", "train.steps=1").code == 0
    assert train(tmp_path / "whole", "train.steps=2", "train.keep_latest=9").code == 0
    assert artifacts(disk / "run") == artifacts(tmp_path / "whole")


def test_status_works_on_a_read_only_disk_and_other_commands_report_it(disk: Path) -> None:
    assert train(disk / "run", "train.steps=1").code == 0
    remount(disk, "ro")
    assert invoke("status", disk / "run", "--verify").code == 0
    for command in (["train", "--set", "train.steps=2", "--output"], ["rollout", "--output"], ["analyze-position"]):
        result = invoke(*command, disk / "run")
        assert result.code in (0, ExitCode.UNAVAILABLE)
        assert "nothing to do" in result.err or "Read-only file system" in result.err, result.err
