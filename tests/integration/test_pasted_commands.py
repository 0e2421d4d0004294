"""Each command and path that a message names works when it is pasted into a shell, in the life of a run whose directory
has blanks, a quote and a letter beyond ASCII."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, Result, contents, invoke
from helpers.shell import commands_in, paste, run_pasted

from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model

NAME = "my runs/o'ne ü"
RUN = Path(NAME)


@pytest.fixture(autouse=True)
def home(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the finished run under its difficult name."""
    shutil.copytree(finished_run, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def advice(result: Result, code: int = 0) -> list[str]:
    """Return the commands that a result names, at least one."""
    assert result.code == code, result.err
    named = commands_in(result)
    assert named, (result.out, result.err)
    return named


def suggestion(result: Result) -> str:
    """Return what a message suggests in the place of a name."""
    assert result.code == 2
    (text,) = re.findall(r"did you mean `([^`]+)`", result.err)
    return str(text)


# ── The life of a run ────────────────────────────────────────────────────────────────────────────────────────────────


def test_next_command_of_a_finished_run(home: Path) -> None:
    for words in (["train"], ["rollout"], ["score-teacher"], ["eval"], ["run", "repair"], ["status"]):
        (command,) = advice(invoke(*words, NAME))
        assert paste(command, home) == [["analyze-position", NAME]], words
    analyzed = run_pasted(command, home)
    (path,) = re.findall(r"^wrote (.+), \d+ tables", analyzed.err, flags=re.MULTILINE)
    paste(f"test -f {path}", home)
    (command,) = advice(analyzed)
    assert run_pasted(command, home).code == 0
    assert paste(command, home)[0][:3] == ["run", "show", NAME]


def test_interrupted_training_is_continued_by_the_command_of_its_status(home: Path) -> None:
    before = contents(RUN)
    for lost in ("student/step-00002", "trainer/step-00002", "step-00001/teacher", "step-00001/update.json"):
        shutil.rmtree(RUN / lost) if (RUN / lost).is_dir() else (RUN / lost).unlink()
    command, done = f"opdctl status {quoted()}", []
    while not command.startswith("opdctl analyze-position"):
        done.append(command.split()[1])
        assert len(done) < 5, done
        (command,) = advice(run_pasted(command, home))
    assert done == ["status", "score-teacher", "train"]
    assert {name: data for name, data in contents(RUN).items() if "part-" in name} == {
        name: data for name, data in before.items() if "part-" in name
    }


def test_corrupt_file_is_repaired_by_the_commands_of_the_messages(home: Path) -> None:
    before = contents(RUN)
    part = next(RUN.glob("step-00001/teacher/part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    dry = run_pasted(advice(invoke("run", "repair", NAME, "--dry-run"))[0], home)
    assert contents(RUN) != before
    for command in advice(dry):
        assert run_pasted(command, home).code == 0
    shutil.rmtree(RUN / "corrupt")
    assert contents(RUN) == before


def test_corrupt_file_named_by_another_command(home: Path) -> None:
    part = next(RUN.glob("step-00001/teacher/part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    assert [run_pasted(command, home).code for command in advice(invoke("analyze-position", NAME), 3)] == [0, 0]
    assert invoke("status", NAME, "--verify").code == 0


@pytest.mark.parametrize("steps", [[], ["--set", "train.steps=3"]], ids=["steps of the run", "more steps"])
def test_ways_on_after_a_changed_recipe_of_a_finished_run(steps: list[str], home: Path) -> None:
    """The fork has steps to make: it trains without a further option."""
    refused = invoke("train", NAME, "--set", "train.learning_rate=1e-5", *steps)
    resume, fork = advice(refused, 4)
    assert run_pasted(resume, home).code == 0
    (following,) = advice(run_pasted(fork, home))
    assert paste(following, home)[0][1:] == [f"{NAME}-fork"]
    trained = invoke("train", f"{NAME}-fork")
    assert trained.code == 0, trained.err
    assert f"{3 if steps else 4} of {3 if steps else 4} steps" in trained.out
    assert f"'{NAME}-fork-2'".replace("o'ne", "o'\"'\"'ne") in invoke("train", NAME, "--set", "weight.gamma=0.9").err
    (remove,) = re.findall(r"use another --output, or remove (.+)$", refused.err, flags=re.MULTILINE)
    paste(f"rm -r {remove}", home)
    assert not RUN.exists()


def test_setting_that_no_fork_can_change_names_the_command_of_a_new_run(home: Path) -> None:
    refused = invoke("run", "fork", NAME, "fork", "--set", "seed=7")
    (start,) = advice(refused, 2)
    plan = run_pasted(f"{start} --dry-run --json", home)
    assert plan.json()["run_dir"] == f"{NAME}-new"


def test_evaluation_with_other_settings_names_what_to_remove(home: Path) -> None:
    refused = invoke("eval", NAME, "--set", "eval.max_tokens=20")
    assert (refused.code, refused.kind) == (4, "settings_mismatch")
    (path,) = re.findall(r"or remove (.+) to regenerate it$", refused.err, flags=re.MULTILINE)
    paste(f"rm -r {path}", home)
    assert invoke("eval", NAME, "--set", "eval.max_tokens=20").code == 0


def test_pruned_run(home: Path) -> None:
    (command,) = advice(invoke("run", "prune", NAME, "--keep-last", 2, "--no-keep-best", "--dry-run"))
    assert paste(command, home) == [["run", "prune", NAME, "--keep-last", "2", "--no-keep-best"]]
    (following,) = advice(run_pasted(command, home))
    assert run_pasted(f"{following} --dry-run", home).code == 0


def test_command_without_a_run_names_it(home: Path) -> None:
    (home / "runs").mkdir()
    RUN.rename(home / "runs" / RUN.name)
    (command,) = advice(invoke("run", "prune"), 2)
    assert run_pasted(command, home).code == 0


def test_lost_records_of_a_run(home: Path) -> None:
    (RUN / "run.json").unlink()
    (command,) = advice(invoke("status", NAME), 2)
    assert run_pasted(command, home).code == 0
    (RUN / "recipe.toml").unlink()
    (command, *_) = advice(invoke("status", NAME), 2)
    assert run_pasted(command, home).code == 0
    assert invoke("status", NAME).code == 0


def test_paths_of_the_students_can_be_pasted(home: Path) -> None:
    shown = invoke("status", NAME).out
    for label in ("newest student", "best student"):
        (path,) = re.findall(rf"^{label} +(.+?)(?:  \(.*\))?$", shown, flags=re.MULTILINE)
        paste(f"test -f {path}/model.safetensors", home)


# ── Typos ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_misspelt_recipe(home: Path) -> None:
    folder = home / "my recipes"
    folder.mkdir()
    shutil.copy(QUICKSTART, folder / "o'wn.toml")
    for name in ("quickstrat", "my recipes/own.toml"):
        near = suggestion(invoke("train", "--recipe", name, "--dry-run"))
        assert run_pasted(f"opdctl train --recipe {near} --dry-run", home).code == 0


def test_misspelt_run(home: Path) -> None:
    assert run_pasted(f"opdctl status {suggestion(invoke('status', 'my runs/one ü'))}", home).code == 0


def test_misspelt_benchmark_and_data(home: Path) -> None:
    near = suggestion(invoke("eval", NAME, "--bench", "sort21"))
    assert run_pasted(f"opdctl eval {quoted()} --bench {near}", home).code == 0
    (home / "own.jsonl").write_text('{"problem": "ab", "answer": "ab"}\n')
    near = suggestion(invoke("eval", NAME, "--bench", "onw.jsonl"))
    assert run_pasted(f"opdctl eval {quoted()} --bench {near} --set eval.suffix= --dry-run", home).code == 0


def test_misspelt_weight_and_key(home: Path) -> None:
    near = suggestion(invoke("analyze-position", NAME, "--weights", "iw_odp"))
    assert run_pasted(f"opdctl analyze-position {quoted()} --weights {near} --dry-run", home).code == 0
    near = suggestion(invoke("train", NAME, "--set", "train.stesp=2"))
    assert run_pasted(f"opdctl train {quoted()} --set train.{near}=2", home).code == 0
    near = suggestion(invoke("train", "--recipe", QUICKSTART, "--set", "weight.name=unifrom"))
    assert run_pasted(f"opdctl train --recipe quickstart --set weight.name={near} --dry-run", home).code == 0


def test_misspelt_model_directory(home: Path) -> None:
    shutil.copytree(find_or_download(Model(model="toy:student"), "student.model"), home / "my models" / "st'udent")
    refused = invoke("eval", "--model", "./my models/student", "--bench", "sort12")
    assert refused.code == 2
    near = suggestion(refused)
    paste(f"test -f {near}/config.json", home)


@pytest.mark.parametrize(
    ("words", "right"),
    [(["trian"], "train"), (["run", "repiar"], "repair"), (["train", "--recpie", "x"], "--recipe")],
)
def test_misspelt_command_and_option(words: list[str], right: str) -> None:
    result = invoke(*words)
    assert result.code == 2
    assert right in result.err


def test_missing_sample_is_suggested(home: Path) -> None:
    refused = invoke("run", "show", NAME, "none")
    (sample,) = re.findall(r"such as (\S+)", refused.err)
    assert run_pasted(f"opdctl run show {quoted()} {sample}", home).code == 0


def quoted() -> str:
    return '"my runs/o\'ne ü"'


def test_setting_for_a_problem_that_the_tokenizer_cannot_write(home: Path) -> None:
    (home / "own.jsonl").write_text('{"problem": "ab", "answer": "ab"}\n')
    refused = invoke("eval", NAME, "--bench", "own.jsonl")
    (setting,) = re.findall(r"set (eval\.\w+) if the appended text is the cause", refused.err)
    assert invoke("eval", NAME, "--bench", "own.jsonl", "--set", f"{setting}=").code == 0
