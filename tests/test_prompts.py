"""Prompts: from the embedded task and from files, good and bad, to token ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opdctl.data.prompts import Problem, load_problems, tokenize
from opdctl.data.toy.task import split_of
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import Model, Prompts

Rows = list[dict[str, Any]]
SUFFIXES = (".jsonl", ".parquet")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded models' tokenizer: `a` is 2, `b` is 3, one id a character, no unknown one."""
    return ModelDir(find_or_download(Model(model="toy:student"), "student.model"), "float32").tokenizer


def table(path: Path, rows: Rows) -> Path:
    """Write rows as the format that the path's ending says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(path: Path, **settings: Any) -> list[str]:
    return [problem.text for problem in load_problems(Prompts(source=str(path), **settings))]


def refusal(path: Path, code: ExitCode = ExitCode.BAD_DATA, **settings: Any) -> OpdctlError:
    """Return the error that reading gives, which must name the file."""
    with pytest.raises(OpdctlError) as caught:
        load_problems(Prompts(source=str(path), **settings))
    assert caught.value.code == code
    assert str(path) in caught.value.message
    return caught.value


# ── The embedded task ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_embedded_task_gives_sorting_problems_with_their_answers() -> None:
    problems = load_problems(Prompts(source="toy:sort12", limit=5))
    assert len({problem.id for problem in problems}) == 5
    for problem in problems:
        assert problem.text[-1] == "?"
        assert problem.answer == "".join(sorted(problem.text[:-1]))


def test_fewer_prompts_of_the_embedded_task_are_the_first_ones() -> None:
    more = load_problems(Prompts(source="toy:sort12", limit=5))
    assert load_problems(Prompts(source="toy:sort12", limit=2)) == more[:2]


def test_a_split_holds_its_own_words_only() -> None:
    for split in ("train", "test"):
        problems = load_problems(Prompts(source="toy:sort12", split=split, limit=20))
        assert {split_of(problem.text[:-1]) for problem in problems} == {split}


def test_the_suffix_goes_behind_every_prompt() -> None:
    assert load_problems(Prompts(source="toy:sort12", limit=1, suffix="!"))[0].text.endswith("?!")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Prompts(source="toy:sort21", limit=1), "did you mean `toy:sort12`?"),
        (Prompts(source="toy:sort12", split="tset", limit=1), "train, test"),
    ],
)
def test_what_the_embedded_task_has_not_is_refused(settings: Prompts, told: str) -> None:
    with pytest.raises(OpdctlError, match="prompts\\.s") as caught:
        load_problems(settings)
    assert caught.value.code == ExitCode.USAGE
    assert told in caught.value.message


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_come_in_order_with_id_and_answer(tmp_path: Path, suffix: str) -> None:
    rows = [{"key": "x", "question": "ab", "gold": "1"}, {"key": "y", "question": "c", "gold": None}]
    path = table(tmp_path / f"p{suffix}", rows)
    settings = Prompts(source=str(path), id_column="key", prompt_column="question", answer_column="gold", suffix="?")
    assert load_problems(settings) == [Problem("x", "ab?", "1"), Problem("y", "c?", None)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_an_id_column_the_row_number_is_the_id(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"prompt": "a"}, {"prompt": "b"}])
    assert load_problems(Prompts(source=str(path))) == [Problem("0", "a", None), Problem("1", "b", None)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_as_ids_and_answers_become_text(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"id": 7, "prompt": "a", "answer": 25}])
    assert load_problems(Prompts(source=str(path), id_column="id", answer_column="answer")) == [Problem("7", "a", "25")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_count_takes_the_first_rows(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"prompt": c} for c in "abc"])
    assert texts(path, count=2) == ["a", "b"]
    assert texts(path, count=9) == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_at_least_filters_before_count_and_a_null_is_not_enough(tmp_path: Path, suffix: str) -> None:
    grades = [("a", 5.9), ("b", 6.0), ("c", None), ("d", 7.0), ("e", 8.0)]
    path = table(tmp_path / f"p{suffix}", [{"prompt": prompt, "difficulty": grade} for prompt, grade in grades])
    assert texts(path, at_least={"difficulty": 6.0}) == ["b", "d", "e"]
    assert texts(path, at_least={"difficulty": 6.0}, count=2) == ["b", "d"]
    ids = [problem.id for problem in load_problems(Prompts(source=str(path), at_least={"difficulty": 6.0}))]
    assert ids == ["1", "3", "4"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_filter_on_a_column_that_is_not_there_gets_the_nearest_name(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"prompt": "a", "difficulty": 6.0}])
    error = refusal(path, at_least={"dificulty": 6.0})
    assert "did you mean `difficulty`?" in error.message
    assert "prompts.min_values" in error.message


def test_a_filter_on_a_column_of_text_says_so(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [{"prompt": "a", "difficulty": "7"}])
    assert "difficulty" in refusal(path, at_least={"difficulty": 6.0}).message


def test_a_filter_that_lets_nothing_through_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "p.jsonl", [{"prompt": "a", "difficulty": 5.0}])
    error = refusal(path, at_least={"difficulty": 6.0})
    assert "at_least" in f"{error.message} {error.hint}"


@pytest.mark.parametrize(
    ("setting", "nearest"), [("prompt_column", "question"), ("id_column", "number"), ("answer_column", "gold")]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_column_gets_the_nearest_name(tmp_path: Path, suffix: str, setting: str, nearest: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"question": "a", "number": 1, "gold": "b"}])
    good = {"prompt_column": "question", "id_column": "number", "answer_column": "gold"}
    error = refusal(path, **{**good, setting: f"{nearest}s"})
    assert f"no column `{nearest}s` (prompts.{setting}); did you mean `{nearest}`?" in error.message
    assert error.hint == "its columns are `question`, `number`, `gold`"
    assert "row 1" in error.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_id_used_twice_is_refused_with_both_rows(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"id": name, "prompt": "a"} for name in "xyxzzzzzz"])
    error = refusal(path, id_column="id")
    assert "6 ids occur again: `x` of row 1 in row 3, `z` of row 4 in row 5" in error.message
    assert error.message.endswith("`z` of row 4 in row 8, …")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_id_that_is_null_is_refused(tmp_path: Path, suffix: str) -> None:
    path = table(tmp_path / f"p{suffix}", [{"id": "x", "prompt": "a"}, {"id": None, "prompt": "b"}])
    assert "row 2" in refusal(path, id_column="id").message


@pytest.mark.parametrize("value", [None, "", 5, ["a"]])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_prompt_that_is_no_text_is_refused_with_its_row(tmp_path: Path, suffix: str, value: object) -> None:
    rows = [{"prompt": value}] if suffix == ".parquet" else [{"prompt": "a"}, {"prompt": value}]
    path = table(tmp_path / f"p{suffix}", rows)
    error = refusal(path)
    assert f"row {len(rows)}" in error.message
    assert "`prompt`" in error.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_rows_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path) if suffix == ".parquet" else path.touch()
    assert "holds no prompts" in refusal(path).message


def test_a_file_of_blank_lines_holds_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n  \n\n")
    assert "holds no prompts" in refusal(path).message


def test_an_empty_file_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    path.touch()
    assert "cannot be read as Parquet" in refusal(path).message


def test_a_cut_off_parquet_file_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "p.parquet", [{"prompt": "a"}])
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read as Parquet" in refusal(path).message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_gets_the_nearest_name(tmp_path: Path, suffix: str) -> None:
    table(tmp_path / f"prompts{suffix}", [{"prompt": "a"}])
    error = refusal(tmp_path / f"promts{suffix}", ExitCode.USAGE)
    assert "no such file" in error.message
    assert f"did you mean `prompts{suffix}`?" in error.message


def test_a_file_of_another_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("prompt\na\n")
    assert ".jsonl or .parquet or .csv" in refusal(path, ExitCode.USAGE).message


def test_a_csv_file_gives_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,answer\n"a, b",1\nc,2\n')
    problems = load_problems(Prompts(source=str(path), answer_column="answer"))
    assert [(p.id, p.text, p.answer) for p in problems] == [("0", "a, b", "1"), ("1", "c", "2")]


@pytest.mark.parametrize(
    "bad", [b'{"prompt": "\xff"}', b"{'prompt': 1}", b'"a"', b"[1]", b'{"prompt": "a"', b"[" * 10**5]
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + bad + b"\n")
    assert f"{path}:3:" in refusal(path).message


def test_a_text_in_parquet_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    offsets = pa.py_buffer(np.array([0, 3], np.int32).tobytes())
    pq.write_table(pa.table({"prompt": pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"a\xffb"))}), path)
    refusal(path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa4"}\n')
    assert texts(path) == ["ä"]


def test_a_file_with_windows_line_ends_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n')
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("column", ["prompt", "id", "answer"])
def test_a_lone_surrogate_is_refused_with_its_row(tmp_path: Path, column: str) -> None:
    row = {"prompt": "a", "id": "x", "answer": "b"}
    path = table(tmp_path / "p.jsonl", [row, {**row, "id": "y", column: "a\ud800"}])
    error = refusal(path, id_column="id", answer_column="answer")
    assert "row 2" in error.message
    assert "Unicode" in error.message


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_prompt_becomes_its_ids(tokenizer: Any) -> None:
    prompts, dropped = tokenize([Problem("x", "abba", "z")], tokenizer, Prompts(source="p.jsonl"))
    assert dropped == 0
    (prompt,) = prompts
    assert prompt.prompt_ids.tolist() == [2, 3, 3, 2]
    assert prompt.prompt_ids.dtype == np.int32
    assert (prompt.prompt_id, prompt.answer) == ("x", "z")


def test_a_prompt_too_long_is_an_error_that_names_it_and_its_length(tokenizer: Any) -> None:
    problems = [Problem("fits", "aaa", None), Problem("long", "aaaa", None), Problem("longer", "aaaaa", None)]
    with pytest.raises(OpdctlError, match="2 prompts are longer") as caught:
        tokenize(problems, tokenizer, Prompts(source="p.jsonl", max_tokens=3))
    assert caught.value.code == ExitCode.BAD_DATA
    assert all(part in caught.value.message for part in ("p.jsonl", "= 3", "`long` with 4", "`longer` with 5"))
    assert "`fits`" not in caught.value.message
    assert 'too_long = "drop"' in (caught.value.hint or "")


def test_a_prompt_too_long_is_dropped_and_counted_but_never_cut(tokenizer: Any) -> None:
    problems = [Problem("fits", "aaa", None), Problem("long", "aaaa", None), Problem("short", "b", None)]
    prompts, dropped = tokenize(problems, tokenizer, Prompts(source="p.jsonl", max_tokens=3, on_too_long="drop"))
    assert [prompt.prompt_ids.tolist() for prompt in prompts] == [[2, 2, 2], [3]]
    assert dropped == 1


def test_dropping_every_prompt_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(OpdctlError, match="no prompts are left") as caught:
        tokenize([Problem("x", "aa", None)], tokenizer, Prompts(source="p.jsonl", max_tokens=1, on_too_long="drop"))
    assert caught.value.code == ExitCode.BAD_DATA


def test_a_prompt_that_the_tokenizer_cannot_write_is_named(tokenizer: Any) -> None:
    with pytest.raises(OpdctlError, match="`capital`") as caught:
        tokenize([Problem("capital", "ABC", None)], tokenizer, Prompts(source="p.jsonl"))
    assert caught.value.code == ExitCode.BAD_DATA
