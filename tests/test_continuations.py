"""Continuations of the student's prefixes: made part by part, graded, and what they come to."""

import shutil

import numpy as np
import pytest
from helpers.commands import QUICKSTART, invoke, sets, small_recipe

from opdctl.analysis import continuations
from opdctl.artifacts.files import read_json
from opdctl.artifacts.records import GradedResponse, Response
from opdctl.artifacts.stage_dir import read_stage_rows
from opdctl.artifacts.tables import read_rows
from opdctl.data.toy import sort12
from opdctl.runs.open import open_run
from opdctl.runs.run import load_run

OVERRIDES = ("rollout.prompts_per_step=6", "continuations.responses=4", "continuations.samples=2")
MODELS = ("student", "teacher")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with one scored step, and its continuations."""
    path = tmp_path_factory.mktemp("continuations") / "run"
    for command in ("rollout", "score-teacher"):
        assert invoke(command, "--recipe", QUICKSTART, *sets(*OVERRIDES), "--output", path).code == 0
    result = invoke("analyze-position", path, "--continuations", "--json")
    assert result.code == 0, result.err
    return path, result


def test_teacher_and_student_go_on_from_every_prefix(made):
    path, result = made
    (found,) = result.json()["summary"]["continuations"]
    assert (found["step"], found["bench"], found["responses"]) == (0, "sort12", 4)
    assert [(row["model"], row["percent"]) for row in found["accuracy"]] == [
        (model, percent) for model in ("student", "teacher") for percent in range(0, 100, 10)
    ]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in found["accuracy"])
    assert found["accuracy"][10]["accuracy"] > 0.7  # the teacher, from nothing: 99 % in the long run
    assert (path / "analysis" / "figures" / "continuations.svg").exists()


def test_each_row_is_a_prefix_of_a_stored_response_and_what_a_model_made_of_it(made):
    path, _ = made
    run = load_run(path)
    responses = {
        row.sample_id: row for part in range(2) for row in read_rows(run.rollout_stage(0).verify(part), Response)
    }
    decode = run.student.tokenizer.decode
    for name in ("student", "teacher"):
        rows = read_stage_rows(continuations.continuations_path(run, 0) / name, GradedResponse)
        assert len({row.sample_id for row in rows}) == len(rows) == 4 * 10 * 2
        for row in rows:
            sample_id, percent, _ = row.sample_id.rsplit("/", 2)
            stored = responses[sample_id].response_ids
            prefix = stored[: len(stored) * int(percent) // 100]
            assert row.text == decode(np.concatenate([prefix, row.response_ids]), skip_special_tokens=True)
            assert row.correct == (sort12.extract(row.text) == responses[sample_id].answer == row.gold)
        assert len({row.response_ids.tobytes() for row in rows if "/0/" in row.sample_id}) > 1  # samples differ


def test_a_part_that_is_missing_is_made_again_as_it_was_and_shards_share_the_work(made, tmp_path):
    path, _ = made
    again = tmp_path / "run"
    shutil.copytree(path, again)
    folder = again / "continuations" / "step-00000"
    summary = read_json(folder / "summary.json")
    parts = {part: part.read_bytes() for part in sorted(folder.glob("*/part-*"))}
    shutil.rmtree(folder)
    first = invoke("analyze-position", again, "--continuations", "--shard", "0/2")
    assert first.code == 0
    assert "the last shard" in first.err
    assert not (folder / "summary.json").exists()
    assert invoke("analyze-position", again, "--continuations", "--shard", "1/2").code == 0
    assert {part: part.read_bytes() for part in sorted(folder.glob("*/part-*"))} == parts
    assert read_json(folder / "summary.json") == summary


def test_status_lists_the_parts_of_each_model_done_begun_and_damaged(made, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(made[0], again)
    folder = again / "continuations" / "step-00000"

    def states(*options):
        result = invoke("status", again, "--json", *options)
        found = [(row["step"], row["stage"], row["state"]) for row in result.json()["continuations"]]
        assert [(step, stage) for step, stage, _ in found] == [(0, f"continuations by {name}") for name in MODELS]
        return [state for _, _, state in found], result

    found, result = states("--verify")
    assert (found, result.code) == (["done", "done"], 0)
    assert "step 0 continuations by teacher  done  2 parts" in result.err
    part = next((folder / "teacher").glob("part-00001*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert states()[0] == ["done", "done"]
    found, result = states("--verify")
    assert (found, result.code) == (["done", "damaged"], 3)
    assert str(part) in result.err
    shutil.rmtree(folder)
    assert invoke("analyze-position", again, "--continuations", "--shard", "1/2").code == 0
    found, result = states("--verify")
    assert (found, result.code) == (["partial", "partial"], 0)
    assert "step 0 continuations by student  partial  1 of 2 parts" in result.err
    shutil.rmtree(folder / "teacher")
    assert states()[0] == ["partial", "missing"]


def test_other_settings_are_refused(made):
    path, _ = made
    result = invoke("analyze-position", path, "--continuations", "--set", "continuations.responses=5")
    assert result.code == 4
    assert "continuations.responses 4 → 5" in result.err


def test_a_dry_run_says_how_much_it_is(made):
    path, _ = made
    result = invoke("analyze-position", path, "--continuations", "--dry-run")
    assert result.code == 0
    assert "by student, teacher: 160 from prefixes of 4 responses" in result.err


def test_a_step_without_a_rollout_is_refused_with_the_command(made):
    path, _ = made
    result = invoke("analyze-position", path, "--continuations", "--step", "1")
    assert result.code == 2
    assert "step 1 has no student yet" in result.err


def test_prompts_without_answers_are_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abcdefghijkl?"}\n')
    overrides = (f"prompts.source={tmp_path / 'prompts.jsonl'}", "prompts.limit=1", "rollout.prompts_per_step=1")
    arguments = ("--recipe", QUICKSTART, *sets(*overrides, "rollout.num_parts=1"), "--output", tmp_path / "run")
    assert invoke("rollout", *arguments).code == 0
    result = invoke("analyze-position", tmp_path / "run", "--continuations")
    assert result.code == 3
    assert "prompts.answer_column" in result.err


def test_a_benchmark_that_runs_code_is_refused(tmp_path):
    run = open_run(small_recipe("eval.bench=['humaneval_plus']"), tmp_path / "run")
    with pytest.raises(Exception, match="judged by running programs"):
        continuations.run_continuations(run, 0, None)


def graded(name: str, problem: str, correct: bool) -> GradedResponse:
    return GradedResponse(name, problem, np.zeros(0, np.int32), "", "stop", "", None, correct, "ok", None)


def test_accuracies_are_means_over_problems_and_split_by_what_the_prefix_is():
    # problem a is right 1 of 2 times at 50 %, b always; b's prefix has gone wrong
    rows = {
        "teacher": [
            graded("a/0/0/50/0", "a", True),
            graded("a/0/0/50/1", "a", False),
            graded("b/0/0/50/0", "b", True),
        ]
    }
    found = continuations.summarise(rows, {("a/0/0", 50): True, ("b/0/0", 50): False})
    (whole,) = found["accuracy"]
    assert (whole["problems"], whole["accuracy"]) == (2, 0.75)
    assert [(row["prefix"], row["accuracy"]) for row in found["by_prefix"]] == [
        ("right so far", 0.5),
        ("gone wrong", 1.0),
    ]
    assert continuations.summarise(rows, {})["by_prefix"] == []


def test_the_embedded_task_tells_a_right_beginning_from_a_wrong_one():
    worked = sort12.solve("qkbzacdefghi")
    assert all(sort12.on_track("qkbzacdefghi?", worked[:n]) for n in range(len(worked) + 1))
    assert not sort12.on_track("qkbzacdefghi?", worked[:7] + "x")
    assert not sort12.on_track("qkbzacdefghi?", worked + "x")
