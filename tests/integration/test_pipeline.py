"""Stages and commands on one run directory: the same student, resuming, refused changes, repair."""

import shlex
import shutil
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, artifacts, contents, invoke, sets
from helpers.training import SHORT, train, weights

from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows
from opdctl.errors import ExitCode
from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model
from opdctl.runs.run import Run


def flip(path: Path) -> bytes:
    """Flip a bit in the middle of a file and return its previous contents."""
    intact = path.read_bytes()
    middle = len(intact) // 2
    path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
    return intact


def run_hint(command: str):
    """Run a command line that opdctl printed."""
    program, *words = shlex.split(command)
    assert program == "opdctl"
    return invoke(*words)


# ── The same student ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_separate_stages_make_the_same_student(finished_run, tmp_path):
    common = ["--recipe", QUICKSTART, *sets(*SHORT), "--output", tmp_path / "run"]
    for _ in range(2):
        for stage in (["rollout"], ["score-teacher"], ["train", "--no-fill"]):
            result = invoke(*stage, *common)
            assert result.code == 0, result.err
    expected = {name: content for name, content in artifacts(finished_run).items() if not name.startswith("eval/")}
    made = artifacts(tmp_path / "run")
    cards = [name for name in made if name.endswith("README.md")]  # they contain the recipe, with eval.*
    assert len(cards) == 2
    assert made.keys() == expected.keys()
    assert {name for name in made if made[name] != expected[name]} <= {*cards}


def test_printed_commands_lead_through_a_run_with_any_path(tmp_path):
    output = tmp_path / "my runs" / "o'ne ü"
    settings = sets(*SHORT, "train.steps=1")
    result = invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", output, "--json")
    for command in ("score-teacher", "train", "analyze-position"):
        assert result.code == 0, result.err
        following = result.json()["next"]
        assert following.startswith(f"opdctl {command} ")
        assert f"next: {following}" in result.err or f"next     {following}" in result.err
        result = run_hint(f"{following} --json")
    assert result.code == 0, result.err
    assert (output / "analysis/report.html").exists()


def test_finished_commands_do_nothing(finished_copy):
    before = {path: path.stat().st_mtime_ns for path in finished_copy.rglob("*") if path.is_file()}
    for command in ("rollout", "score-teacher", "train"):
        result = invoke(command, "--output", finished_copy)
        assert result.code == 0
        assert "nothing to do" in result.err
        assert "all 2 steps are done" in result.err
    assert before == {path: path.stat().st_mtime_ns for path in finished_copy.rglob("*") if path.is_file()}


def test_more_steps_continue_from_the_last(finished_copy, tmp_path):
    longer = train(finished_copy, *SHORT, "train.steps=3")
    assert longer.code == 0, longer.err
    assert longer.json()["steps"] == 3
    assert train(tmp_path / "at-once", *SHORT, "train.steps=3").code == 0
    for name in ("model.safetensors", "config.json"):
        path = Path("student/step-00003") / name
        assert (finished_copy / path).read_bytes() == (tmp_path / "at-once" / path).read_bytes()


def test_fewer_steps_than_done_are_nothing_to_do(finished_copy):
    result = invoke("train", "--output", finished_copy, "--set", "train.steps=1", "--json")
    assert result.code == 0, result.err
    assert result.json()["steps"] == 2
    assert "nothing to do" in result.err


def test_moved_run_directory_still_works(finished_copy, tmp_path):
    moved = finished_copy.rename(tmp_path / "elsewhere")
    assert train(moved, *SHORT, "train.steps=3").code == 0


def test_rows_have_policy_version_and_answer(finished_run):
    run = Run.load(finished_run)
    stage = run.rollout_stage(1)
    rows = [row for index in range(2) for row in read_rows(stage.verify(index), Response)]
    assert [row.sample_id for row in rows] == [name for name, _ in run.samples(1)]
    for row in rows:
        assert row.policy_version == 1
        assert row.answer == "".join(sorted(row.prompt_id.removeprefix("sort12-")))


# ── Missing inputs and changes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [["train", "--no-fill"], ["score-teacher"]], ids=" ".join)
def test_missing_input_names_the_next_command(command, tmp_path):
    result = invoke(*command, "--recipe", QUICKSTART, *sets(), "--output", tmp_path / "run")
    assert (result.code, result.kind) == (ExitCode.FAILED, "missing_input")
    assert f"opdctl rollout {tmp_path / 'run'}" in result.err


@pytest.mark.parametrize("change", ["weight.gamma=0.7", "rollout.max_tokens=150", "seed=1", "train.learning_rate=1e-3"])
def test_changed_recipe_is_refused_with_the_change_and_the_ways_to_resolve_it(finished_copy, change):
    before = contents(finished_copy)
    result = invoke("train", "--output", finished_copy, "--set", change)
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "recipe_mismatch")
    assert f"{change.split('=')[0]} " in result.err
    assert "→" in result.err
    assert "another --output" in result.err
    assert contents(finished_copy) == before


def test_written_defaults_equal_unset_ones(finished_copy):
    assert "dual_clip = 3.0" in (finished_copy / "recipe.toml").read_text()
    assert train(finished_copy, *SHORT, "objective.dual_clip=3").code == 0


def test_another_model_under_the_same_path_is_refused(tmp_path):
    model, output = tmp_path / "student", tmp_path / "run"
    shutil.copytree(find_or_download(Model(model="toy:student"), "student.model"), model)
    settings = sets(*SHORT, f"student.model={model}")
    assert invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", output).code == 0
    shutil.copy(find_or_download(Model(model="toy:student-spread"), "student.model") / "model.safetensors", model)
    result = invoke("rollout", "--output", output)
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "model_mismatch")
    assert str(model) in result.err


def test_accuracies_of_different_protocols_are_not_shown_together(tmp_path):
    output, settings = tmp_path / "run", (*SHORT, "eval.every_steps=2", "eval.limit=4", "eval.max_tokens=40")
    assert train(output, *settings).json()["accuracy"]["before"] is not None
    later = train(output, *settings, "eval.samples=2", "train.steps=4").json()["accuracy"]
    assert later["before"] is None
    assert later["after"] is not None


# ── Damage and repair ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", ["rollout", "teacher"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_corrupt_part_stops_the_analysis_and_is_repaired(finished_copy, stage, damage):
    part = next((finished_copy / "step-00000" / stage).glob("part-00001*"))
    intact = part.read_bytes()
    if damage == "truncated":
        part.write_bytes(intact[:-7])
    else:
        flip(part)
    result = invoke("analyze-position", finished_copy)
    assert result.code == ExitCode.BAD_DATA
    assert str(part) in result.err
    assert "opdctl run repair" in result.err
    shown = invoke("status", finished_copy, "--verify", "--json")
    assert shown.code == ExitCode.BAD_DATA
    assert [status["state"] for status in shown.json()["stages"][:2]].count("corrupt") == 1
    repaired = invoke(*shlex.split(shown.json()["next"])[1:], "--json")
    assert repaired.code == 0
    (corrupt,) = repaired.json()["corrupt"]
    assert corrupt["path"] == str(part)
    assert run_hint(corrupt["command"]).code == 0
    assert part.read_bytes() == intact
    assert invoke("status", finished_copy, "--verify").code == 0


@pytest.mark.parametrize("stage", ["rollout", "teacher"])
def test_missing_part_stops_the_analysis_and_is_made_again(finished_copy, stage):
    part = next((finished_copy / "step-00000" / stage).glob("part-00001*"))
    intact = part.read_bytes()
    part.unlink()
    result = invoke("analyze-position", finished_copy)
    assert result.code == ExitCode.BAD_DATA
    assert str(part) in result.err
    shown = invoke("status", finished_copy, "--verify", "--json")
    assert [status["state"] for status in shown.json()["stages"][:2]].count("partial") == 1
    hint = next(line for line in result.err.splitlines() if line.startswith("hint"))
    assert run_hint(hint.split("`")[1]).code == 0
    assert part.read_bytes() == intact
    assert invoke("status", finished_copy, "--verify").code == 0


def test_last_step_of_a_finished_run_is_repaired(finished_copy):
    part = next((finished_copy / "step-00001" / "rollout").glob("part-00000*"))
    intact = flip(part)
    assert invoke("run", "repair", finished_copy).code == 0
    result = invoke("rollout", "--output", finished_copy)  # --step is the last one
    assert result.code == 0, result.err
    assert part.read_bytes() == intact


def test_part_of_a_pruned_student_is_not_repaired(tmp_path):
    output = tmp_path / "run"
    settings = ("rollout.max_tokens=4", "train.steps=3", "train.keep_latest=1", "train.keep_every_steps=50")
    assert train(output, *settings).code == 0
    part = next((output / "step-00001" / "rollout").glob("part-00000*"))
    flip(part)
    corrupt_bytes = part.read_bytes()
    result = invoke("run", "repair", output, "--json")
    assert result.code == ExitCode.BAD_DATA
    (corrupt,) = result.json()["corrupt"]
    assert (corrupt["path"], corrupt["command"], result.json()["moved"]) == (str(part), None, [])
    assert part.read_bytes() == corrupt_bytes
    shown = invoke("status", output, "--verify", "--json")
    assert shown.code == ExitCode.BAD_DATA
    assert "repair" not in shown.json()["next"]
    assert invoke("train", "--output", output, "--set", "train.steps=4").code == 0  # training does not need the part


def test_corrupt_evaluation_is_repaired(finished_copy):
    part = next((finished_copy / "eval/sort12/step-00002").glob("part-*"))
    intact = flip(part)
    assert invoke("status", finished_copy, "--verify").code == ExitCode.BAD_DATA
    result = invoke("eval", "--output", finished_copy)
    assert result.code == ExitCode.BAD_DATA
    assert f"`opdctl run repair {finished_copy}`" in result.err
    assert invoke("run", "repair", finished_copy).code == 0
    hint = next(line for line in result.err.splitlines() if line.startswith("hint"))
    assert run_hint(hint.split("`")[3]).code == 0
    assert part.read_bytes() == intact


def test_status_requires_the_newest_student_and_no_checkpoint(finished_copy):
    shutil.rmtree(finished_copy / "trainer/step-00002")
    assert invoke("status", finished_copy).code == 0
    shutil.rmtree(finished_copy / "student/step-00002")
    result = invoke("status", finished_copy)
    assert result.code == ExitCode.BAD_DATA
    assert "student/step-00002" in result.out


def test_corrupt_student_is_named_before_it_is_used(finished_copy):
    path = finished_copy / "student/step-00002/model.safetensors"
    flip(path)
    result = train(finished_copy, *SHORT, "train.steps=3")
    assert result.code == ExitCode.BAD_DATA
    assert str(path) in result.err
    assert len(weights(finished_copy, 1)) > 0
