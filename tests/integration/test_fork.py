"""A started run with another recipe: what the refusal suggests, and what a fork makes of it."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import artifacts, contents, invoke

from opdctl.errors import ExitCode
from opdctl.recipe.load import load_recipe
from opdctl.runs.run import Run

GAMMA = ("--set", "weight.gamma=0.7")


@pytest.fixture(scope="module")
def two_steps(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, of which two are done, with the responses and the scores of the third."""
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("two-steps") / "run"))
    recipe = load_recipe([path / "recipe.toml"], ["train.steps=3", "eval.every_steps=0"])
    (path / "recipe.toml").write_text(recipe.to_toml())
    for stage in ("rollout", "score-teacher"):
        result = invoke(stage, "--output", path)
        assert result.code == 0, result.err
    return path


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def train(path: Path, *options: str) -> Path:
    result = invoke("train", "--output", path, *options)
    assert result.code == 0, result.err
    return path


def fork(run: Path, new: Path, *overrides: str) -> Path:
    result = invoke("run", "fork", run, new, *(word for each in overrides for word in ("--set", each)))
    assert result.code == 0, result.err
    return new


def train_by_hand(run: Path, path: Path, *overrides: str) -> Path:
    """Train on from a copy of a run whose recipe is replaced by hand: the reference of a fork."""
    shutil.copytree(run, path)
    recipe = load_recipe([path / "recipe.toml"], overrides)
    (path / "recipe.toml").write_text(recipe.to_toml())
    return train(path)


def weights(run: Path, step: int) -> bytes:
    return (run / f"student/step-{step:05d}/model.safetensors").read_bytes()


# ── The refusal ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["train", "rollout", "score-teacher"])
def test_other_recipe_is_refused_with_what_a_fork_reuses(run: Path, command: str) -> None:
    before = contents(run)
    result = invoke(command, "--output", run, *GAMMA)
    assert (result.code, result.kind, result.out) == (ExitCode.RECIPE_MISMATCH, "recipe_mismatch", "")
    assert "weight.gamma 0.5 → 0.7 affects updates" in result.err
    assert "rollouts of 1 steps and scores of 1 steps" in result.err
    assert f"`opdctl run fork {run} {run}-fork --set weight.gamma=0.7" in result.err
    assert contents(run) == before


def test_the_suggested_commands_work(run: Path, tmp_path: Path) -> None:
    refused = invoke("train", "--output", run, *GAMMA)
    commands = [line.split("`")[1].split() for line in refused.err.splitlines() if "`opdctl" in line]
    assert [command[1] for command in commands] == ["train", "run"]
    for command in commands:
        words = [str(tmp_path / "fork") if word == f"{run}-fork" else word for word in command[1:]]
        result = invoke(*words)
        assert result.code == 0, result.err
    assert Run.load(tmp_path / "fork").recipe.weight.gamma == 0.7
    assert Run.load(run).current_step() == 3


# ── The fork ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "sampled", "scored"),
    [
        ("weight.gamma=0.7", 0, 0),
        ("train.learning_rate=0.002", 0, 0),
        ("score.entropy=true", 0, 2),
        ("rollout.max_tokens=30", 2, 2),
        ("rollout.num_parts=4", 4, 4),
    ],
)
def test_student_of_a_fork_is_that_of_a_recipe_written_by_hand(
    run: Path, tmp_path: Path, override: str, sampled: int, scored: int
) -> None:
    before = contents(run)
    path = fork(run, tmp_path / "fork", override)
    for command, parts in (("rollout", sampled), ("score-teacher", scored)):
        result = invoke(command, "--output", path, "--json")
        assert result.json()["parts_made"] == parts, result.err
    train(path)
    by_hand = tmp_path / "by-hand"
    shutil.copytree(run, by_hand)
    for name in [*(["rollout"] if sampled else []), *(["teacher"] if scored else [])]:
        shutil.rmtree(by_hand / "step-00002" / name)
    for step in ("step-00000", "step-00001"):  # with another recipe their stages would be refused
        for name in ("rollout", "teacher"):
            shutil.rmtree(by_hand / step / name)
    recipe = load_recipe([by_hand / "recipe.toml"], [override])
    (by_hand / "recipe.toml").write_text(recipe.to_toml())
    train(by_hand)
    assert weights(path, 3) == weights(by_hand, 3)
    assert contents(run) == before
    assert (weights(path, 3) == weights(train(run), 3)) == (override == "score.entropy=true")  # which the loss ignores


def test_run_is_unchanged_and_continues_with_its_recipe(run: Path, tmp_path: Path) -> None:
    before, path = contents(run), tmp_path / "fork"
    result = invoke("run", "fork", run, path, *GAMMA, "--json")
    assert result.code == 0, result.err
    assert contents(run) == before
    report = result.json()
    assert (report["run_dir"], report["step"]) == (str(path), 2)
    assert report["changes"] == [{"key": "weight.gamma", "old": 0.5, "new": 0.7}]
    assert all((path / name).exists() for name in report["reused"])
    train(path)
    assert contents(run) == before
    train(run)
    gammas = [Run.load(each).update(2)["settings"]["weight.gamma"] for each in (path, run)]
    assert gammas == [0.7, 0.5]
    for each in (path, run):
        assert invoke("status", each, "--verify").code == 0
    assert weights(path, 2) == weights(run, 2)
    assert weights(path, 3) != weights(run, 3)


def test_every_command_works_on_a_fork(run: Path, tmp_path: Path) -> None:
    path = fork(run, tmp_path / "fork", "weight.gamma=0.7", "eval.every_steps=1")
    status = invoke("status", path, "--json").json()
    assert (status["start_step"], status["steps_done"], status["steps"]) == (2, 2, 3)
    assert status["forked_from"] == {"run_dir": str(run), "step": 2}
    assert status["next"] == f"opdctl train {path}"
    train(path)
    assert [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [2]
    shown = invoke("status", path, "--verify", "--json")
    assert shown.code == 0, shown.err
    assert "forked from" in shown.out
    assert {each["model"] for each in shown.json()["summaries"]} == {"step-00002", "step-00003", "teacher"}
    for command in (["eval", "--run", path, "--step", 2], ["eval", "--run", path], ["analyze-position", path]):
        result = invoke(*command, "--json")
        assert result.code == 0, result.err
    for command in ("rollout", "score-teacher", "train"):
        result = invoke(command, "--output", path)
        assert (result.code, "nothing to do" in result.err) == (0, True), result.err
    sample = Run.load(path).samples(2)[0][0]
    assert invoke("run", "show", path, sample).code == 0
    compared = invoke("compare", run, path, "--json")
    assert compared.code == 0, compared.err
    assert invoke("run", "repair", path).code == 0


@pytest.mark.parametrize("step", [0, 1, 3])
def test_step_outside_a_fork_is_refused(run: Path, tmp_path: Path, step: int) -> None:
    path = fork(run, tmp_path / "fork", "weight.gamma=0.7")
    for command in ("rollout", "score-teacher", *(["eval"] if step else [])):  # student 0 is the model before training
        result = invoke(command, "--output", path, "--step", step)
        assert result.code == ExitCode.USAGE, result.err
        assert result.kind in ("invalid_usage", "missing_checkpoint")


def test_fork_of_a_fork(run: Path, tmp_path: Path) -> None:
    one = train(fork(run, tmp_path / "one", "weight.gamma=0.7"))
    train(one, "--set", "train.steps=4")
    two = train(fork(one, tmp_path / "two", "weight.gamma=0.9", "train.steps=5"))
    fork_of_one = Run.load(two)
    assert (fork_of_one.start_step, fork_of_one.current_step()) == (4, 5)
    assert fork_of_one.forked_from is not None
    assert fork_of_one.forked_from["run_dir"] == str(one)
    assert weights(two, 4) == weights(one, 4)
    three = train(fork(fork(run, tmp_path / "untrained", "weight.gamma=0.7"), tmp_path / "three", "weight.gamma=0.5"))
    assert weights(three, 3) == weights(train(run), 3)  # back to the first recipe
    for path in (one, two, three):
        assert invoke("status", path, "--verify").code == 0


def test_fork_at_step_0_is_a_run_of_the_new_recipe(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for name in ("student", "trainer", "eval", "step-00001", "step-00000/update.json", "metrics.jsonl"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    path = fork(run, tmp_path / "fork", "weight.gamma=0.7")
    result = invoke("rollout", "--output", path, "--json")
    assert result.json()["parts_made"] == 0
    train(path)
    train_by_hand(run, tmp_path / "by-hand", "weight.gamma=0.7")
    assert artifacts(path) == artifacts(tmp_path / "by-hand")
    assert invoke("status", path, "--verify").code == 0


def test_fork_of_a_run_that_samples_ahead(finished_run: Path, tmp_path: Path) -> None:
    """The responses of step 2 are of policy version 1, which the fork at step 2 does not have."""
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "student/step-00002")
    shutil.rmtree(run / "trainer/step-00002")
    (run / "step-00001/update.json").unlink()
    ahead = ("--set", "pipeline.max_staleness=1", "--set", "train.steps=3", "--set", "eval.every_steps=0")
    for command in ("rollout", "score-teacher"):
        assert invoke(command, "--output", run, "--step", 2, *ahead).code == 0
    train(run, "--no-fill", "--set", "train.steps=2")
    assert Run.load(run).policy_version(2) == 1
    path = fork(run, tmp_path / "fork", "weight.gamma=0.7", "train.steps=3")
    assert not (path / "step-00002").exists()
    train(path)
    assert Run.load(path).policy_version(2) == 2
    assert invoke("status", path, "--verify").code == 0


def test_fork_writes_a_lost_student_again(run: Path, tmp_path: Path) -> None:
    path = train(fork(run, tmp_path / "fork", "weight.gamma=0.7"))
    before = contents(path / "student/step-00003")
    shutil.rmtree(path / "student/step-00003")
    assert invoke("status", path, "--json").json()["next"] == f"opdctl train {path}"
    train(path)
    assert contents(path / "student/step-00003") == before


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("override", ["seed=1", "lora.rank=2", "teacher.dtype=bfloat16", "prompts.limit=16"])
def test_immutable_settings_are_refused(run: Path, tmp_path: Path, override: str) -> None:
    refused = invoke("train", "--output", run, "--set", override)
    assert (refused.code, refused.kind) == (ExitCode.RECIPE_MISMATCH, "recipe_mismatch")
    assert "run fork" not in refused.err
    result = invoke("run", "fork", run, tmp_path / "fork", "--set", override)
    assert (result.code, result.kind) == (ExitCode.USAGE, "immutable_setting")
    assert not (tmp_path / "fork").exists()


def test_fork_requires_the_trainer_state_and_names_the_command_that_writes_one(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "trainer")
    result = invoke("run", "fork", run, tmp_path / "fork", *GAMMA)
    assert (result.code, result.kind) == (ExitCode.USAGE, "missing_checkpoint")
    command = next(line for line in result.err.splitlines() if line.startswith("hint")).split("`")[1].split()
    assert invoke(*command[1:]).code == 0
    fork(run, tmp_path / "fork", "weight.gamma=0.7")
    assert Run.load(tmp_path / "fork").start_step == 3


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["run", "fork", "--set", "train.steps=9"], "invalid_usage"),
        (["run", "fork"], "invalid_usage"),
        (["run", "."], "unusable_output"),
        (["run", "fork", "--set", "weight.gama=1"], "invalid_recipe"),
        (["nowhere", "fork", *GAMMA], "missing_run"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_fork_that_makes_no_sense_is_refused(run: Path, tmp_path, monkeypatch, arguments, kind, dry) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("run", "fork", *arguments, *(GAMMA if arguments == ["run", "."] else ()), *dry)
    assert (result.code, result.kind, result.out) == (ExitCode.USAGE, kind, "")
    assert not (tmp_path / "fork").exists()


def test_dry_run_writes_nothing(run: Path, tmp_path: Path) -> None:
    result = invoke("run", "fork", run, tmp_path / "fork", *GAMMA, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert "nothing was written" in result.err
    assert set(result.json()["reused"]) >= {"step-00002/rollout", "step-00002/teacher", "trainer/step-00002"}
    assert not (tmp_path / "fork").exists()
