import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import rewrite_json

from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.run import Run
from opdctl.runs.status import RunStatus, collect_status, protocol_differences


def status(path: Path, *, verify: bool = False) -> RunStatus:
    return collect_status(Run.load(path), verify=verify)


def states(found: RunStatus) -> dict[tuple[int | None, str], str]:
    each = (*found.stages, *found.continuations, *found.evaluations)
    return {(stage.step, stage.stage): stage.state for stage in each}


def other_than_done(path: Path, *, verify: bool = True) -> dict[tuple[int | None, str], str]:
    return {stage: state for stage, state in states(status(path, verify=verify)).items() if state != "done"}


def part(path: Path, stage: str) -> Path:
    return sorted((path / stage).glob("part-*"))[0]


@pytest.mark.parametrize("verify", [False, True])
def test_finished_run_is_done(finished_run, verify):
    found = status(finished_run, verify=verify)
    assert list(states(found)) == [
        *((step, stage) for step in (0, 1) for stage in ("rollout", "teacher", "update")),
        *((None, f"eval sort12 {name}") for name in ("step-00000", "step-00001", "step-00002", "teacher")),
    ]
    assert set(states(found).values()) == {"done"}
    assert not found.is_corrupt
    assert [summary["model"] for summary in found.summaries] == ["step-00000", "step-00001", "step-00002", "teacher"]
    assert found.next_command() == f"opdctl analyze-position {finished_run}"


def test_json_has_the_states_and_the_next_command(finished_run):
    value = json.loads(json.dumps(status(finished_run).as_dict()))
    assert (value["run_dir"], value["start_step"], value["steps_done"], value["steps"]) == (str(finished_run), 0, 2, 2)
    assert set(value) >= {"stages", "continuations", "evaluations", "heartbeats", "summaries", "forked_from", "next"}
    assert value["stages"][0] == {"step": 0, "stage": "rollout", "state": "done", "detail": "2 parts"}
    assert value["forked_from"] is None


def test_unfinished_stages_are_partial_or_missing(finished_copy):
    (finished_copy / "step-00001/update.json").unlink()
    part(finished_copy, "step-00001/teacher").unlink()
    for path in (finished_copy / "eval/sort12/step-00002").glob("part-*"):
        path.unlink()
    assert other_than_done(finished_copy) == {
        (1, "teacher"): "partial",
        (1, "update"): "missing",
        (None, "eval sort12 step-00002"): "missing",
    }
    (finished_copy / "step-00001/rollout/manifest.json").unlink()
    found = status(finished_copy)
    assert states(found)[1, "rollout"] == "missing"  # its parts have no receipts
    assert states(found)[1, "teacher"] == "missing"
    assert found.next_command() == f"opdctl rollout {finished_copy}"


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("step-00000/rollout", (0, "rollout")),
        ("step-00001/teacher", (1, "teacher")),
        ("eval/sort12/teacher", (None, "eval sort12 teacher")),
    ],
)
def test_corrupt_part(finished_copy, stage, key):
    path = part(finished_copy, stage)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert other_than_done(finished_copy, verify=False) == {}  # of the same size
    assert other_than_done(finished_copy) == {key: "corrupt"}
    path.write_bytes(data[:-1])
    found = status(finished_copy)
    assert found.is_corrupt
    assert {stage for stage, state in states(found).items() if state == "corrupt"} == {key}
    assert found.next_command() == f"opdctl run repair {finished_copy}"


@pytest.mark.parametrize("directory", ["student/step-00001", "student/step-00002", "trainer/step-00001"])
def test_corrupt_state_of_an_update(finished_copy, directory):
    path = next((finished_copy / directory).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert other_than_done(finished_copy, verify=False) == {}
    assert other_than_done(finished_copy) == {(int(directory[-1]) - 1, "update"): "corrupt"}


def test_missing_newest_student_is_written_by_train(finished_copy):
    shutil.rmtree(finished_copy / "student/step-00002")
    found = status(finished_copy)
    assert states(found)[1, "update"] == "corrupt"
    assert found.next_command() == f"opdctl train {finished_copy}"


def test_pruned_student_is_done(finished_copy):
    shutil.rmtree(finished_copy / "student/step-00001")
    found = status(finished_copy, verify=True)
    assert not found.is_corrupt
    assert [stage.detail for stage in found.stages if (stage.step, stage.stage) == (0, "update")] == ["student pruned"]


def test_update_of_other_inputs_is_corrupt(finished_copy):
    path = finished_copy / "step-00001/update.json"
    rewrite_json(path, inputs={**json.loads(path.read_text())["inputs"], "rollout": "0" * 64})
    assert other_than_done(finished_copy, verify=False) == {}
    assert other_than_done(finished_copy) == {(1, "update"): "corrupt"}


@pytest.mark.parametrize("name", ["prompts.parquet", "eval/sort12/teacher/summary.json"])
def test_corrupt_prompts_and_summaries_are_errors(finished_copy, name):
    path = finished_copy / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OpdctlError) as caught:
        status(finished_copy, verify=True)
    assert caught.value.code == ExitCode.BAD_DATA
    assert str(path) in caught.value.message


def test_plugin_that_changed_since_is_no_damage(finished_copy):
    path = finished_copy / "step-00001/update.json"
    rewrite_json(path, inputs={**json.loads(path.read_text())["inputs"], "plugin mine": "0" * 64})
    assert other_than_done(finished_copy) == {}


def test_status_only_reads(finished_copy):
    before = {path: path.stat().st_mtime_ns for path in finished_copy.rglob("*")}
    status(finished_copy, verify=True)
    assert {path: path.stat().st_mtime_ns for path in finished_copy.rglob("*")} == before


def test_evaluations_under_different_protocols_are_told_apart() -> None:
    protocols = [{"temperature": 1.0, "samples": 4}, {"temperature": 0.5, "samples": 4}, {"samples": 4}]
    summaries = [{"bench": "a", "protocol": each} for each in protocols]
    assert protocol_differences(summaries) == ["temperature 1.0", "temperature 0.5", ""]
    assert protocol_differences([*summaries[:1], {"bench": "b", "protocol": protocols[1]}]) == ["", ""]
