import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from helpers.commands import contents, rewrite_json

from opdctl.artifacts import directories, files
from opdctl.data.order import epoch_order
from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.fork import create_fork, plan_fork
from opdctl.runs.run import Run, read_recipe, read_run_record

GAMMA = "weight.gamma=0.7"


@pytest.fixture
def run(finished_copy: Path) -> Run:
    """A run at step 1, with the responses and the scores of step 1."""
    (finished_copy / "step-00001/update.json").unlink()
    shutil.rmtree(finished_copy / "student/step-00002")
    shutil.rmtree(finished_copy / "trainer/step-00002")
    return Run.load(finished_copy)


def plan(run: Run, path: Path, *overrides: str):
    return plan_fork(run, path, read_recipe(run.path, overrides))


def error_of(run: Run, path: Path, *overrides: str) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        create_fork(plan(run, path, *overrides))
    return caught.value


def names(run: Run, paths) -> set[str]:
    return {str(path.relative_to(run.path)) for path in paths}


@pytest.mark.parametrize("order", ["numpy", "random_sampler", None])
def test_fork_keeps_the_order_of_the_prompts(run, tmp_path, order):
    """None: a run of 0.2.0 has no order in its record."""
    recorded = {key: value for key, value in read_run_record(run.path)["prompts"].items() if key != "order"}
    rewrite_json(run.path / "run.json", prompts=recorded | ({"order": order} if order else {}))
    create_fork(plan(run, tmp_path / "fork", GAMMA))
    fork = Run.load(tmp_path / "fork")
    for step in range(8):
        rule = epoch_order(order or "numpy", 32, run.recipe.seed, step // 4)
        expected = [run.prompts[i].prompt_id for i in rule[step % 4 * 8 : (step % 4 + 1) * 8]]
        assert [prompt.prompt_id for _, prompt in fork.samples(step)] == expected


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("rollout.prompts_per_step=4", "at prompt 4 of epoch 0 instead of 8 of epoch 0"),
        ("rollout.prompts_per_step=32", "at prompt 0 of epoch 1 instead of 8 of epoch 0"),
        (GAMMA, None),
    ],
)
def test_moved_place_in_the_data_is_reported(run, tmp_path, override, place):
    """32 prompts, of which step 0 used 8."""
    lines = [line for line in plan(run, tmp_path / "fork", override).lines() if "of epoch" in line]
    assert [place in line for line in lines] == ([True] if place else [])


STATE = {"prompts.parquet", "student/step-00001", "trainer/step-00001"}
EVALUATIONS = {f"eval/sort12/{name}" for name in ("step-00001", "teacher", "benchmark.json")}
INPUTS = {"step-00001/rollout", "step-00001/teacher"}


@pytest.mark.parametrize(
    ("override", "inputs"),
    [
        (GAMMA, INPUTS),
        ("train.learning_rate=0.002", INPUTS),
        ("score.entropy=true", {"step-00001/rollout"}),
        ("rollout.num_parts=4", set()),
        ("rollout.max_tokens=80", set()),
    ],
)
def test_fork_reuses_what_the_change_does_not_affect(run, tmp_path, override, inputs):
    made = plan(run, tmp_path / "fork", override)
    assert made.step == 1
    assert names(run, made.reused) == STATE | EVALUATIONS | inputs
    assert [key for key, _, _ in made.changes] == [override.partition("=")[0]]


def test_fork_links_files_and_leaves_the_run_as_it_is(run, tmp_path):
    before, path = contents(run.path), tmp_path / "fork"
    count = create_fork(plan(run, path, GAMMA))
    assert contents(run.path) == before
    made = contents(path)
    assert count == len(made) - 2  # recipe.toml and run.json are written
    assert {name for name in made if made[name] != before.get(name)} == {"recipe.toml", "run.json"}
    part = "step-00001/rollout/part-00000-of-00002.parquet"
    assert os.path.samefile(run.path / part, path / part)
    fork = Run.load(path)
    assert (fork.start_step, fork.current_step(), list(fork.finished_steps())) == (1, 1, [])
    assert fork.recipe.weight.gamma == 0.7
    assert fork.student_digest(1) == run.student_digest(1)
    assert fork.check_trainer_state(1) == run.check_trainer_state(1)
    assert fork.kept_steps() == [1]
    assert fork.is_scored(1)
    assert fork.student_at(1)
    assert (fork.forked_from["run_dir"], fork.forked_from["step"]) == (str(run.path), 1)


def test_fork_at_step_0_is_a_run_without_a_start(run, tmp_path):
    (run.path / "step-00000/update.json").unlink()
    made = plan(run, tmp_path / "fork", GAMMA)
    assert names(run, made.reused) >= {"step-00000/rollout", "step-00000/teacher", *INPUTS, "eval/sort12/step-00000"}
    create_fork(made)
    fork = Run.load(tmp_path / "fork")
    assert (fork.start_step, fork.forked_from) == (0, None)
    assert fork.is_scored(0)


def test_fork_of_a_fork_names_the_fork(run, tmp_path):
    create_fork(plan(run, tmp_path / "one", GAMMA))
    one = Run.load(tmp_path / "one")
    create_fork(plan(one, tmp_path / "two", "weight.gamma=0.9"))
    two = Run.load(tmp_path / "two")
    assert two.forked_from == {**one.forked_from, "run_dir": str(one.path)}
    assert two.is_scored(1)


def test_lines_name_changes_and_step(run, tmp_path):
    text = "\n".join(plan(run, tmp_path / "fork", GAMMA).lines())
    assert "weight.gamma 0.5 → 0.7" in text
    assert "step 1" in text
    assert "rollouts of 1 steps and scores of 1 steps" in text


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("override", ["seed=1", "lora.rank=2", "teacher.dtype=bfloat16", "prompts.limit=16"])
def test_immutable_settings_are_refused(run, tmp_path, override):
    error = error_of(run, tmp_path / "fork", override, GAMMA)
    assert (error.kind, error.code) == ("immutable_setting", ExitCode.USAGE)
    assert override.partition("=")[0] in error.message
    assert "gamma" not in error.message
    assert not (tmp_path / "fork").exists()


@pytest.mark.parametrize("overrides", [(), ("train.steps=9", "eval.limit=2")])
def test_fork_without_a_change_of_artifacts_is_refused(run, tmp_path, overrides):
    error = error_of(run, tmp_path / "fork", *overrides)
    assert (error.kind, error.code) == ("invalid_usage", ExitCode.USAGE)


@pytest.mark.parametrize(("every", "options"), [(1, ""), (2, " --set train.steps=2")])
def test_step_without_saved_trainer_state_is_refused_with_the_command_that_saves_one(run, tmp_path, every, options):
    """A state that is due is written by the next training, before anything else."""
    shutil.rmtree(run.path / "trainer/step-00001")
    settings = run.recipe.train.model_copy(update={"save_every_steps": every})
    run = dataclasses.replace(run, recipe=run.recipe.model_copy(update={"train": settings}))
    error = error_of(run, tmp_path / "fork", GAMMA)
    assert (error.kind, error.code) == ("missing_checkpoint", ExitCode.USAGE)
    assert str(run.path / "trainer/step-00001") in error.message
    assert f"`opdctl train {run.path}{options}`" in error.hint


@pytest.mark.parametrize("exists", ["file", "directory", "run"])
def test_existing_path_is_refused_already_by_the_plan(run, tmp_path, exists):
    path = run.path if exists == "run" else tmp_path / "fork"
    if exists == "directory":
        path.mkdir()
    elif exists == "file":
        path.write_text("")
    with pytest.raises(OpdctlError) as caught:
        plan(run, path, GAMMA)
    assert caught.value.kind == "unusable_output"
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["student/step-00001/model.safetensors", "trainer/step-00001/model.safetensors"])
def test_corrupt_state_is_refused(run, tmp_path, name):
    path = next((run.path / name).parent.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    error = error_of(run, tmp_path / "fork", GAMMA)
    assert (error.kind, error.code) == ("corrupt_artifact", ExitCode.BAD_DATA)
    assert "opdctl run repair" in error.hint
    assert not (tmp_path / "fork").exists()


def test_rollouts_of_an_older_student_are_not_reused(run, tmp_path):
    """With staleness the step's responses may be of a policy version that the fork does not have."""
    recipe = read_recipe(run.path, ["pipeline.max_staleness=1", "train.steps=3"])
    ahead = Run(recipe, run.path, run.models, run.digests)
    for step, version in ((1, 0), (2, 1)):
        path = run.step_path(step) / "rollout"
        path.mkdir(parents=True, exist_ok=True)
        files.write_json(path / "policy_version.json", {"policy_version": version})
    made = plan_fork(ahead, tmp_path / "fork", read_recipe(run.path, [GAMMA]))
    assert names(run, made.reused) - EVALUATIONS == STATE | {"step-00002/rollout"}


def test_fork_is_written_completely_or_not_at_all(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directories, "link_or_copy", fail)
    error = error_of(run, tmp_path / "fork", GAMMA)
    assert error.kind == "disk_full"
    assert not (tmp_path / "fork").exists()
    assert not list(tmp_path.glob(".tmp-*"))
