"""`--dry-run` opens what the command itself opens, fails as it does, and writes nothing.

What it leaves out needs a GPU or a response: vLLM, memory, the self-checks of loaded models.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, Result, contents, invoke, sets

from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model

HUB, DEAD_URL = "nobody/nothing", "http://127.0.0.1:9/v1"
LORA = ("lora.rank=2", "lora.alpha=4.0")
NEW_RUNS = {  # settings of a recipe that a run cannot start with
    "student of the hub": [f"student.model={HUB}"],
    "teacher of the hub": [f"teacher.model={HUB}"],
    "student that is missing": ["student.model=./none"],
    "prompts of the hub": [f"prompts.source={HUB}"],
    "prompts that are missing": ["prompts.source=none.jsonl"],
    "benchmark of the hub": ['eval.bench=["gsm8k"]', "eval.every_steps=1"],
    "benchmark that runs code": ['eval.bench=["humaneval_plus"]', "eval.every_steps=1"],
    "benchmark that is missing": ['eval.bench=["none.jsonl"]', "eval.every_steps=1"],
    "benchmark that the tokenizer cannot write": ['eval.bench=["digits.jsonl"]', "eval.every_steps=1"],
    "server that does not answer": [
        "score.engine=server",
        "teacher.server=http://127.0.0.1:9/v1",
        "server.max_retries=0",
    ],
    "modules of adapters that are missing": [*LORA, 'lora.target_modules=["q_porj"]'],
    "top-k beyond the vocabulary": ["rollout.top_k=56", "score.top_k=4"],
}
EXISTING_RUNS: dict[str, tuple[list[str], Callable[[Path], object]]] = {  # a command, and what happened to the run
    "another recipe": (["train", "--set", "weight.gamma=0.9"], lambda run: None),
    "another teacher under the same path": (["train", "--set", "train.steps=3"], lambda run: change_teacher(run)),
    "teacher that is gone": (["score-teacher"], lambda run: shutil.rmtree(teacher_of(run))),
    "corrupt newest student": (["train", "--set", "train.steps=3"], lambda run: cut(run / "student/step-00002")),
    "student of no such step": (["eval", "--step", "9"], lambda run: None),
    "evaluation with other settings": (["eval", "--set", "eval.max_tokens=20"], lambda run: None),
    "evaluation of a corrupt student": (["eval", "--bench", "perm5"], lambda run: cut(run / "student/step-00002")),
    "benchmark of the hub": (["eval", "--bench", "gsm8k"], lambda run: None),
    "benchmark that runs code": (["eval", "--bench", "mbpp_plus"], lambda run: None),
    "model of the hub": (["eval", "--model", HUB], lambda run: None),
    "analysis of a corrupt part": (["analyze-position"], lambda run: cut(run / "step-00001/teacher")),
    "analysis with a weight that is missing": (["analyze-position", "--weights", "none"], lambda run: None),
    "fork of a corrupt trainer state": (
        ["run", "fork", "new", "--set", "weight.gamma=0.9"],
        lambda run: cut(run / "trainer/step-00002"),
    ),
    "fork into an existing directory": (["run", "fork", "run", "--set", "weight.gamma=0.9"], lambda run: None),
    "prune with a corrupt newest student": (["run", "prune"], lambda run: cut(run / "student/step-00002")),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    return tmp_path


def teacher_of(run: Path) -> Path:
    return Path(json.loads((run / "run.json").read_text())["models"]["teacher"]["path"])


def change_teacher(run: Path) -> None:
    path = teacher_of(run) / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2}))


def cut(path: Path) -> None:
    """Cut the first data file of a directory."""
    file = next(each for each in sorted(path.iterdir()) if each.suffix == ".safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def check_same_error(dry: Result, real: Result) -> None:
    assert real.code not in (0, None), real.err
    assert (dry.code, errors(dry)) == (real.code, errors(real)), (dry.err, real.err)


def errors(result: Result) -> str:
    """Return the error and its hint."""
    return result.err[result.err.index("error: ") :]


@pytest.mark.parametrize("name", NEW_RUNS)
def test_new_run(name: str, home: Path) -> None:
    words = ["train", "--recipe", QUICKSTART, *sets(*NEW_RUNS[name]), "--output", home / "run"]
    before = contents(home)
    dry = invoke(*words, "--dry-run")
    assert contents(home) == before
    assert not (home / "run").exists()
    check_same_error(dry, invoke(*words))


@pytest.mark.parametrize("name", EXISTING_RUNS)
def test_existing_run(name: str, finished_run: Path, home: Path) -> None:
    words, happen = EXISTING_RUNS[name]
    run = home / "run"
    if "teacher" in name:
        shutil.copytree(find_or_download(Model(model="toy:teacher"), "teacher.model"), home / "teacher")
        start = ["--recipe", QUICKSTART, *sets("rollout.max_tokens=8", "train.steps=1", "teacher.model=./teacher")]
        assert invoke("rollout", *start, "--output", run).code == 0
    else:
        shutil.copytree(finished_run, run)
    happen(run)
    before = contents(home)
    options = ["--run", run, *words[2:]] if words[0] == "run" else ["--run", run, *words[1:]]
    command = words[:2] if words[0] == "run" else words[:1]
    dry = invoke(*command, *options, "--dry-run")
    assert contents(home) == before
    check_same_error(dry, invoke(*command, *options))


def test_plan_is_printed_although_the_hub_is_out_of_reach(home: Path) -> None:
    dry = invoke("train", "--recipe", "cross_scale", "--dry-run", "--json")
    assert (dry.code, dry.kind) == (5, "failed_download")
    assert dry.json()["steps"] > 0
    assert list(home.iterdir()) == [home / "digits.jsonl"]


def test_hub_that_is_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request waits for its retries."""
    asked = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    result = invoke("train", "--recipe", "cross_scale", "--dry-run")
    assert (result.kind, len(asked)) == ("failed_download", 1)
    assert result.out.startswith("plan\n")
