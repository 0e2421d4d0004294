import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import contents, rewrite_json

from opdctl.artifacts import files
from opdctl.errors import OpdctlError
from opdctl.runs.fork import create_fork, plan_fork
from opdctl.runs.repair import find_corrupt_artifacts, set_aside
from opdctl.runs.run import Run, read_recipe
from opdctl.runs.status import collect_status


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def first(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern))[0]


ROLLOUT, SCORE = "step-00000/rollout/part-*", "step-00001/teacher/part-*"
DAMAGES = {
    ROLLOUT: "opdctl rollout {run} --step 0",
    SCORE: "opdctl score-teacher {run} --step 1 --only teacher",
    "step-00001/rollout/manifest.json": "opdctl rollout {run} --step 1",
    "step-00000/teacher/manifest.json": "opdctl score-teacher {run} --step 0 --only teacher",
    "eval/*/step-00002/part-*": "opdctl eval {run} --bench sort12 --step 2",
    "eval/*/teacher/manifest.json": "opdctl eval {run} --bench sort12 --model teacher",
    "step-00001/update.json": "opdctl train {run}",
    "step-00000/update.json": None,
    "student/step-00002/model.safetensors": "opdctl train {run}",
    "trainer/step-00001/*.safetensors": "opdctl train {run}",
    "trainer/step-00002/*.safetensors": "opdctl train {run}",
    "trainer/step-00002/digests.json": "opdctl train {run}",
    "student/step-00001/model.safetensors": None,
}


def artifact_path(path: Path) -> Path:
    """Return what is set aside: of students and trainer states the directory."""
    return path.parent if path.parts[-3] in ("student", "trainer") else path


@pytest.mark.parametrize("pattern", DAMAGES)
def test_corrupt_artifact_is_listed_with_its_command_and_set_aside(finished_copy, pattern):
    run, path = Run.load(finished_copy), first(finished_copy, pattern)
    flip(path)
    assert collect_status(run, verify=True).is_corrupt
    (artifact,) = find_corrupt_artifacts(run)
    assert artifact.path == artifact_path(path)
    assert str(artifact.path) in artifact.why
    assert artifact.command == (DAMAGES[pattern] and DAMAGES[pattern].format(run=finished_copy))
    assert not artifact.is_required
    damaged = contents(finished_copy)
    (moved,) = set_aside(run, [artifact])
    assert moved == finished_copy / "corrupt" / artifact.path.relative_to(finished_copy)
    assert not artifact.path.exists()
    assert {name.removeprefix("corrupt/"): data for name, data in contents(finished_copy).items()} == damaged
    assert find_corrupt_artifacts(run) == []


def test_intact_run_has_no_corrupt_artifacts(finished_run):
    assert find_corrupt_artifacts(Run.load(finished_run)) == []


@pytest.mark.parametrize("pattern", [ROLLOUT, SCORE, "student/step-00002/model.safetensors"])
def test_missing_artifact_is_not_listed(finished_copy, pattern):
    path = artifact_path(first(finished_copy, pattern))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert find_corrupt_artifacts(Run.load(finished_copy)) == []


@pytest.mark.parametrize("pattern", [ROLLOUT, "step-00001/rollout/manifest.json"])
def test_rollout_of_a_pruned_student_is_required(finished_copy, pattern):
    path = first(finished_copy, pattern.replace("step-00000", "step-00001"))
    flip(path)
    shutil.rmtree(finished_copy / "student/step-00001")
    run, before = Run.load(finished_copy), contents(finished_copy)
    (artifact,) = find_corrupt_artifacts(run)
    assert (artifact.path, artifact.command, artifact.is_required) == (path, None, True)
    assert set_aside(run, [artifact]) == []
    assert contents(finished_copy) == before


def test_scores_of_a_pruned_student_are_regenerated(finished_copy):
    flip(first(finished_copy, SCORE))
    shutil.rmtree(finished_copy / "student/step-00001")
    (artifact,) = find_corrupt_artifacts(Run.load(finished_copy))
    assert artifact.command is not None


def test_symbolic_link_is_set_aside_itself(finished_copy, tmp_path):
    path = first(finished_copy, ROLLOUT)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    run = Run.load(finished_copy, "repair")
    (artifact,) = find_corrupt_artifacts(run)
    (moved,) = set_aside(run, [artifact])
    assert moved.is_symlink()
    assert not path.is_symlink()
    assert (tmp_path / "elsewhere").exists()


def test_second_repair_replaces_what_the_first_set_aside(finished_copy):
    run, path = Run.load(finished_copy), first(finished_copy, ROLLOUT)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-2]):
        path.write_bytes(damaged)
        set_aside(run, find_corrupt_artifacts(run))
        assert (finished_copy / "corrupt" / path.relative_to(finished_copy)).read_bytes() == damaged


@pytest.mark.parametrize("name", ["in_progress.json", "part-00001-of-00002.parquet.receipt.json"])
def test_corrupt_record_of_an_unfinished_stage_is_set_aside(finished_copy, name):
    run, path = Run.load(finished_copy), finished_copy / "step-00001/rollout"
    unfinish(path)
    assert run.rollout_stage(1).missing() == []
    flip(path / name)
    with pytest.raises(OpdctlError):
        run.rollout_stage(1).missing()
    (artifact,) = find_corrupt_artifacts(run)
    assert artifact.path == path / name
    set_aside(run, [artifact])
    assert run.rollout_stage(1).missing() == ([1] if "part" in name else [])


def unfinish(stage: Path) -> None:
    """Make a finished stage look as it does before its manifest is written."""
    manifest = json.loads((stage / "manifest.json").read_text())
    for part in manifest["parts"]:
        files.write_json(stage / f"{part['name']}.receipt.json", part)
    header = {key: value for key, value in manifest.items() if key not in ("parts", "digest")}
    files.write_json(stage / "in_progress.json", header)
    (stage / "manifest.json").unlink()


def test_newer_version_is_an_error_and_not_damage(finished_copy):
    rewrite_json(finished_copy / "step-00001/rollout/manifest.json", version=99)
    with pytest.raises(OpdctlError) as caught:
        find_corrupt_artifacts(Run.load(finished_copy))
    assert caught.value.kind == "unsupported_version"


@pytest.mark.parametrize("name", ["student/step-00002/model.safetensors", "trainer/step-00002"])
def test_start_of_a_fork_is_required(finished_run, tmp_path, name):
    run = Run.load(Path(shutil.copytree(finished_run, tmp_path / "run")))
    create_fork(plan_fork(run, tmp_path / "fork", read_recipe(run.path, ["weight.gamma=0.7", "train.steps=3"])))
    fork = Run.load(tmp_path / "fork")
    assert find_corrupt_artifacts(fork) == []
    assert not collect_status(fork, verify=True).is_corrupt
    path = fork.path / name
    path = first(fork.path, f"{name}/*.safetensors") if path.is_dir() else path
    path.write_bytes(path.read_bytes()[:-1])
    (artifact,) = find_corrupt_artifacts(fork)
    assert (artifact.path, artifact.command, artifact.is_required) == (path.parent, None, True)
    status = collect_status(fork, verify=True)
    assert status.is_corrupt
    assert [stage.stage for stage in status.stages if stage.state == "corrupt"] == ["start"]
    assert any(f"fork {run.path} again" in stage.detail for stage in status.stages)
