"""Responses of other programs: the forms of token ids, their checks, and the exchange format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tokenizers import NUM_IDS, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.artifacts.records import ExportedResponse, Trajectory
from opdctl.artifacts.tables import write_rows
from opdctl.data.trajectories.reading import read_trajectories
from opdctl.errors import ErrorKind, OpdctlError
from opdctl.models.directory import ModelDir

IDS = st.lists(st.integers(3, NUM_IDS - 1), min_size=1, max_size=8)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ModelDir(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model"), "float32").tokenizer


def read_rows(tokenizer: Any, path: Path, *rows: dict[str, Any]) -> list[Trajectory]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_trajectories([path], tokenizer, NUM_IDS))


def rejection(tokenizer: Any, path: Path, *rows: dict[str, Any], kind: ErrorKind = "invalid_data") -> str:
    """Return the message of the error of reading the rows, which names the file."""
    with pytest.raises(OpdctlError) as caught:
        read_rows(tokenizer, path, *rows)
    assert caught.value.kind == kind
    assert str(path) in caught.value.message
    return caught.value.message


def as_lists(trajectory: Trajectory) -> tuple[list[int], list[int], list[bool]]:
    mask = np.ones(len(trajectory.response_ids), bool) if trajectory.loss_mask is None else trajectory.loss_mask
    return trajectory.prompt_ids.tolist(), trajectory.response_ids.tolist(), mask.tolist()


# ── The forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row",
    [
        {"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "loss_mask": [1, 0, 1]},
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "env_mask": [1, 0, 1]},
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "completion_mask": [1, 1, 1], "tool_mask": [1, 0, 1]},
        {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9], "loss_mask": [True, False, True]},
        {"input_ids": [5, 6], "response_ids": [7, 8, 9], "response_mask": [1.0, 0.0, 1.0]},
        {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 0, 1]},
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9]},
        {"input_ids": [5, 6, 7, 8, 9], "assistant_masks": [0, 0, 1, 0, 1], "attention_mask": [1, 1, 1, 1, 1]},
        {"input_ids": [0, 5, 6, 7, 8, 9, 0], "loss_mask": [0, 0, 0, 1, 0, 1, 0], "attention_mask": [0, *[1] * 5, 0]},
        # TRL pads a batch, and its masks are 1 where a token is; prime-rl masks the whole prompt.
        {"prompt_ids": [0, 5, 6], "prompt_mask": [0, 1, 1],
         "completion_ids": [7, 8, 9, 0], "completion_mask": [1, 1, 1, 0], "tool_mask": [1, 0, 1, 1]},
        {"prompt_ids": [5, 6], "prompt_mask": [False, False],
         "completion_ids": [7, 8, 9], "completion_mask": [True, False, True]},
        {"prompts": [0, 0, 5, 6], "responses": [7, 8, 9, 0], "attention_mask": [0, 0, 1, 1, 1, 1, 1, 0],
         "response_mask": [1, 0, 1, 0], "input_ids": [0, 0, 5, 6, 7, 8, 9, 0]},
        {"prompts": [0, 5, 6], "responses": [7, 8, 9, 0], "attention_mask": [0, 1, 1, 1, 1, 1, 0],
         "loss_mask": [0, 0, 0, 1, 0, 1, 0]},
        {"tokens": [5, 6, 7, 8, 9], "response_length": 3, "loss_mask": [1, 0, 1]},
        {"nodes": [{"message": {}, "token_ids": [5], "mask": [False]},
                   {"message": {}, "parent": 0, "token_ids": [6, 7], "mask": [False, True], "logprobs": [-1.0]},
                   {"message": {}, "parent": 1, "token_ids": [8], "mask": [False]},
                   {"message": {}, "parent": 2, "token_ids": [9], "mask": [True], "logprobs": [-2.0]}]},
    ],
    ids=lambda row: " ".join(row),
)  # fmt: skip
def test_forms_of_ids(row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", row)
    assert as_lists(read) == ([5, 6], [7, 8, 9], [True, False, True])
    assert read.sample_id == "1"
    assert read.location.startswith(f"{tmp_path / 'a.jsonl'}: row 1")


def test_all_tokens_are_the_students_own_without_a_mask(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt_ids": [5], "response_ids": [7, 8]}
    plain, masked = read_rows(tokenizer, tmp_path / "a.jsonl", row, row | {"loss_mask": [1, 1]})
    assert plain.loss_mask is masked.loss_mask is None
    assert plain.prompt_id == masked.prompt_id, "equal prompts without an id are one"
    assert [plain.sample_id, masked.sample_id] == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "stored"),
    [
        ({"prompt_ids": [5, 6], "response_ids": [7, 8, 9], "loss_mask": [1, 0, 1]}, [-1.0, None, -2.0]),
        ({"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 1, 0, 1]}, [0.0, 0.0, -1.0, float("nan"), -2.0]),
    ],
)
@pytest.mark.parametrize("name", ["student_logprobs", "logprobs", "completion_logprobs", "rollout_log_probs"])
def test_logprobs_belong_to_their_tokens(
    row: dict[str, Any], stored: list[float], name: str, tokenizer: Any, tmp_path: Path
) -> None:
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", row | {name: stored})
    assert read.logprobs is not None
    assert read.logprobs.tolist() == [-1, 0, -2], "those of other tokens are 0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_unknown_logprob_of_an_own_token(value: float | None, tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt_ids": [5], "response_ids": [7, 8], "logprobs": [-1, value]}
    assert "row 1: `logprobs`" in rejection(tokenizer, tmp_path / "a.jsonl", row)


# ── The exchange format ──────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(IDS, IDS, st.integers(1, 3), st.integers(0, 99)), min_size=1, max_size=4))
def test_exchange_format_round_trips(
    rows: list[tuple[list[int], list[int], int, int]], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("exported") / "exported.parquet"
    exported = [export_row(index, *row, tokenizer) for index, row in enumerate(rows)]
    write_rows(path, exported, ExportedResponse)
    read = list(read_trajectories([path], tokenizer, NUM_IDS))
    assert len(read) == len(exported)
    for one, other in zip(read, exported, strict=True):
        own = np.ones(len(other.response_ids), bool) if other.loss_mask is None else other.loss_mask
        for name in ("sample_id", "prompt_id", "answer", "finish_reason", "turns", "tool_seconds", "reward"):
            assert getattr(one, name) == getattr(other, name), name
        assert as_lists(one) == (other.prompt_ids.tolist(), other.response_ids.tolist(), own.tolist())
        columns = {"logprobs": "student_logprobs", "sampling_logprobs": "sampling_logprobs"}
        for name, stored in (columns | {"teacher_logprobs": "teacher_logprobs"}).items():
            assert (getattr(one, name)[own] == getattr(other, stored)[own]).all(), name
        assert one.top_ids is not None
        assert one.top_ids.shape == np.shape(one.top_logprobs) == (len(own), np.size(other.student_top_ids) // len(own))
        assert np.array_equal(one.top_ids.ravel(), other.student_top_ids)
        assert np.array_equal(np.ravel(one.top_logprobs), other.student_top_logprobs)


def export_row(
    index: int, prompt: Sequence[int], response: Sequence[int], k: int, seed: int, tokenizer: Any
) -> ExportedResponse:
    """Return a row with arbitrary values, K = `k`; the last token is the student's own."""
    random = np.random.default_rng(seed)
    count = len(response)

    def choose(*values: Any) -> Any:
        return values[random.integers(len(values))]

    def draw(size: int) -> Any:
        return -random.exponential(size=size).astype(np.float32)

    return ExportedResponse(
        sample_id=f"p{index}/00003/0",
        prompt_id=f"p{index}",
        prompt=tokenizer.decode(prompt),
        response=tokenizer.decode(response),
        answer=choose(None, "7", "a, b"),
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        loss_mask=choose(None, np.append(random.random(count - 1) < 0.5, True)),
        finish_reason=choose(None, "stop", "length"),
        turns=choose(None, 2),
        tool_seconds=choose(None, 0.25),
        reward=choose(None, 0.5),
        teacher="teacher",
        student_logprobs=draw(count),
        sampling_logprobs=draw(count),
        teacher_logprobs=draw(count),
        student_top_ids=random.integers(NUM_IDS, size=count * k).astype(np.int32),
        student_top_logprobs=draw(count * k),
    )


# ── Invalid rows ─────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = {"prompt_ids": [5, 6], "response_ids": [7, 8]}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (GOOD | {"loss_mask": [1]}, "loss_mask"),
        (GOOD | {"loss_mask": [1, 2]}, "loss_mask"),
        (GOOD | {"logprobs": [-1.0]}, "logprobs"),
        (GOOD | {"logprobs": [[-1.0], [-2.0]]}, "logprobs"),
        (GOOD | {"logprobs": "-1"}, "logprobs"),
        (GOOD | {"prompt_ids": [5.5]}, "prompt_ids"),
        (GOOD | {"prompt_ids": [-1]}, "prompt_ids"),
        (GOOD | {"prompt_ids": [2**31]}, "prompt_ids"),
        (GOOD | {"prompt_ids": ["a"]}, "prompt_ids"),
        (GOOD | {"prompt_ids": [True]}, "prompt_ids"),
        (GOOD | {"prompt_ids": []}, "prompt_ids"),
        (GOOD | {"prompt_ids": [[5]]}, "prompt_ids"),
        (GOOD | {"student_top_ids": [1, 2, 3], "student_top_logprobs": [-1, -2, -3]}, "student_top_ids"),
        ({"input_ids": [5, 6], "labels": [-100, 7]}, "labels"),
        ({"input_ids": [5, 6]}, "input_ids"),
        ({"question": "?"}, "question"),
    ],
)
def test_invalid_rows_name_the_column(row: dict[str, Any], name: str, tokenizer: Any, tmp_path: Path) -> None:
    assert f"row 2: `{name}`" in rejection(tokenizer, tmp_path / "a.jsonl", GOOD, row) or name == "question"


def test_ids_outside_the_vocabulary(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt_ids": [5], "response_ids": [NUM_IDS]}
    assert f"token {NUM_IDS}" in rejection(tokenizer, tmp_path / "a.jsonl", row, kind="incompatible_tokenizer")


def test_top_ids_outside_the_vocabulary(tokenizer: Any, tmp_path: Path) -> None:
    row = GOOD | {"student_top_ids": [1, NUM_IDS], "student_top_logprobs": [-1.0, -2.0]}
    assert "student_top_ids" in rejection(tokenizer, tmp_path / "a.jsonl", row, kind="incompatible_tokenizer")


def test_two_rows_with_one_id(tokenizer: Any, tmp_path: Path) -> None:
    message = rejection(tokenizer, tmp_path / "a.jsonl", GOOD | {"id": "x"}, GOOD | {"id": "y"}, GOOD | {"id": "x"})
    assert message.index("row 3") < message.index("row 1")


def test_rows_are_read_one_at_a_time(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n{")
    rows = read_trajectories([tmp_path / "a.jsonl"], tokenizer, NUM_IDS)
    assert next(rows).response_ids.tolist() == GOOD["response_ids"]
    with pytest.raises(OpdctlError, match=":2: "):
        next(rows)


def test_rows_without_own_tokens_are_skipped(tokenizer: Any, tmp_path: Path) -> None:
    empty = [GOOD | {"loss_mask": [0, 0]}, GOOD | {"response_ids": []}]
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", *empty, GOOD)
    assert read.sample_id == "3", "the number of a row does not depend on others"
    assert "no row" in rejection(tokenizer, tmp_path / "a.jsonl", *empty)


@pytest.mark.parametrize("text", ["ab<|im_end|>", "ab", " ab\n"])
def test_text_of_the_same_ids(text: str, tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer("ab<|im_end|>")["input_ids"]
    assert read_rows(tokenizer, tmp_path / "a.jsonl", {"prompt_ids": [5], "response_ids": ids, "response": text})


@pytest.mark.parametrize(("text", "at"), [("aXb", 1), ("abc", 2), ("a", 1)])
def test_text_of_other_ids(text: str, at: int, tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt_ids": [5], "response_ids": tokenizer("ab")["input_ids"], "completion": text}
    assert f"character {at}" in rejection(tokenizer, tmp_path / "a.jsonl", row, kind="incompatible_tokenizer")


@pytest.mark.parametrize("name", ["rollout_3.pt", "batch.pkl"])
def test_nothing_is_unpickled(name: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(OpdctlError, match="pickled") as caught:
        next(read_trajectories([tmp_path / name], tokenizer, NUM_IDS))
    assert caught.value.kind == "invalid_data"
