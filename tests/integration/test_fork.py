"""A begun run under another recipe: what is said, what stays, in place and in a branch."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, invoke, sets
from hypothesis import given
from hypothesis import strategies as st

from opdctl.artifacts import files
from opdctl.artifacts.stage_dir import changed_settings
from opdctl.errors import ExitCode
from opdctl.recipe.dependencies import as_overrides, describe_changes
from opdctl.recipe.load import load_recipe
from opdctl.runs.run import load_run

GAMMA = ("--set", "weight.gamma=0.7")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A run of three steps, of which two are done, and of the third the responses and their scores."""
    path = tmp_path_factory.mktemp("two-steps") / "run"
    assert invoke("train", "--recipe", QUICKSTART, *sets(), "--output", path).code == 0
    for stage in ("rollout", "score-teacher"):
        result = invoke(stage, "--output", path, "--set", "train.steps=3")
        assert result.code == 0, result.err
    return path


@pytest.fixture
def run(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("key", "old", "new", "said"),
    [
        ("weight.gamma", 0.5, 0.7, "weight.gamma 0.5 → 0.7 affects updates; rollouts and scores can be reused"),
        ("score.top_k", 0, 4, "score.top_k 0 → 4 affects scores; rollouts can be reused"),
        ("rollout.max_tokens", 9, 8, "rollout.max_tokens 9 → 8 affects rollouts and continuations"),
        ("seed", 0, 1, "seed 0 → 1 affects prompts, rollouts, updates, eval and continuations"),
    ],
)
def test_a_change_is_told_by_what_it_shapes(key, old, new, said):
    assert describe_changes([(key, old, new)]) == said


def test_another_recipe_is_refused_with_what_stays_valid_and_the_ways_on(run):
    result = invoke("train", "--recipe", QUICKSTART, *sets("train.steps=3", "weight.gamma=0.7"), "--output", run)
    assert result.code == ExitCode.RECIPE_MISMATCH
    said = " ".join(result.err.split())
    assert "weight.gamma 0.5 → 0.7 affects updates; rollouts and scores can be reused" in said
    assert "3 steps of rollouts and 3 steps of scores stay valid" in said
    assert f"`opdctl train --output {run}` goes on under the recorded recipe" in said
    assert f"`opdctl change {run} --set weight.gamma=0.7` goes on from step 2 under the new one" in said
    assert "--branch NEW_RUN_DIR` does so in a run directory of its own" in said
    assert f"removing {run}, starts over" in said


def test_the_commands_that_the_refusal_names_run(run, tmp_path):
    refused = invoke("train", "--output", run, *GAMMA)
    commands = [line.split("`")[1].split() for line in refused.err.splitlines() if "`opdctl change" in line]
    in_place, branched = (command[1:] for command in commands)
    branched[-1] = str(tmp_path / "branch")
    for command in (branched, in_place):
        result = invoke(*command)
        assert result.code == 0, result.err


@pytest.mark.parametrize("override", ["seed=1", "lora.rank=2", "teacher.dtype=bfloat16", "prompts.limit=16"])
def test_what_a_run_is_begun_with_for_good_is_not_changed(run, override):
    refused = invoke("train", "--output", run, "--set", override)
    assert refused.code == ExitCode.RECIPE_MISMATCH
    assert "opdctl change" not in refused.err
    result = invoke("change", run, "--set", override)
    assert result.code == ExitCode.USAGE
    assert "a run is begun with these for good" in result.err


def test_a_changed_run_goes_on_and_all_that_was_made_before_still_verifies(run):
    before = contents(run)
    assert invoke("change", run, *GAMMA).code == 0
    after = contents(run)
    assert after.pop("recipe-before-00002.toml") == before["recipe.toml"]
    assert {name for name in before if after[name] != before[name]} == {"recipe.toml"}
    status = invoke("status", run, "--verify", "--json")
    assert status.code == 0, status.err
    assert status.json()["changes"] == [{"step": 2, "settings": ["weight.gamma 0.5 → 0.7"]}]
    result = invoke("train", "--output", run)
    assert result.code == 0, result.err
    assert invoke("status", run, "--verify").code == 0
    updates = [load_run(run).update(step)["settings"]["weight.gamma"] for step in range(3)]
    assert updates == [0.5, 0.5, 0.7]


def test_the_update_after_a_change_is_that_of_the_new_recipe(run, two_steps):
    """By another way: the same state and scores under a recipe that was written by hand."""
    assert invoke("change", run, *GAMMA).code == 0
    assert invoke("train", "--output", run).code == 0
    by_hand = run.parent / "by-hand"
    shutil.copytree(two_steps, by_hand)
    recipe = load_recipe([by_hand / "recipe.toml"], [GAMMA[1]])
    (by_hand / "recipe.toml").write_text(recipe.to_toml())
    assert invoke("train", "--output", by_hand).code == 0
    student = "student/step-00003/model.safetensors"
    assert (run / student).read_bytes() == (by_hand / student).read_bytes()
    assert (run / "step-00002/rollout/manifest.json").read_bytes() == (
        two_steps / "step-00002/rollout/manifest.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("override", "dropped"), [("rollout.num_parts=4", ["rollout", "teacher"]), ("score.entropy=true", ["teacher"])]
)
def test_only_what_a_change_shapes_of_the_step_in_work_is_dropped(run, override, dropped):
    dry = invoke("change", run, "--set", override, "--dry-run", "--json")
    assert dry.json()["dropped"] == [str(run / "step-00002" / name) for name in dropped]
    before = contents(run)
    assert invoke("change", run, "--set", override).code == 0
    gone = before.keys() - contents(run).keys()
    assert {Path(name).parent for name in gone} == {Path("step-00002") / name for name in dropped}
    assert invoke("train", "--output", run).code == 0
    assert invoke("status", run, "--verify").code == 0


def test_a_branch_shares_the_files_and_leaves_the_run_as_it_is(run, tmp_path):
    before, new = contents(run), tmp_path / "branch"
    result = invoke("change", run, *GAMMA, "--branch", new)
    assert result.code == 0, result.err
    assert contents(run) == before
    part = "step-00000/rollout/part-00000-of-00002.parquet"
    assert os.path.samefile(run / part, new / part)
    for path, gamma in ((new, 0.7), (run, 0.5)):
        assert invoke("train", "--output", path).code == 0
        assert invoke("status", path, "--verify").code == 0
        assert load_run(path).update(2)["settings"]["weight.gamma"] == gamma
        assert len((path / "metrics.jsonl").read_text().splitlines()) == 3
    assert files.read_json(new / "run.json")["forked_from"] == str(run)


def test_two_changes_and_a_step_that_is_made_again_under_its_own_recipe(run):
    assert invoke("change", run, "--set", "rollout.num_parts=4", "--set", "train.keep_latest=9").code == 0
    assert invoke("train", "--output", run).code == 0
    assert invoke("change", run, "--set", "train.steps=4", "--set", "rollout.max_tokens=80").code == 0
    assert invoke("train", "--output", run).code == 0
    opened = load_run(run)
    assert [len(opened.rollout(step).names) for step in range(4)] == [2, 2, 4, 4]
    assert [opened.at(step).recipe.rollout.max_tokens for step in range(4)] == [160, 160, 160, 80]
    path = opened.rollout(2).verify(3)
    whole = path.read_bytes()
    path.unlink()
    assert invoke("rollout", "--step", 2, "--repair", "--output", run).code == 0
    assert path.read_bytes() == whole
    assert invoke("status", run, "--verify").code == 0


def test_a_change_wants_the_state_that_training_goes_on_from(tmp_path):
    run = tmp_path / "run"
    overrides = sets("train.steps=5", "train.save_every_steps=2")
    assert invoke("train", "--recipe", QUICKSTART, *sets("train.steps=1"), "--output", run).code == 0
    shutil.rmtree(run / "trainer/step-00001")
    result = invoke("change", run, *overrides, *GAMMA)
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert "was not saved" in result.err
    assert "--set train.steps=2`" in result.err


def test_nothing_to_change_is_said(run):
    result = invoke("change", run, "--set", "train.steps=9")
    assert result.code == ExitCode.USAGE
    assert "nothing to record" in result.err


def test_a_branch_into_what_is_there_is_refused(run):
    result = invoke("change", run, *GAMMA, "--branch", run.parent)
    assert result.code == ExitCode.USAGE
    assert "is there already" in result.err
    assert run.exists()


settings = st.fixed_dictionaries(
    {},
    optional={
        "weight.name": st.sampled_from(["uniform", "iw_opd", "prefix_ratio"]),
        "train.learning_rate": st.floats(1e-6, 1e-2),
        "train.betas": st.lists(st.floats(0, 0.99), min_size=2, max_size=2),
        "rollout.max_tokens": st.integers(1, 999),
        "score.entropy": st.booleans(),
        "objective.name": st.sampled_from(["policy_gradient", "power", "sampled_kl"]),
        "plugins": st.just([]),
    },
)


@given(settings)
def test_the_overrides_that_are_named_make_the_recipe_that_was_asked_for(given_settings):
    begun = load_recipe([QUICKSTART])
    asked = load_recipe([QUICKSTART], [f"{key}={_toml(value)}" for key, value in given_settings.items()])
    overrides = as_overrides(changed_settings(begun.flat(), asked.flat()))
    assert overrides is not None
    assert load_recipe([QUICKSTART], overrides) == asked


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


CHANGES = ("replace", "rename", "unlink", "rmdir", "link")


def killed_at(moment: int, command: tuple[str, ...]) -> bool:
    """Run a command in a forked process that is killed just before its change of a folder of that number; whether it
    came to that."""
    child = os.fork()
    if child == 0:
        count = itertools.count()

        def counted(call):
            def change(*arguments, **options):
                if next(count) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return change

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        os._exit(invoke(*command).code)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("branch", "folder", "stride"), [((), "run", 1), (("--branch", "branch"), "branch", 9)])
def test_killed_before_any_of_its_changes_and_called_again_it_ends_the_same(
    run, two_steps, tmp_path, branch, folder, stride, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command, ends, killed = ("change", "run", "--set", "rollout.max_tokens=80", *branch), [], True
    while killed:
        for path in (run, tmp_path / "branch"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(two_steps, run)
        killed = killed_at(stride * len(ends), command)
        again = invoke(*command)
        assert again.code == 0 or "nothing to record" in again.err or "is there already" in again.err
        ends.append({name: data for name, data in contents(tmp_path / folder).items() if "/." not in f"/{name}"})
    assert len(ends) > 5
    assert all(end == ends[-1] for end in ends)
