"""`opdctl run repair` for every kind of damage that `status --verify` finds; a repaired run ends bit-identical."""

import shutil
from pathlib import Path

import pytest
from helpers.commands import contents, invoke

from opdctl.errors import ExitCode


@pytest.fixture(scope="module")
def whole(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with continuations of step 0."""
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("whole") / "run"))
    settings = ("--set", "continuations.responses=2", "--set", "continuations.samples=1")
    result = invoke("run", "continuations", path, *settings)
    assert result.code == 0, result.err
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def first(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern))[0]


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def without_corrupt(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run).items() if not name.startswith("corrupt/")}


def run_next_commands(err: str) -> list[str]:
    """Run the commands that a message names as the next ones."""
    commands = [line.removeprefix("next: ") for line in err.splitlines() if line.startswith("next: opdctl")]
    for command in commands:
        result = invoke(*command.split()[1:])
        assert result.code == 0, (command, result.err)
    return commands


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize(
    "pattern",
    [
        "step-00000/rollout/part-*",
        "step-00001/rollout/part-*",
        "step-00000/teacher/part-*",
        "step-00001/teacher/part-*",
        "step-00001/rollout/manifest.json",
        "step-00000/teacher/manifest.json",
        "eval/*/step-00002/part-*",
        "eval/*/step-00002/manifest.json",
        "student/step-00002/model.safetensors",
    ],
)
def test_repaired_run_is_bit_identical(run: Path, pattern: str, damage) -> None:
    wanted, path = contents(run), first(run, pattern)
    damage(path)
    status = invoke("status", run, "--verify", "--json")
    assert status.code == ExitCode.BAD_DATA
    assert status.json()["next"] == f"opdctl run repair {run}"
    result = invoke("run", "repair", run, "--json")
    assert result.code == 0, result.err
    assert len(result.json()["corrupt"]) == len(result.json()["moved"]) == 1
    assert run_next_commands(result.err)
    assert without_corrupt(run) == wanted
    assert invoke("status", run, "--verify").code == 0
    again = invoke("run", "repair", run, "--json")
    assert (again.code, again.json()["corrupt"]) == (0, [])


def test_repaired_evaluation_of_a_scorer(run: Path) -> None:
    wanted = contents(run)
    cut(first(run, "eval/*/teacher/part-*"))
    assert invoke("run", "repair", run).code == 0
    assert invoke("eval", "--output", run, "--model", "teacher").code == 0
    assert without_corrupt(run) == wanted


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_repaired_continuations(run: Path, model: str) -> None:
    wanted = contents(run)
    cut(first(run, f"continuations/step-00000/{model}/part-*"))
    assert f"continuations by {model}" in invoke("status", run, "--verify").out
    result = invoke("run", "repair", run)
    assert f"next: opdctl run continuations {run} --step 0" in result.err
    settings = ("--set", "continuations.responses=2", "--set", "continuations.samples=1")
    assert invoke("run", "continuations", run, "--step", 0, *settings).code == 0
    assert without_corrupt(run) == wanted


@pytest.mark.parametrize("step", [1, 2])
def test_corrupt_trainer_state_is_set_aside_and_its_updates_are_replayed(run: Path, tmp_path: Path, step: int) -> None:
    reference = Path(shutil.copytree(run, tmp_path / "reference"))
    cut(first(run, f"trainer/step-0000{step}/*.safetensors"))
    assert invoke("status", run, "--verify").code == ExitCode.BAD_DATA
    result = invoke("run", "repair", run)
    assert result.code == 0, result.err
    assert not (run / f"trainer/step-0000{step}").exists()
    assert invoke("status", run, "--verify").code == 0
    more = ("--set", "train.steps=3", "--set", "eval.every_steps=0")
    for path in (run, reference):
        assert invoke("train", "--output", path, *more).code == 0
    name = "student/step-00003/model.safetensors"
    assert (run / name).read_bytes() == (reference / name).read_bytes()


def test_corrupt_older_student_is_set_aside_for_good(run: Path) -> None:
    cut(run / "student/step-00001/model.safetensors")
    assert invoke("status", run, "--verify").code == ExitCode.BAD_DATA
    result = invoke("run", "repair", run)
    assert result.code == 0, result.err
    assert "cannot be regenerated" in result.err
    assert (run / "corrupt/student/step-00001/model.safetensors").exists()
    assert invoke("status", run, "--verify").code == 0


def test_rollout_of_a_pruned_student_is_reported_and_left_in_place(run: Path) -> None:
    shutil.rmtree(run / "student/step-00001")
    path = first(run, "step-00001/rollout/part-*")
    cut(path)
    before = contents(run)
    for options in ([], ["--dry-run"]):
        result = invoke("run", "repair", run, *options, "--json")
        assert result.code == ExitCode.BAD_DATA
        assert str(path) in result.err
        assert "cannot be regenerated and is left in place" in result.err
        assert result.json()["moved"] == []
        assert result.json()["corrupt"][0]["command"] is None
        assert contents(run) == before


def test_everything_at_once(run: Path) -> None:
    wanted = contents(run)
    for pattern in ("step-0000?/rollout/part-*", "step-0000?/teacher/part-*", "eval/*/step-00002/part-*"):
        for path in run.glob(pattern):
            cut(path)
    flip(run / "student/step-00002/model.safetensors")
    result = invoke("run", "repair", run, "--json")
    assert result.code == 0, result.err
    assert len(result.json()["moved"]) == 4 + 4 + len([*run.glob("corrupt/eval/*/*/part-*")]) + 1
    assert len(run_next_commands(result.err)) == 6
    assert without_corrupt(run) == wanted


def test_dry_run_moves_nothing(run: Path) -> None:
    cut(first(run, "step-00000/rollout/part-*"))
    before = contents(run)
    result = invoke("run", "repair", run, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert "nothing was written" in result.err
    assert (len(result.json()["corrupt"]), result.json()["moved"]) == (1, [])
    assert contents(run) == before


def test_repair_of_an_intact_run_changes_nothing(run: Path) -> None:
    before = contents(run)
    result = invoke("run", "repair", run, "--json")
    assert (result.code, result.json()["corrupt"], result.json()["moved"]) == (0, [], [])
    assert f"next: opdctl analyze-position {run}" in result.err
    assert contents(run) == before
    assert not (run / "corrupt").exists()


@pytest.mark.parametrize("stage", ["rollout", "teacher"])
def test_finished_part_that_was_removed_is_regenerated_without_repair(run: Path, stage: str) -> None:
    wanted, path = contents(run), sorted((run / "step-00001" / stage).glob("part-*"))[1]
    path.unlink()
    result = invoke("run", "repair", run)
    assert (result.code, "no corrupt files" in result.out) == (0, True)
    result = invoke("rollout" if stage == "rollout" else "score-teacher", "--output", run, "--step", 1)
    assert result.code == 0, result.err
    assert str(path) in result.err
    assert contents(run) == wanted


def test_model_card_may_be_edited(run: Path) -> None:
    card = run / "student/step-00002/README.md"
    card.write_text("my own words")
    assert invoke("status", run, "--verify").code == 0
    more = ("--set", "train.steps=3", "--set", "eval.every_steps=0")
    assert invoke("train", "--output", run, *more).code == 0
    assert card.read_text() == "my own words"


def test_missing_newest_student_is_written_also_with_other_settings(run: Path) -> None:
    """Its card lists other settings then."""
    wanted = (run / "student/step-00002/model.safetensors").read_bytes()
    shutil.rmtree(run / "student/step-00002")
    assert invoke("train", "--output", run, "--set", "train.steps=3", "--set", "eval.every_steps=0").code == 0
    assert (run / "student/step-00002/model.safetensors").read_bytes() == wanted
    assert invoke("status", run, "--verify").code == 0


def test_missing_newest_student_is_written_by_the_next_command_that_status_names(run: Path) -> None:
    wanted = contents(run)
    shutil.rmtree(run / "student/step-00002")
    status = invoke("status", run, "--json")
    assert status.code == ExitCode.BAD_DATA
    assert invoke(*status.json()["next"].split()[1:]).code == 0
    assert contents(run) == wanted
