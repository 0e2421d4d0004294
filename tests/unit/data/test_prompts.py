"""Prompts: from the toy task and from files, valid and invalid, to token ids."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdctl.data.messages import Chat, Message
from opdctl.data.prompts import Problem, load_problems, tokenize
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.toy.task import split_of
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.prompts import Prompts
from opdctl.recipe.schema import Model

Rows = list[dict[str, Any]]
SUFFIXES = (".jsonl", ".parquet")
HARD = {"difficulty": ">= 6"}


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    """The toy models' tokenizer: `a` is 2, `b` is 3, one id per character, no unknown token."""
    model = ModelDir(find_or_download(Model(model="toy:student"), "student.model"), "float32")
    return PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat())


def table(path: Path, rows: Rows) -> Path:
    """Write rows in the format of the path's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(path: Path, **settings: Any) -> list[str]:
    return [problem.text for problem in load_problems(Prompts(source=str(path), **settings))]


def rejection(path: Path, kind: str = "invalid_data", **settings: Any) -> OpdctlError:
    """Return the error of reading, which must name the file."""
    with pytest.raises(OpdctlError) as caught:
        load_problems(Prompts(source=str(path), **settings))
    assert caught.value.kind == kind
    assert str(path) in caught.value.message
    return caught.value


# ── The toy task ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_toy_problems_have_answers() -> None:
    problems = load_problems(Prompts(source="toy:sort12", limit=5))
    assert len({problem.id for problem in problems}) == 5
    for problem in problems:
        assert problem.text[-1] == "?"
        assert problem.answer == "".join(sorted(problem.text[:-1]))


def test_limit_takes_the_first_toy_problems() -> None:
    more = load_problems(Prompts(source="toy:sort12", limit=5))
    assert load_problems(Prompts(source="toy:sort12", limit=2)) == more[:2]


def test_split_contains_only_its_problems() -> None:
    for split in ("train", "test"):
        problems = load_problems(Prompts(source="toy:sort12", split=split, limit=20))
        assert {split_of(problem.text[:-1]) for problem in problems} == {split}


def test_suffix_is_appended_to_the_prompt() -> None:
    assert load_problems(Prompts(source="toy:sort12", limit=1, suffix="!"))[0].text.endswith("?!")


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("1+1?", "\nBox it.", "1+1?\nBox it."),
        ("1+1?\nBox it.", "\nBox it.", "1+1?\nBox it."),
        ("1+1?\nBox it. \n", "\nBox it.\n\n", "1+1?\nBox it. \n"),
        ("1+1? Box it.", "\nBox it.", "1+1? Box it.\nBox it."),  # on the same line is another text
        ("Box it. 1+1?", "\nBox it.", "Box it. 1+1?\nBox it."),
        ("1+1?\n", "\n", "1+1?\n\n"),  # white space is not a text that a prompt can have already
    ],
)
def test_suffix_is_not_repeated(tmp_path: Path, text: str, suffix: str, expected: str) -> None:
    path = table(tmp_path / "p.jsonl", [{"prompt": text, "hint": text}])
    (problem,) = load_problems(Prompts(source=str(path), suffix=suffix, teacher_prompt_column="hint"))
    assert (problem.text, problem.teacher_chat) == (expected, Chat(expected))


@pytest.mark.parametrize(
    ("settings", "kind", "part"),
    [
        (Prompts(source="toy:sort21", limit=1), "unknown_name", "`toy:sort12`"),
        (Prompts(source="toy:sort12", split="tset", limit=1), "unsupported_setting", "train, test"),
    ],
)
def test_unknown_task_or_split_is_rejected(settings: Prompts, kind: str, part: str) -> None:
    with pytest.raises(OpdctlError, match="prompts\\.s") as caught:
        load_problems(settings)
    assert caught.value.kind == kind
    assert part in caught.value.message


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_keep_order_id_and_answer(tmp_path: Path, suffix: str) -> None:
    rows = [{"key": "x", "question": "ab", "gold": "1"}, {"key": "y", "question": "c", "gold": None}]
    path = table(tmp_path / f"p{suffix}", rows)
    settings = Prompts(source=str(path), id_column="key", prompt_column="question", answer_column="gold", suffix="?")
    assert load_problems(settings) == [Problem("x", "ab?", "1"), Problem("y", "c?", None)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_row_number_is_the_default_id(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"prompt": "a"}, {"prompt": "b"}])
    assert load_problems(Prompts(source=str(path))) == [Problem("0", "a", None), Problem("1", "b", None)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_as_ids_and_answers_become_text(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"id": 7, "prompt": "a", "answer": 25}])
    assert load_problems(Prompts(source=str(path), id_column="id", answer_column="answer")) == [Problem("7", "a", "25")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_limit_takes_the_first_rows(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"prompt": c} for c in "abc"])
    assert texts(path, limit=2) == ["a", "b"]
    assert texts(path, limit=9) == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_conditions_are_before_limit_and_drop_null(tmp_path: Path, suffix: str) -> None:
    grades = [("a", 5.9), ("b", 6.0), ("c", None), ("d", 7.0), ("e", 8.0)]
    path = table(tmp_path / f"p{suffix}", [{"prompt": prompt, "difficulty": grade} for prompt, grade in grades])
    assert texts(path, where=HARD) == ["b", "d", "e"]
    assert texts(path, where=HARD, limit=2) == ["b", "d"]
    ids = [problem.id for problem in load_problems(Prompts(source=str(path), where=HARD))]
    assert ids == ["1", "3", "4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_filter_on_unknown_column_suggests_the_nearest(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"prompt": "a", "difficulty": 6.0}])
    error = rejection(path, where={"dificulty": ">= 6"})
    assert "`difficulty`" in error.message
    assert "prompts.where" in error.message


def test_filter_on_a_text_column_is_rejected(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [{"prompt": "a", "difficulty": "hard"}])
    assert "`difficulty` (prompts.where) must be a number, got 'hard'" in rejection(path, where=HARD).message


def test_filter_without_matches_is_rejected(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [{"prompt": "a", "difficulty": 5.0}])
    error = rejection(path, where=HARD)
    assert "prompts.where" in error.message


@pytest.mark.parametrize(
    ("setting", "nearest"), [("prompt_column", "question"), ("id_column", "number"), ("answer_column", "gold")]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unknown_column_suggests_the_nearest(tmp_path: Path, suffix: str, setting: str, nearest: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"question": "a", "number": 1, "gold": "b"}])
    good = {"prompt_column": "question", "id_column": "number", "answer_column": "gold"}
    error = rejection(path, **{**good, setting: f"{nearest}s"})
    assert all(part in error.message for part in (f"`{nearest}s`", f"prompts.{setting}", f"`{nearest}`", "row 1"))
    assert "`question`, `number`, `gold`" in (error.hint or "")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_duplicate_ids_are_rejected_with_their_rows(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"id": name, "prompt": "a"} for name in "xyxzzzzzz"])
    error = rejection(path, id_column="id")
    assert "6 duplicate ids: `x` of row 1 in row 3, `z` of row 4 in row 5" in error.message
    assert error.message.endswith("`z` of row 4 in row 8, …")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_null_id_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"id": "x", "prompt": "a"}, {"id": None, "prompt": "b"}])
    assert "row 2" in rejection(path, id_column="id").message


@pytest.mark.parametrize("value", [None, "", 5, ["a"]])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_prompt_that_is_not_text_is_rejected(tmp_path: Path, suffix: str, value: object) -> None:
    rows = [{"prompt": value}] if suffix == ".parquet" else [{"prompt": "a"}, {"prompt": value}]
    path = table(tmp_path / f"p{suffix}", rows)
    error = rejection(path)
    assert f"row {len(rows)}" in error.message
    assert "`prompt`" in error.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_without_rows_is_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path) if suffix == ".parquet" else path.touch()
    assert "no prompts" in rejection(path).message


def test_file_of_blank_lines_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n  \n\n")
    assert "no prompts" in rejection(path).message


def test_unknown_suffix_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("prompt\na\n")
    assert ".jsonl or .json or .csv or .tsv or .parquet" in rejection(path, "unsupported_setting").message


def test_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,answer\n"a, b",1\nc,2\n')
    problems = load_problems(Prompts(source=str(path), answer_column="answer"))
    assert [(p.id, p.text, p.answer) for p in problems] == [("0", "a, b", "1"), ("1", "c", "2")]


@pytest.mark.parametrize("column", ["prompt", "id", "answer"])
def test_lone_surrogate_is_rejected_with_its_row(tmp_path: Path, column: str) -> None:
    row = {"prompt": "a", "id": "x", "answer": "b"}
    path = table(tmp_path / "p.jsonl", [row, {**row, "id": "y", column: "a\ud800"}])
    error = rejection(path, id_column="id", answer_column="answer")
    assert "row 2" in error.message
    assert "Unicode" in error.message


# ── Chats and nested columns, as in files for verl ──────────────────────────────────────────────────────────────────

VERL = [
    {
        "data_source": "math",
        "prompt": [{"content": f"{n}+1?", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
        "extra_info": {"index": 10 * n, "split": "train"},
    }
    for n in range(3)
]
VERL_COLUMNS = {"id_column": "extra_info.index", "answer_column": "reward_model.ground_truth"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_in_the_form_of_verl(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", VERL)
    problems = load_problems(Prompts(source=str(path), suffix="!", **VERL_COLUMNS))
    assert problems == [Problem("0", "0+1?!", "1"), Problem("10", "1+1?!", "2"), Problem("20", "2+1?!", "3")]
    assert texts(path, where={"extra_info.index": ">= 10"}) == ["1+1?", "2+1?"]


def test_suffix_belongs_to_the_last_message(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    hint = [{"role": "user", "content": "0+1?"}, {"role": "assistant", "content": "1"}, chat[1]]
    path = table(tmp_path / "p.jsonl", [{"prompt": chat, "hint": hint}])
    (problem,) = load_problems(Prompts(source=str(path), suffix="!", teacher_prompt_column="hint"))
    assert (problem.earlier, problem.text) == ((Message("system", "Add."),), "1+1?!")
    earlier = (Message("user", "0+1?"), Message("assistant", "1"))
    assert problem.teacher_chat == Chat("1+1?!", earlier)


def test_malformed_message_is_rejected_with_its_row(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [*VERL, {**VERL[0], "prompt": [{"role": "usr", "content": "?"}]}])
    assert "row 4: `prompt`: message 1: unknown role `usr`" in rejection(path).message


def test_column_with_dots_in_its_name_comes_first(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [{"prompt": "?", "a.b": "1", "a": {"b": "2", "c": None}}])
    answers = [
        load_problems(Prompts(source=str(path), answer_column=name))[0].answer for name in ("a.b", "a.c", "a.c.d")
    ]
    assert answers == ["1", None, None]


@pytest.mark.parametrize(
    ("column", "part", "choices"),
    [
        ("reward_model.ground_trut", "did you mean `reward_model.ground_truth`?", "`reward_model.style`"),
        ("reward_mode.ground_truth", "did you mean `reward_model`?", "`extra_info`"),
        ("reward_model.style.name", "no column `reward_model.style.name`", "(none)"),
        ("reward_model", "`reward_model` (prompts.answer_column) has fields", "`reward_model.ground_truth`"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_path_suggests_the_nearest(tmp_path: Path, suffix: str, column: str, part: str, choices: str) -> None:
    path = table(tmp_path / f"p{suffix}", VERL)
    error = rejection(path, answer_column=column)
    assert all(each in error.message for each in (part, "row 1", "prompts.answer_column"))
    assert choices in (error.hint or "")


def test_data_files_selects_a_file_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(VERL)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"source": "owner/data", "revision": "abc", **VERL_COLUMNS}
    assert [problem.answer for problem in load_problems(Prompts(**settings, data_files="math/a.parquet"))] == [*"123"]
    with pytest.raises(OpdctlError, match=r"owner/data/math/a.parquet: row 1: no column `question`"):
        load_problems(Prompts(**settings, data_files="math/a.parquet", prompt_column="question"))
    expected = {"split": "train", "revision": "abc", "data_files": "math/a.parquet"}
    assert asked == [(("owner/data", None), expected)] * 2


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompt_becomes_token_ids(renderer: PromptRenderer) -> None:
    prompts, dropped = tokenize([Problem("x", "abba", "z")], renderer, Prompts(source="p.jsonl"))
    assert dropped == 0
    (prompt,) = prompts
    assert prompt.prompt_ids.tolist() == [2, 3, 3, 2]
    assert prompt.prompt_ids.dtype == np.int32
    assert (prompt.prompt_id, prompt.answer) == ("x", "z")


def test_too_long_prompt_is_reported_with_its_length(renderer: PromptRenderer) -> None:
    problems = [Problem("fits", "aaa", None), Problem("long", "aaaa", None), Problem("longer", "aaaaa", None)]
    with pytest.raises(OpdctlError, match="2 prompts") as caught:
        tokenize(problems, renderer, Prompts(source="p.jsonl", max_tokens=3))
    assert caught.value.kind == "invalid_data"
    assert all(part in caught.value.message for part in ("p.jsonl", "= 3", "`long` with 4", "`longer` with 5"))
    assert "`fits`" not in caught.value.message
    assert 'prompts.on_too_long = "drop"' in (caught.value.hint or "")


def test_too_long_prompt_is_dropped_and_counted(renderer: PromptRenderer) -> None:
    problems = [Problem("fits", "aaa", None), Problem("long", "aaaa", None), Problem("short", "b", None)]
    prompts, dropped = tokenize(problems, renderer, Prompts(source="p.jsonl", max_tokens=3, on_too_long="drop"))
    assert [prompt.prompt_ids.tolist() for prompt in prompts] == [[2, 2, 2], [3]]
    assert dropped == 1


def test_dropping_every_prompt_is_rejected(renderer: PromptRenderer) -> None:
    with pytest.raises(OpdctlError, match="no prompts left") as caught:
        tokenize([Problem("x", "aa", None)], renderer, Prompts(source="p.jsonl", max_tokens=1, on_too_long="drop"))
    assert caught.value.kind == "invalid_data"


def test_prompt_that_cannot_be_tokenized_is_named(renderer: PromptRenderer) -> None:
    with pytest.raises(OpdctlError, match="`capital`") as caught:
        tokenize([Problem("capital", "ABC", None)], renderer, Prompts(source="p.jsonl"))
    assert caught.value.kind == "invalid_data"


def test_teacher_text_has_its_own_token_ids(renderer: PromptRenderer) -> None:
    problems = [Problem("x", "ab", None, teacher_chat=Chat("bab")), Problem("y", "a", None)]
    (first, second), _ = tokenize(problems, renderer, Prompts(source="p.jsonl"))
    assert first.prompt_ids.tolist() == [2, 3]
    assert first.teacher_prompt_ids is not None
    assert first.teacher_prompt_ids.tolist() == [3, 2, 3]
    assert second.teacher_prompt_ids is None


def test_chat_becomes_token_ids(renderer: PromptRenderer) -> None:
    """The template of the toy models joins the messages."""
    earlier, hint = (Message("system", "ab"),), (Message("system", "bb"),)
    problem = Problem("x", "a", None, teacher_chat=Chat("b", hint), earlier=earlier)
    ((prompt,), _) = tokenize([problem], renderer, Prompts(source="p.jsonl"))
    assert prompt.prompt_ids.tolist() == [2, 3, 2]
    assert prompt.teacher_prompt_ids is not None
    assert prompt.teacher_prompt_ids.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "problem", [Problem("x", "", None), Problem("x", "a", None, teacher_chat=Chat(""))], ids=["text", "teacher text"]
)
def test_prompt_without_tokens_is_rejected(renderer: PromptRenderer, problem: Problem) -> None:
    with pytest.raises(OpdctlError, match="`x`") as caught:
        tokenize([problem], renderer, Prompts(source="p.jsonl"))
    assert caught.value.kind == "invalid_data"


def test_length_limit_applies_to_the_teacher_text(renderer: PromptRenderer) -> None:
    problems = [Problem("x", "a", None, teacher_chat=Chat("aaaa")), Problem("y", "a", None)]
    prompts, dropped = tokenize(problems, renderer, Prompts(source="p.jsonl", max_tokens=3, on_too_long="drop"))
    assert [prompt.prompt_id for prompt in prompts] == ["y"]
    assert dropped == 1
