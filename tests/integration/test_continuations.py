"""Continuations of the student's prefixes: parts, grades, resuming, states and errors, by the command."""

import csv
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
    assert '<figure id="continuations"' in (path / "analysis" / "report.html").read_text()
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


def test_settings_that_equal_the_defaults_change_no_fingerprint(copy):
    """So continuations that were made before these keys existed are read and resumed."""
    path, folder = copy
    recorded = read_json(folder / "teacher" / "manifest.json")["settings"]
    assert {key for key in recorded if key.startswith("continuations.")} == {
        "continuations.responses",
        "continuations.samples",
    }
    assert invoke("run", "continuations", path, "--json").json()["parts_made"] == 0


def test_absolute_prefixes_and_a_budget(copy):
    path, folder = copy
    before = {name: rows_of(path, name) for name in MODELS}
    shutil.rmtree(folder)
    lengths = ("continuations.prefix_percents=[90,50]", "continuations.prefix_tokens=[0,8,120,100]")
    overrides = sets(*OVERRIDES, *lengths, "continuations.max_tokens=20")
    plan = invoke("run", "continuations", path, *overrides, "--dry-run")
    result = invoke("run", "continuations", path, *overrides, "--json")
    assert result.code == 0, result.err
    summary, run = result.json()["summary"], Run.load(path)
    rows = {name: rows_of(path, name) for name in MODELS}
    assert f": {sum(map(len, rows.values()))}, of prefixes of 4 responses, at most 20 tokens each" in plan.out
    responses = {row.sample_id: row.response_ids for row in run.rollout_stage(0).read_all(Response)}
    first = [responses[name] for name, _ in run.samples(0)[:4]]
    longer = {size: sum(len(ids) > size for ids in first) for size in (0, 8, 100, 120)}
    assert longer[0] == 4 > longer[120]  # otherwise the test shows nothing
    expected = [("percent", 50, 4), ("percent", 90, 4), *(("tokens", size, n) for size, n in longer.items() if n)]
    for name in MODELS:
        found = [row for row in summary["accuracy"] if row["model"] == name]
        places = [(unit, row[unit], row["responses"]) for row, (unit, _, _) in zip(found, expected, strict=True)]
        assert places == expected
        assert all((row["percent"] is None) != (row["tokens"] is None) for row in found)
        for row in rows[name].values():
            prefix = prefix_of(responses, row.sample_id)
            assert len(row.response_ids) == 20 if row.finish_reason == "length" else len(row.response_ids) <= 20
            assert row.text == run.student.tokenizer.decode([*prefix, *row.response_ids], skip_special_tokens=True)
        # The same prefix has the same random stream: a smaller budget only cuts the continuation.
        shared = rows[name].keys() & before[name].keys()
        assert len(shared) == 4 * 2 * 2
        for each in shared:
            assert rows[name][each].response_ids.tolist() == before[name][each].response_ids[:20].tolist()
    assert any(row["truncated_fraction"] > 0 for row in summary["accuracy"])
    assert summary["max_tokens"] == 20
    check_report_of_both_lengths(path)


def rows_of(path, name) -> dict[str, GradedResponse]:
    stage = recorded_stage(continuations.continuations_path(Run.load(path), 0) / name, "opdctl run continuations")
    return {row.sample_id: row for row in stage.read_all(GradedResponse)}


def prefix_of(responses, continuation_id) -> list[int]:
    """Return the ids of the prefix by the id of its continuation: PROMPT/STEP/SAMPLE/LENGTH/SAMPLE."""
    sample_id, label, _ = continuation_id.rsplit("/", 2)
    ids = responses[sample_id].tolist()
    return ids[: int(label.removesuffix("-tokens"))] if "tokens" in label else ids[: len(ids) * int(label) // 100]


def check_report_of_both_lengths(path) -> None:
    result = invoke("analyze-position", path)
    assert result.code == 0, result.err
    page = (path / "analysis/report.html").read_text()
    assert "prefix length (tokens)" in page
    with (path / "analysis/tables/continuations.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {(row["percent"], row["tokens"]) for row in table} >= {("50", ""), ("", "8")}
    assert "A continuation has at most 20 tokens." in page


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_other_settings_are_rejected(continued):
    result = invoke("run", "continuations", continued[0], "--set", "continuations.responses=5")
    assert (result.code, result.kind) == (4, "settings_mismatch")
    assert "continuations.responses 4 → 5" in result.err


def test_no_prefix_length_is_rejected(continued):
    result = invoke("run", "continuations", continued[0], "--set", "continuations.prefix_percents=[]")
    assert (result.code, result.kind) == (2, "invalid_recipe")
    assert "continuations.prefix_percents" in result.err


def test_prefixes_that_no_response_exceeds_are_rejected(copy):
    path, folder = copy
    shutil.rmtree(folder)
    lengths = ("continuations.prefix_percents=[]", "continuations.prefix_tokens=[5000]")
    result = invoke("run", "continuations", path, *sets(*OVERRIDES, *lengths))
    assert (result.code, result.kind) == (3, "invalid_data")
    assert "continuations.prefix_tokens" in result.err
    assert not folder.exists()


def test_dry_run_reports_the_number_of_continuations(continued):
    result = invoke("run", "continuations", continued[0], "--dry-run")
    assert result.code == 0
    assert "by student, teacher: 160, of prefixes of 4 responses, at most 160 tokens each" in result.out


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
