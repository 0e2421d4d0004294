"""`opdctl run prune`, and what training keeps: a run can be read and continued as before."""

import os
import shutil
from pathlib import Path

import pytest
from helpers.commands import contents, invoke, names

from opdctl.artifacts import leases
from opdctl.errors import ExitCode
from opdctl.runs.heartbeats import StageHeartbeat
from opdctl.runs.run import Run

MORE = ("--set", "train.steps=3", "--set", "eval.every_steps=0")


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.fixture(scope="module")
def third_student(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The student after one more step."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("third") / "run"))
    assert invoke("train", "--output", run, *MORE).code == 0
    return (run / "student/step-00003/model.safetensors").read_bytes()


def test_pruned_run_is_read_and_continued(finished_copy: Path, third_student: bytes) -> None:
    run, sizes = finished_copy, {name: len(data) for name, data in contents(finished_copy).items()}
    result = invoke("run", "prune", run, "--no-keep-best", "--json")
    assert result.code == 0, result.err
    left = contents(run)
    assert sum(result.json()["bytes"].values()) == sum(size for name, size in sizes.items() if name not in left)
    assert set(result.json()["removed"]) == {
        *("step-00000/rollout", "step-00000/teacher", "student/step-00001", "trainer/step-00001")
    }
    status = invoke("status", run, "--verify", "--json")
    assert (status.code, status.json()["steps_done"], status.json()["removed_steps"]) == (0, 2, [0])
    assert "the responses of 1 of these, the last of them of step 0" in status.err + status.out
    assert invoke("run", "repair", run).code == 0
    assert contents(run) == left
    assert invoke("analyze-position", run).code == 0
    assert invoke("train", "--output", run, *MORE).code == 0
    assert (run / "student/step-00003/model.safetensors").read_bytes() == third_student


def test_dry_run_changes_nothing_and_the_best_student_stays(finished_copy: Path) -> None:
    """All students have the accuracy 0, so the first is the best: it is the initial one."""
    run, before = finished_copy, contents(finished_copy)
    shutil.rmtree(run / "eval/sort12/step-00000")
    before = contents(run)
    planned = invoke("run", "prune", run, "--dry-run", "--json")
    assert (planned.code, contents(run)) == (0, before)
    assert planned.json()["kept_students"] == [1, 2]
    assert "student/step-00001" not in planned.json()["removed"]
    assert invoke("run", "prune", run, "--json").json()["removed"] == planned.json()["removed"]
    assert steps(run / "student") == ["step-00001", "step-00002"]
    assert invoke("run", "prune", run, "--json").json()["removed"] == []


def test_responses_since_the_newest_trainer_state_stay(finished_copy: Path, third_student: bytes) -> None:
    run = finished_copy
    shutil.rmtree(run / "trainer/step-00002")
    assert "step-00001/rollout" not in invoke("run", "prune", run, "--json").json()["removed"]
    assert steps(run / "trainer") == ["step-00001"]
    assert invoke("train", "--output", run, *MORE).code == 0
    assert (run / "student/step-00003/model.safetensors").read_bytes() == third_student


def test_lost_trainer_state_of_a_pruned_run_is_one_error(finished_copy: Path) -> None:
    run = finished_copy
    assert invoke("run", "prune", run).code == 0
    shutil.rmtree(run / "trainer")
    result = invoke("train", "--output", run, *MORE)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert str(run / "step-00000") in result.err


@pytest.mark.parametrize("name", ["student/step-00002", "trainer/step-00002"])
def test_nothing_is_removed_if_the_newest_state_is_corrupt(finished_copy: Path, name: str) -> None:
    run = finished_copy
    next((run / name).glob("*.safetensors")).write_bytes(b"")
    before = names(run)
    result = invoke("run", "prune", run)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert names(run) == before


def test_nothing_is_removed_while_another_process_trains(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_copy
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    with leases.hold_lease(run, "train"):
        before = names(run)
        result = invoke("run", "prune", run)
        assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "lease_held")
        assert names(run) == before


@pytest.mark.parametrize("directory", ["step-00000", "eval/sort12", "continuations/step-00000"])
def test_step_that_a_worker_uses_stays(finished_copy: Path, directory: str) -> None:
    """The worker scores the step's responses, evaluates its student, or continues its prefixes."""
    run, before = finished_copy, names(finished_copy)
    (run / directory).mkdir(parents=True, exist_ok=True)
    name = "step-00000-part-00000" if directory == "eval/sort12" else "teacher-part-00000"
    with leases.hold_lease(run / directory, name):
        planned = invoke("run", "prune", run, "--no-keep-best", "--dry-run", "--json").json()
        result = invoke("run", "prune", run, "--no-keep-best", "--json")
    assert (result.code, result.json()["removed"]) == (0, planned["removed"])
    assert result.json()["in_use"] == [0]
    assert f"step 0 is in use by process {os.getpid()} on " in result.err
    assert set(result.json()["removed"]) == {"student/step-00001", "trainer/step-00001"}
    assert {name for name in before if name.startswith("step-")} <= set(names(run))
    assert "step-00000/rollout" in invoke("run", "prune", run, "--json").json()["removed"]


def test_steps_from_that_of_a_follower_on_stay(finished_copy: Path) -> None:
    run = finished_copy
    follower = StageHeartbeat(Run.load(run), "score-teacher")
    follower._step = 0
    follower.start()
    result = invoke("run", "prune", run, "--no-keep-best", "--json")
    assert result.json()["in_use"] == [0, 1]
    assert "step 1 is in use by `score-teacher --follow`, process " in result.err
    assert result.json()["removed"] == ["trainer/step-00001"]
    heartbeat = next(run.glob("heartbeats/*.json"))
    old = heartbeat.stat().st_mtime - leases.LEASE_SECONDS
    os.utime(heartbeat, (old, old))  # it ended without a word
    assert "student/step-00001" in invoke("run", "prune", run, "--no-keep-best", "--json").json()["removed"]
    follower.stop()


def test_students_that_were_evaluated_or_kept_by_earlier_settings_stay(finished_copy: Path) -> None:
    """The run kept 9 students and evaluated each; now only the latest is kept, and none is evaluated."""
    run = finished_copy
    shutil.rmtree(run / "eval/sort12/step-00001")
    shutil.rmtree(run / "eval/sort12/step-00000")
    settings = ("train.steps=4", "train.keep_latest=1", "eval.every_steps=0")
    result = invoke("train", "--output", run, *(word for each in settings for word in ("--set", each)))
    assert result.code == 0, result.err
    # 1 was kept by earlier settings, 2 was evaluated, 3 has left the window, 4 is the latest.
    assert steps(run / "student") == ["step-00001", "step-00002", "step-00004"]
    assert steps(run / "trainer") == ["step-00001", "step-00004"]


def test_newest_student_stays_if_earlier_settings_keep_it(finished_copy: Path) -> None:
    assert invoke("train", "--output", finished_copy, "--set", "train.keep_every_steps=1").code == 0
    settings = ("train.steps=4", "train.keep_latest=1", "train.keep_every_steps=9", "eval.every_steps=0")
    shutil.rmtree(finished_copy / "eval")
    assert invoke("train", "--output", finished_copy, *(w for each in settings for w in ("--set", each))).code == 0
    assert steps(finished_copy / "student") == ["step-00001", "step-00002", "step-00004"]


# ── Settings that may change ─────────────────────────────────────────────────────────────────────────────────────────


def test_command_that_fails_and_other_stages_leave_the_recipe(finished_copy: Path) -> None:
    run = finished_copy
    before = contents(run)
    refused = invoke("rollout", "--output", run, "--set", "train.steps=3", "--step", 9)
    assert refused.code == ExitCode.USAGE
    assert invoke("score-teacher", "--output", run, "--set", "train.keep_latest=1", "--step", 1).code == 0
    assert contents(run) == before
    (run / "student/step-00002/model.safetensors").write_bytes(b"")
    before = contents(run)
    refused = invoke("train", "--output", run, *MORE)
    assert (refused.code, refused.kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert contents(run) == before


def test_training_reports_each_changed_setting(finished_copy: Path) -> None:
    result = invoke("train", "--output", finished_copy, "--set", "train.keep_latest=2")
    assert result.code == 0, result.err
    assert "train.keep_latest 9 → 2" in result.err
    assert "keep_latest = 2\n" in (finished_copy / "recipe.toml").read_text()
