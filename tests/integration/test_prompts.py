"""Prompts of runs and evaluations: rendered once, with ids that the models have, and ended by tokens of the recipe."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import QUICKSTART, Result, contents, invoke, sets
from helpers.evaluations import SHORT_EVAL, evaluation_path
from transformers import AutoTokenizer

from opdctl.artifacts import files, tables
from opdctl.artifacts.records import EvalPrompt, GradedResponse, Prompt, Response
from opdctl.artifacts.stage_dir import recorded_stage
from opdctl.errors import ExitCode
from opdctl.evaluation.results import load_evaluation
from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model

LETTER_OF_THE_MICROSECOND = "{{ 'abcdefghij'[strftime_now('%f')[-2] | int] }}"
"""A template that renders another prompt at almost every call."""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def copy_model(folder: Path, name: str = "toy:student", template: str = "", token: str | None = None) -> Path:
    """Copy a toy model. template: appended to its own. token: added to its tokenizer, but to no matrix."""
    shutil.copytree(find_or_download(Model(model=name), "model"), folder)
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(template)
    if token is not None:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary[token] = len(vocabulary)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def evaluate(model: Path, *args: object, settings: tuple[str, ...] = SHORT_EVAL) -> Result:
    options = [word for setting in settings for word in ("--set", setting)]
    return invoke("eval", "--model", model, "--bench", "sort12", *options, *args)


def stored_prompts(path: Path) -> list[EvalPrompt]:
    stage = recorded_stage(path / "prompts", "opdctl eval")
    assert stage is not None
    return stage.read_all(EvalPrompt)


# ── Rendered once ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_evaluation_keeps_the_prompts_of_its_start(tmp_path: Path) -> None:
    """A part that is made at another time is as if it had been made with the others."""
    model = copy_model(tmp_path / "model", template=LETTER_OF_THE_MICROSECOND)
    result = evaluate(model)
    assert result.code == 0, result.err
    assert "clock" in result.err
    path = evaluation_path(tmp_path)
    before = contents(path)
    assert [row.problem_id for row in stored_prompts(path)] == [
        *dict.fromkeys(row.problem_id for row in load_evaluation(path).rows())
    ]
    for part in sorted(path.glob("part-*"))[:2]:
        part.unlink()
    assert evaluate(model).code == 0
    assert contents(path) == before


def test_evaluation_without_stored_prompts_is_continued(tmp_path: Path) -> None:
    """Earlier versions stored no prompts."""
    model = copy_model(tmp_path / "model")
    assert evaluate(model).code == 0
    path = evaluation_path(tmp_path)
    before = contents(path)
    shutil.rmtree(path / "prompts")
    sorted(path.glob("part-*"))[0].unlink()
    assert evaluate(model).code == 0
    assert contents(path) == before


def test_prompts_of_other_settings_are_not_used(tmp_path: Path) -> None:
    """An evaluation that ends before its first part leaves nothing but the prompts."""
    model = copy_model(tmp_path / "model", template="{{ letter }}")
    assert evaluate(model, "--set", "eval.template_arguments={letter='a'}").code == 0
    path = evaluation_path(tmp_path)
    assert {int(row.prompt_ids[-1]) for row in stored_prompts(path)} == {2}
    for file in path.iterdir():
        if file.is_file():
            file.unlink()
    assert evaluate(model, "--set", "eval.template_arguments={letter='b'}").code == 0
    assert {int(row.prompt_ids[-1]) for row in stored_prompts(path)} == {3}


def test_corrupt_prompts_are_named_and_repaired(finished_copy: Path) -> None:
    path = finished_copy / "eval/sort12/step-00002"
    (part,) = (path / "prompts").glob("part-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    answers = sorted(path.glob("part-*"))[0]
    expected = answers.read_bytes()
    answers.unlink()
    result = invoke("eval", "--run", finished_copy)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert "run repair" in result.err
    assert part.name in result.err
    repaired = invoke("run", "repair", finished_copy)
    assert str(part.relative_to(finished_copy)) in repaired.err
    assert invoke("eval", "--run", finished_copy).code == 0
    assert (part.read_bytes(), answers.read_bytes()) == (whole, expected)


def test_run_with_a_clock_in_its_template_is_warned_of_once(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model", template=LETTER_OF_THE_MICROSECOND)
    settings = sets(f"student.model={model}", "prompts.max_tokens=14")
    result = invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run")
    assert result.code == 0, result.err
    assert result.err.count("reads the clock") == 1


# ── Chat templates of the recipe ─────────────────────────────────────────────────────────────────────────────────────

AB = "{% for m in messages %}{{ m.content }}{% endfor %}ab"
C_AND_LETTER = "c{% for m in messages %}{{ m.content }}{% endfor %}{{ letter }}"
A, B, C, D = 2, 3, 4, 5


def test_templates_of_student_and_teacher_are_those_of_the_whole_run(tmp_path: Path) -> None:
    for name, template in (("student", AB), ("teacher", C_AND_LETTER)):
        Path(f"{name}.jinja").write_text(template)
    teacher = ("teacher.chat_template=teacher.jinja", "teacher.template_arguments={letter='d'}")
    settings = sets(
        "prompts.chat_template=student.jinja", *teacher, "train.steps=1", "eval.limit=4", "prompts.max_tokens=15"
    )
    run = tmp_path / "run"
    result = invoke("train", "--recipe", QUICKSTART, *settings, "--output", run)
    assert result.code == 0, result.err
    for prompt in tables.read_rows(run / "prompts.parquet", Prompt):
        text = prompt.prompt_ids[:-2].tolist()
        assert prompt.prompt_ids.tolist() == [*text, A, B]
        assert prompt.teacher_prompt_ids is not None
        assert prompt.teacher_prompt_ids.tolist() == [C, *text, D]
    student = run / "student/step-00001"
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "dd"}], tokenize=False) == "ddab"
    for model in ([], ["--model", "teacher"]):
        assert invoke("eval", "--run", run, "--bench", "sort12", *model).code == 0
    evaluations = [run / "eval/sort12" / name for name in ("step-00001", "teacher")]
    for path, (start, end) in zip(evaluations, (([], [A, B]), ([C], [D])), strict=True):
        for row in stored_prompts(path):
            ids = row.prompt_ids.tolist()
            assert (ids[: len(start)], ids[-len(end) :]) == (start, end)
    protocols = [files.read_json(path / "summary.json")["protocol"] for path in evaluations]
    assert [protocol["template_arguments"] for protocol in protocols] == [{}, {"letter": "d"}]
    assert len({protocol["chat_template"] for protocol in protocols}) == 2

    Path("student.jinja").write_text(AB + "c")
    changed = invoke("train", run)
    assert (changed.code, changed.kind) == (ExitCode.RECIPE_MISMATCH, "source_mismatch")
    assert "prompts.chat_template changed" in changed.err
    for name in ("student", "teacher"):
        Path(f"{name}.jinja").unlink()
    (run / "prompts.parquet").unlink()
    again = invoke("train", run, "--set", "train.steps=2")
    assert again.code == 0, again.err
    assert (run / "student/step-00002/chat_template.jinja").read_text() == AB


def test_evaluation_has_the_system_turn_of_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = sets("prompts.system=ab", "prompts.max_tokens=15", "eval.limit=4")
    assert invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", run).code == 0
    assert invoke("eval", "--run", run, "--bench", "sort12").code == 0
    path = run / "eval/sort12/step-00000"
    assert {tuple(row.prompt_ids[:2].tolist()) for row in stored_prompts(path)} == {(A, B)}
    assert files.read_json(path / "summary.json")["protocol"]["system"] == "ab"
    other = invoke("eval", "--run", run, "--bench", "sort12", "--set", "eval.system=''")
    assert (other.code, other.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")
    assert "eval.system 'ab' → ''" in other.err


def test_evaluation_of_a_model_depends_on_the_text_of_the_template(tmp_path: Path) -> None:
    model, template = copy_model(tmp_path / "model"), ("--set", "prompts.chat_template=chat.jinja")
    Path("chat.jinja").write_text(AB)
    assert evaluate(model, *template).code == 0
    assert {tuple(row.prompt_ids[-2:].tolist()) for row in stored_prompts(evaluation_path(tmp_path))} == {(A, B)}
    Path("chat.jinja").write_text(AB + "c")
    again = evaluate(model, *template)
    assert (again.code, again.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")


def test_template_of_the_recipe_is_checked_by_a_plan(tmp_path: Path) -> None:
    for content, kind in ((None, "missing_file"), ("hello", "unsupported_model")):
        if content:
            Path("chat.jinja").write_text(content)
        for dry in ([], ["--dry-run"]):
            settings = sets("prompts.chat_template=chat.jinja")
            result = invoke("train", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run", *dry)
            assert result.kind == kind, result.err
            assert not (tmp_path / "run").exists()


# ── The vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────


def models_with_a_token_too_many(folder: Path) -> list[str]:
    """Return the overrides for a student and a teacher whose tokenizers have the token `A`, and matrices not."""
    return [f"{name}.model={copy_model(folder / name, f'toy:{name}', token='A')}" for name in ("student", "teacher")]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "plan"])
@pytest.mark.parametrize("column", ["prompt", "hint"])
def test_prompt_with_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, dry: list[str], column: str) -> None:
    rows = [{"prompt": "ab", "hint": "ba"} for _ in range(8)]
    rows[2][column] = "abA"
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (*models_with_a_token_too_many(tmp_path), "prompts.source=p.jsonl", "prompts.limit=8")
    settings = sets(*overrides, "prompts.teacher_prompt_column=hint")
    result = invoke("train", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run", *dry)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "invalid_data"), result.err
    assert all(part in result.err for part in ("p.jsonl: row 3", "`A`", "56"))
    assert not (tmp_path / "run").exists()


def test_benchmark_with_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model", token="A")
    Path("mine.jsonl").write_text('{"problem": "ab", "answer": "1"}\n{"problem": "aA", "answer": "1"}\n')
    options = [word for setting in (*SHORT_EVAL, "eval.suffix=") for word in ("--set", setting)]
    result = invoke("eval", "--model", model, "--bench", "mine.jsonl", *options)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "invalid_data"), result.err
    assert all(part in result.err for part in ("mine.jsonl: row 2", "`A`", "56"))
    assert not list(tmp_path.rglob("part-*"))


# ── End of sequence ──────────────────────────────────────────────────────────────────────────────────────────────────


def rollout(run: Path, *overrides: str) -> list[Response]:
    settings = sets("rollout.max_tokens=40", *overrides)
    result = invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", run)
    assert result.code == 0, result.err
    parts = sorted((run / "step-00000/rollout").glob("part-*"))
    return [row for part in parts for row in tables.read_rows(part, Response)]


def test_response_ends_at_a_token_of_the_recipe(tmp_path: Path) -> None:
    plain = rollout(tmp_path / "plain")
    token = int(plain[0].response_ids[3])
    chosen = rollout(tmp_path / "chosen", f"rollout.eos_token_ids=[{token}, 1]")
    for row, cut in zip(plain, chosen, strict=True):
        ends = np.flatnonzero(np.isin(row.response_ids, [token, 1]))
        np.testing.assert_array_equal(
            cut.response_ids, row.response_ids[: ends[0] + 1] if len(ends) else row.response_ids
        )
        assert cut.finish_reason == ("stop" if len(ends) else "length")


def test_tokens_of_the_recipe_belong_to_the_run(tmp_path: Path) -> None:
    rollout(tmp_path / "run")
    settings = sets("rollout.max_tokens=40", "rollout.eos_token_ids=[1]")
    result = invoke("rollout", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run")
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "recipe_mismatch")
    assert "rollout.eos_token_ids" in result.err


def test_evaluation_ends_at_a_token_of_the_recipe(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    token = 20
    ended = (*SHORT_EVAL, f"rollout.eos_token_ids=[{token}]")
    assert evaluate(model, "--output", tmp_path / "chosen", settings=ended).code == 0
    path = evaluation_path(tmp_path / "chosen")
    rows: list[GradedResponse] = load_evaluation(path).rows()
    for row in rows:
        assert (row.finish_reason == "stop") == (row.response_ids[-1] == token)
        assert token not in row.response_ids[:-1]
    summary: dict[str, Any] = files.read_json(path / "summary.json")
    assert summary["protocol"]["eos_token_ids"] == [token]
    again = evaluate(model, "--output", tmp_path / "chosen")
    assert (again.code, again.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")


def test_broken_generation_config_fails_a_plan_as_it_fails_a_run(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": "1"}')
    for dry in ([], ["--dry-run"]):
        result = invoke("train", "--recipe", QUICKSTART, *sets(f"student.model={model}"), "--output", "run", *dry)
        assert (result.code, result.kind) == (ExitCode.BAD_DATA, "invalid_model"), result.err
        assert str(model / "generation_config.json") in result.err
        assert not Path("run").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "plan"])
def test_teacher_that_ends_elsewhere_is_warned_of(tmp_path: Path, dry: list[str]) -> None:
    teacher = copy_model(tmp_path / "teacher", "toy:teacher")
    (teacher / "generation_config.json").write_text('{"eos_token_id": [1, 20]}')
    output = ("--output", tmp_path / "run", *dry)
    result = invoke("train", "--recipe", QUICKSTART, *sets(f"teacher.model={teacher}", "train.steps=1"), *output)
    assert result.code == 0, result.err
    (warning,) = (line for line in result.err.splitlines() if line.startswith("warning"))
    assert "rollout.eos_token_ids = [1, 20]" in warning


def test_suffix_of_an_evaluation_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"problem": "ab? go", "answer": "1"}\n{"problem": "ab?", "answer": "1"}\n')
    options = sets(
        "rollout.engine=transformers", "eval.suffix= go", "eval.samples=1", "eval.max_tokens=2", "eval.limit=2"
    )
    result = invoke("eval", "--model", "toy:student", "--bench", "mine.jsonl", *options, "--output", "out")
    assert result.code == 0, result.err
    (path,) = Path("out/eval/mine").glob("toy-student-*")
    first, second = stored_prompts(path)
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist()


# ── The tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "plan"])
def test_recipe_chooses_between_class_and_file(tmp_path: Path, dry: list[str]) -> None:
    overrides = []
    for name in ("student", "teacher"):
        model = copy_model(tmp_path / name, f"toy:{name}")
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
        overrides.append(f"{name}.model={model}")
    refused = invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / "run", *dry)
    assert (refused.code, refused.kind) == (ExitCode.USAGE, "unsupported_model")
    assert str(tmp_path / "student") in refused.err
    assert not (tmp_path / "run").exists()
    chosen = sets(*overrides, "student.tokenizer=file", "teacher.tokenizer=file")
    result = invoke("rollout", "--recipe", QUICKSTART, *chosen, "--output", tmp_path / "run", *dry)
    assert result.code == 0, result.err
    if not dry:
        plain = invoke("rollout", "--recipe", QUICKSTART, *sets(), "--output", tmp_path / "plain")
        assert plain.code == 0, plain.err
        assert Path("run/prompts.parquet").read_bytes() == Path("plain/prompts.parquet").read_bytes()
