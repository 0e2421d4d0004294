"""Continuations of the student's prefixes: parts, grades, resuming, states and errors, by the command."""

import shutil

import numpy as np
import pytest
from helpers.commands import QUICKSTART, invoke, sets

from opdctl.analysis import continuations
from opdctl.artifacts.files import read_json
from opdctl.artifacts.leases import Lease
from opdctl.artifacts.records import GradedResponse, Response
from opdctl.artifacts.stage_dir import recorded_stage
from opdctl.artifacts.tables import read_rows
from opdctl.data.toy import sort12
from opdctl.runs.run import Run

OVERRIDES = ("rollout.prompts_per_step=6", "continuations.responses=4", "continuations.samples=2")
MODELS = ("student", "teacher")


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A run with one scored step and its continuations, and the result of the command."""
    path = tmp_path_factory.mktemp("continuations") / "run"
    for command in ("rollout", "score-teacher"):
        assert invoke(command, "--recipe", QUICKSTART, *sets(*OVERRIDES), "--output", path).code == 0
    result = invoke("run", "continuations", path, "--json")
    assert result.code == 0, result.err
    return path, result


@pytest.fixture
def copy(continued, tmp_path):
    """A copy of the run, and the folder of its continuations."""
    shutil.copytree(continued[0], tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / "continuations" / "step-00000"


def parts_of(folder) -> dict[str, bytes]:
    return {str(part.relative_to(folder)): part.read_bytes() for part in sorted(folder.glob("*/part-*"))}


def test_student_and_teacher_continue_every_prefix(continued):
    _, result = continued
    summary = result.json()["summary"]
    assert (summary["step"], summary["bench"], summary["responses"]) == (0, "sort12", 4)
    assert [(row["model"], row["percent"]) for row in summary["accuracy"]] == [
        (model, percent) for model in MODELS for percent in range(0, 100, 10)
    ]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in summary["accuracy"])
    assert summary["accuracy"][10]["accuracy"] > 0.7  # the teacher from an empty prefix: 99% on average
    assert result.json()["parts_made"] == 4


def test_report_shows_continuations(copy):
    path, _ = copy
    result = invoke("analyze-position", path, "--json")
    assert result.code == 0, result.err
    (summary,) = result.json()["summary"]["continuations"]
    assert summary["accuracy"]
    assert (path / "analysis" / "figures" / "continuations.svg").exists()
    assert (path / "analysis" / "tables" / "continuations.csv").exists()


def test_each_row_continues_a_prefix_of_a_stored_response(continued):
    run = Run.load(continued[0])
    responses = {
        row.sample_id: row for part in range(2) for row in read_rows(run.rollout_stage(0).verify(part), Response)
    }
    decode = run.student.tokenizer.decode
    for name in MODELS:
        stage = recorded_stage(continuations.continuations_path(run, 0) / name, "opdctl run continuations")
        rows = stage.read_all(GradedResponse)
        assert len({row.sample_id for row in rows}) == len(rows) == 4 * 10 * 2
        for row in rows:
            sample_id, percent, _ = row.sample_id.rsplit("/", 2)
            response_ids = responses[sample_id].response_ids
            prefix = response_ids[: len(response_ids) * int(percent) // 100]
            assert row.text == decode(np.concatenate([prefix, row.response_ids]), skip_special_tokens=True)
            assert row.correct == (sort12.extract(row.text) == responses[sample_id].answer == row.gold)
        assert len({row.response_ids.tobytes() for row in rows if "/0/" in row.sample_id}) > 1  # samples differ


def test_removed_continuations_are_regenerated_identically(copy):
    path, folder = copy
    summary, parts = read_json(folder / "summary.json"), parts_of(folder)
    shutil.rmtree(folder)
    result = invoke("run", "continuations", path, "--json")
    assert result.code == 0, result.err
    assert result.json()["parts_made"] == 4
    assert parts_of(folder) == parts
    assert read_json(folder / "summary.json") == summary


def states(path, *options):
    """Return the states of the continuations by model, and the result of `status`."""
    result = invoke("status", path, "--json", *options)
    rows = result.json()["continuations"]
    assert [(row["step"], row["stage"]) for row in rows] == [(0, f"continuations by {name}") for name in MODELS]
    return [row["state"] for row in rows], result


def test_workers_share_the_parts(copy):
    path, folder = copy
    summary, parts = read_json(folder / "summary.json"), parts_of(folder)
    shutil.rmtree(folder)
    leases = [Lease(folder, f"{name}-part-00000") for name in MODELS]  # of another worker
    assert all(lease.acquire() for lease in leases)
    first = invoke("run", "continuations", path, "--json")
    assert first.code == 0, first.err
    assert (first.json()["parts_made"], first.json()["summary"]) == (2, None)
    assert not (folder / "summary.json").exists()
    found, result = states(path, "--verify")
    assert (found, result.code) == (["partial", "partial"], 0)
    assert "step 0 continuations by student  partial  1 of 2 parts" in result.err
    for lease in leases:
        lease.release()
    second = invoke("run", "continuations", path, "--json")
    assert second.json()["parts_made"] == 2
    assert parts_of(folder) == parts
    assert read_json(folder / "summary.json") == summary


def test_states_of_finished_corrupt_and_missing_parts(copy):
    path, folder = copy
    found, result = states(path, "--verify")
    assert (found, result.code) == (["done", "done"], 0)
    assert "step 0 continuations by teacher  done  2 parts" in result.err
    part = next((folder / "teacher").glob("part-00001*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert states(path)[0] == ["done", "done"]
    found, result = states(path, "--verify")
    assert (found, result.code) == (["done", "corrupt"], 3)
    assert str(part) in "".join(result.err.split())
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "teacher")
    assert states(path)[0] == ["done", "missing"]


def test_corrupt_part_is_repaired(copy):
    path, folder = copy
    part = next((folder / "teacher").glob("part-00001*"))
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"x")
    assert invoke("run", "repair", path).code == 0
    assert not part.exists()
    assert invoke("run", "continuations", path, "--json").json()["parts_made"] == 1
    assert part.read_bytes() == content


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_other_settings_are_rejected(continued):
    result = invoke("run", "continuations", continued[0], "--set", "continuations.responses=5")
    assert (result.code, result.kind) == (4, "settings_mismatch")
    assert "continuations.responses 4 → 5" in result.err


def test_dry_run_reports_the_number_of_continuations(continued):
    result = invoke("run", "continuations", continued[0], "--dry-run")
    assert result.code == 0
    assert "by student, teacher: 160, of prefixes of 4 responses" in result.err


def test_step_without_a_rollout_is_rejected(continued):
    result = invoke("run", "continuations", continued[0], "--step", "1")
    assert result.code == 2
    assert result.kind == "missing_checkpoint"


def test_prompts_without_answers_are_rejected(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abcdefghijkl?"}\n')
    overrides = (f"prompts.source={tmp_path / 'prompts.jsonl'}", "prompts.limit=1", "rollout.prompts_per_step=1")
    arguments = ("--recipe", QUICKSTART, *sets(*overrides, "rollout.num_parts=1"), "--output", tmp_path / "run")
    assert invoke("rollout", *arguments).code == 0
    result = invoke("run", "continuations", tmp_path / "run")
    assert (result.code, result.kind) == (3, "invalid_data")
    assert "prompts.answer_column" in result.err
