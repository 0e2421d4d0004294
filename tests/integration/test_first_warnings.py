"""What a run warns of at its start, before hours are spent: prompts, endings, a teacher that is far away."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, Result, invoke, sets

from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model
from opdctl.runs.run import Run
from opdctl.training import trainer


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*overrides: str) -> Result:
    result = invoke("train", "--recipe", QUICKSTART, *sets("train.steps=1", "eval.every_steps=0", *overrides))
    assert result.code == 0, result.err
    return result


def warnings(result: Result, words: str) -> list[str]:
    """Return the warnings with these words."""
    return [line for line in result.err.splitlines() if line.startswith("warning") and words in line]


@pytest.mark.parametrize(("long", "hint"), [(1, False), (2, True)])
def test_many_dropped_prompts(long: int, hint: bool) -> None:
    """1 of 21 is less than 5 %."""
    lines = [json.dumps({"prompt": "a?"}) + "\n"] * 20 + [json.dumps({"prompt": "abc?"}) + "\n"] * long
    Path("p.jsonl").write_text("".join(lines))
    result = train("prompts.source=p.jsonl", "prompts.limit=22", "prompts.max_tokens=3", 'prompts.on_too_long="drop"')
    (warning,) = warnings(result, "dropped")
    assert f"dropped {long} of {20 + long} prompts: longer than prompts.max_tokens = 3" in warning
    assert ("raise it" in warning) == hint


def test_responses_that_never_end() -> None:
    (warning,) = warnings(train("rollout.max_tokens=2"), "none of")
    assert "none of the first 4 responses ended within rollout.max_tokens = 2: a response ends at 1 `<eos>`" in warning
    later = invoke("rollout", "--run", "runs/quickstart", "--set", "train.steps=2")
    assert later.code == 0
    assert not warnings(later, "none of")


def test_teacher_that_is_far_from_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = ("rollout.top_k=4", "score.top_k=4", "name=run")
    assert not warnings(train(*stored), "most probable")
    overlap = Run.load(Path("runs/run")).update(0)["metrics"]["top_k_overlap"]
    assert 0.1 < overlap < 0.9
    monkeypatch.setattr(trainer, "LOW_OVERLAP", 0.9)
    (warning,) = warnings(train(*stored, "name=other", "train.steps=2"), "most probable")  # in the first step alone
    assert "in step 0" in warning


def test_prompts_that_start_twice(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(find_or_download(Model(model="toy:student"), "model"), model)
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"bos_token": "<pad>"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    template = (model / "chat_template.jinja").read_text()
    for start, expected in (("{{ bos_token }}", 0), ("{{ bos_token }}{{ bos_token }}", 32)):
        (model / "chat_template.jinja").write_text(start + template)
        models = (f"student.model={model}", f"teacher.model={model}", "prompts.max_tokens=15")
        found = warnings(train(*models, f"name=starts-{expected}"), "start with two <pad>")
        assert len(found) == bool(expected)
        assert not found or f"{expected} of 32 prompts" in found[0]


def test_plan_shows_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab?", "hint": "ba?"}\n' * 8)
    options = sets("prompts.source=p.jsonl", "prompts.limit=8", "prompts.teacher_prompt_column=hint")
    plan = invoke("train", "--recipe", QUICKSTART, *options, "--dry-run", "--json").json()
    assert plan["first_prompt"] == {
        "student": {"id": "0", "text": "ab?", "token_ids": [2, 3, 38], "pieces": ["a", "b", "?"]},
        "teacher": {"id": "0", "text": "ba?", "token_ids": [3, 2, 38], "pieces": ["b", "a", "?"]},
    }
    shown = invoke("train", "--recipe", QUICKSTART, *options, "--dry-run").out.splitlines()
    assert "3 tokens  2 'a', 3 'b', 38 '?'" in shown
    assert "3 tokens  3 'b', 2 'a', 38 '?'" in shown
