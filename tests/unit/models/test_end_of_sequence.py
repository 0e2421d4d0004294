"""The tokens that end a response: generation config, tokenizer and recipe, and what is reported of them."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import NUM_IDS, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir, warn_of_other_eos
from opdctl.models.end_of_sequence import find_eos_ids

END, IM_START, IM_END = 0, 1, 2
INVALID = st.one_of(
    st.booleans(), st.floats(), st.text(), st.dictionaries(st.text(), st.integers(), max_size=1), st.just([[1]])
)
NAMED = st.one_of(st.none(), st.integers(-2, 12))


class FakeTokenizer:
    def __init__(self, eos_token_id: int | None):
        self.eos_token_id = eos_token_id

    def convert_ids_to_tokens(self, id_: int) -> str:
        return f"<{id_}>"


def eos_ids(generation: Any, tokenizer_id: int | None, vocab_size: int = 10) -> tuple[int, ...]:
    with tempfile.TemporaryDirectory() as folder:
        if generation is not Ellipsis:
            (Path(folder) / "generation_config.json").write_text(json.dumps(generation))
        return find_eos_ids(Path(folder), FakeTokenizer(tokenizer_id), vocab_size)  # type: ignore[arg-type]


@given(st.one_of(NAMED, st.lists(NAMED, max_size=4)), NAMED, st.integers(1, 12))
def test_ids_are_the_union_of_the_valid_ones(named: Any, tokenizer_id: int | None, vocab_size: int) -> None:
    ids = eos_ids({"eos_token_id": named}, tokenizer_id, vocab_size)
    sources = [*(named if isinstance(named, list) else [named]), tokenizer_id]
    assert {*ids} == {id_ for id_ in sources if id_ is not None and 0 <= id_ < vocab_size}
    assert len({*ids}) == len(ids)


@given(INVALID, st.lists(NAMED, max_size=2))
def test_value_of_another_type_is_refused_alone_and_in_a_list(value: Any, others: list[Any]) -> None:
    for named in (value, [*others, value]):
        with pytest.raises(OpdctlError) as caught:
            eos_ids({"eos_token_id": named}, 2)
        assert (caught.value.kind, caught.value.code) == ("invalid_model", ExitCode.BAD_DATA)
        assert "generation_config.json" in caught.value.message


@pytest.mark.parametrize("generation", [..., {}, {"temperature": 0.6}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_tokenizer_decides_where_the_generation_config_names_none(generation: Any) -> None:
    assert eos_ids(generation, 2) == (2,)
    assert eos_ids(generation, None) == ()


# ── Model directories ────────────────────────────────────────────────────────────────────────────────────────────────


def directory(folder: Path, generation: dict[str, Any] | None = None, **settings: Any) -> ModelDir:
    """A model whose tokenizer's end of sequence is `<|im_end|>`, id 2."""
    return ModelDir(write_tokenizer(folder, generation=generation), "float32", **settings)


@pytest.mark.parametrize(
    ("generation", "ids", "parts"),
    [
        (None, (2,), []),
        ({"eos_token_id": 2}, (2,), []),
        ({"eos_token_id": [2, 0]}, (2, 0), []),  # the generation config names all of them
        ({"eos_token_id": []}, (2,), []),
        ({"eos_token_id": None}, (2,), []),
        ({"eos_token_id": 0}, (0, 2), ["0 `<|endoftext|>` of generation_config.json", "2 `<|im_end|>`"]),
        ({"eos_token_id": 999}, (2,), ["2 `<|im_end|>` of the tokenizer", "999"]),
        ({"eos_token_id": -1}, (2,), ["2 `<|im_end|>` of the tokenizer", "-1"]),
        ({"eos_token_id": [NUM_IDS, 0]}, (0, 2), [str(NUM_IDS)]),
    ],
)
def test_what_is_taken_is_reported_once_unless_one_source_names_it(tmp_path, capsys, generation, ids, parts) -> None:
    model = directory(tmp_path, generation)
    assert model.eos_ids == ids
    report = capsys.readouterr().err
    assert all(part in report for part in (str(tmp_path), *parts)) if parts else report == ""
    trained = model.with_path(Path(write_tokenizer(tmp_path / "trained")))
    assert trained.eos_ids == ids
    assert directory(tmp_path, generation).eos_ids == ids
    assert capsys.readouterr().err == ""


def test_rows_bound_the_ids(tmp_path) -> None:
    folder = write_tokenizer(tmp_path, rows=2, generation={"eos_token_id": [0, 2]})
    assert ModelDir(folder, "float32").eos_ids == (0,)


@pytest.mark.parametrize(
    "content", [b"", b'{"eos_token_id": 0', b"[0]", b"\xff"], ids=["empty", "cut", "list", "bytes"]
)
def test_corrupt_generation_config_is_named(tmp_path, content) -> None:
    model = directory(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(OpdctlError) as caught:
        _ = model.eos_ids
    assert (caught.value.kind, caught.value.code) == ("invalid_model", ExitCode.BAD_DATA)
    assert str(tmp_path / "generation_config.json") in caught.value.message


def test_byte_order_mark_is_accepted(tmp_path) -> None:
    model = directory(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": 0}')
    assert model.eos_ids == (0, 2)


def test_no_end_of_sequence_is_an_error_only_where_it_is_needed(tmp_path) -> None:
    model = ModelDir(write_tokenizer(tmp_path, eos_token=None), "float32")
    assert model.named_eos_ids == ()
    with pytest.raises(OpdctlError) as caught:
        _ = model.eos_ids
    assert caught.value.kind == "unsupported_model"
    assert "rollout.eos_token_ids" in (caught.value.hint or "")
    assert ModelDir(tmp_path, "float32", eos_token_ids=(5,)).eos_ids == (5,)


def test_recipe_replaces_all_ids_and_is_checked(tmp_path) -> None:
    assert directory(tmp_path, {"eos_token_id": "2"}, eos_token_ids=(7, 0)).eos_ids == (7, 0)
    with pytest.raises(OpdctlError) as caught:
        _ = directory(tmp_path, eos_token_ids=(1, NUM_IDS)).eos_ids
    assert (caught.value.kind, caught.value.code) == ("unsupported_setting", ExitCode.USAGE)
    assert "rollout.eos_token_ids" in caught.value.message


# ── Student and teacher ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("student", "teacher", "missing"),
    [
        (2, 2, None),
        ([0, 2], 2, None),  # the student ends wherever the teacher does
        (2, [0, 2], "0 `<|endoftext|>`"),
        (2, 1, "1 `<|im_start|>`"),
    ],
)
def test_teacher_that_ends_where_the_student_does_not_is_warned_of(tmp_path, capsys, student, teacher, missing) -> None:
    models = [
        directory(tmp_path / name, {"eos_token_id": ids}) for name, ids in (("student", student), ("teacher", teacher))
    ]
    warn_of_other_eos(*models, "teacher")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [missing in line for line in warnings] == [True] if missing else warnings == []


def test_teacher_without_an_end_of_sequence_is_accepted(tmp_path, capsys) -> None:
    student = directory(tmp_path / "student")
    warn_of_other_eos(student, ModelDir(write_tokenizer(tmp_path / "teacher", eos_token=None), "float32"), "teacher")
    assert "warning" not in capsys.readouterr().err
