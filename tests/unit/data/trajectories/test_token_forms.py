"""The forms of verl, slime, verifiers and prime-rl, and what they have beside token ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tokenizers import NUM_IDS, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.artifacts.records import Trajectory
from opdctl.data.trajectories.reading import read_trajectories
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir

PAD = 0
IDS = st.lists(st.integers(3, NUM_IDS - 1), min_size=1, max_size=8)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ModelDir(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model"), "float32").tokenizer


@pytest.fixture(scope="session")
def padding_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tokenizer(tmp_path_factory.mktemp("padding") / "model", pad_token="<|endoftext|>")
    return ModelDir(folder, "float32").tokenizer


def read_rows(tokenizer: Any, path: Path, *rows: dict[str, Any]) -> list[Trajectory]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_trajectories([path], tokenizer, NUM_IDS))


def rejection(tokenizer: Any, path: Path, row: dict[str, Any]) -> str:
    with pytest.raises(OpdctlError) as caught:
        read_rows(tokenizer, path, row)
    assert caught.value.kind == "invalid_data"
    return caught.value.message


def own_mask(trajectory: Trajectory) -> list[bool]:
    count = len(trajectory.response_ids)
    return [True] * count if trajectory.loss_mask is None else trajectory.loss_mask.tolist()


# ── verl ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(
    prompt=IDS,
    response=IDS,
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    seed=st.integers(0, 99),
    has_attention_mask=st.booleans(),
    has_mask=st.booleans(),
)
def test_padding_of_verl_is_removed(
    prompt: list[int],
    response: list[int],
    left: int,
    right: int,
    seed: int,
    has_attention_mask: bool,
    has_mask: bool,
    padding_tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    mask = [*(np.random.default_rng(seed).random(len(response) - 1) < 0.5).tolist(), True]
    logprobs = [-float(i) for i in range(len(response))]
    padded = {
        "prompts": [PAD] * left + prompt,
        "responses": response + [PAD] * right,
        "rollout_log_probs": logprobs + [0.0] * right,
    }
    if has_attention_mask:
        padded["attention_mask"] = [0] * left + [1] * len(prompt + response) + [0] * right
    if has_mask:
        padded["response_mask"] = mask + [False] * right
    plain = {"prompt_ids": prompt, "response_ids": response, "logprobs": logprobs}
    plain |= {"loss_mask": mask} if has_mask else {}
    path = tmp_path_factory.mktemp("verl") / "rows.jsonl"
    one, other = read_rows(padding_tokenizer, path, padded, plain)
    assert one.prompt_ids.tolist() == other.prompt_ids.tolist() == prompt
    assert one.response_ids.tolist() == other.response_ids.tolist() == response
    assert own_mask(one) == own_mask(other)
    assert one.logprobs is not None
    assert one.logprobs.tolist() == np.ravel(other.logprobs).tolist()


def test_tokens_of_padding_in_a_response_stay_by_the_attention_mask(padding_tokenizer: Any, tmp_path: Path) -> None:
    """A sampled token may be that of padding. Only the attention mask shows it."""
    row = {"prompts": [PAD, PAD, 5], "responses": [7, PAD, PAD], "attention_mask": [0, 1, 1, 1, 1, 0]}
    (read,) = read_rows(padding_tokenizer, tmp_path / "a.jsonl", row)
    assert read.prompt_ids.tolist() == [PAD, 5]
    assert read.response_ids.tolist() == [7, PAD]


@pytest.fixture(scope="module")
def ending_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer whose token of padding is that of the end."""
    folder = write_tokenizer(tmp_path_factory.mktemp("ending") / "model", pad_token="<|im_end|>")
    return ModelDir(folder, "float32").tokenizer


def test_padding_by_the_end_of_sequence_needs_a_mask(ending_tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompts": [5], "responses": [7, 2, 2]}
    assert "row 1: `responses`" in rejection(ending_tokenizer, tmp_path / "a.jsonl", row)
    (masked,) = read_rows(ending_tokenizer, tmp_path / "a.jsonl", row | {"response_mask": [1, 1, 0]})
    assert masked.response_ids.tolist() == [7, 2]
    (plain,) = read_rows(ending_tokenizer, tmp_path / "a.jsonl", row | {"responses": [7, 8]})
    assert plain.response_ids.tolist() == [7, 8], "nothing at the end may be padding"


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"attention_mask": [1, 1, 1]}, "attention_mask"),
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask"),
        ({"response_mask": [1, 1, 1]}, "response_mask"),
        ({"input_ids": [5, 6, 7, 9]}, "input_ids"),
        ({"rollout_log_probs": [-1.0]}, "rollout_log_probs"),
    ],
)
def test_invalid_rows_of_verl(columns: dict[str, Any], name: str, padding_tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompts": [5, 6], "responses": [7, 8]} | columns
    assert f"row 1: `{name}`" in rejection(padding_tokenizer, tmp_path / "a.jsonl", row)


def test_values_of_verl_in_parquet(padding_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "prompts": [PAD, 5],
            "responses": [7, 8],
            "attention_mask": [0, 1, 1, 1],
            "uid": "p",
            "data_source": "gsm8k",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "__num_turns__": 5,
        }
        for answer in ("18", "19")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_trajectories([tmp_path / "a.parquet"], padding_tokenizer, NUM_IDS))
    assert [(each.sample_id, each.prompt_id, each.answer) for each in read] == [("1", "p", "18"), ("2", "p", "19")]
    assert [each.turns for each in read] == [None, None], "verl counts the messages of all roles"


def test_texts_of_verls_rollout_data_are_refused(padding_tokenizer: Any, tmp_path: Path) -> None:
    """`trainer.rollout_data_dir` has texts without special tokens."""
    row = {"input": "user\nhi\nassistant\n", "output": "hello", "gts": "x", "score": 1.0, "step": 3}
    assert "row 1: `input`" in rejection(padding_tokenizer, tmp_path / "a.jsonl", row)


# ── slime ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def slime(**values: Any) -> dict[str, Any]:
    """Return a row as of `Sample.to_dict()`."""
    return {
        "group_index": 3,
        "index": 12,
        "prompt": "hi",
        "tokens": [5, 6, 7, 8],
        "response": "",
        "response_length": 2,
        "label": "42",
        "reward": 0.5,
        "loss_mask": None,
        "rollout_log_probs": [-1.0, -2.0],
        "teacher_log_probs": [-3.0, -4.0],
        "remove_sample": False,
        "status": "completed",
        "metadata": {},
        "non_generation_time": 1.5,
        **values,
    }


def test_values_of_slime(tokenizer: Any, tmp_path: Path) -> None:
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", slime(response=tokenizer.decode([7, 8])))
    assert (read.sample_id, read.prompt_id, read.answer, read.reward) == ("12", "3", "42", 0.5)
    assert (read.prompt_ids.tolist(), read.response_ids.tolist(), read.loss_mask) == ([5, 6], [7, 8], None)
    assert (read.finish_reason, read.tool_seconds) == ("stop", 1.5)
    assert np.ravel(read.logprobs).tolist() == [-1, -2]
    assert np.ravel(read.teacher_logprobs).tolist() == [-3, -4]


@pytest.mark.parametrize(
    ("status", "reason"), [("truncated", "length"), ("aborted", "length"), ("completed", "stop"), ("failed", None)]
)
def test_status_of_slime(status: str, reason: str | None, tokenizer: Any, tmp_path: Path) -> None:
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", slime(status=status, response=tokenizer.decode([7, 8])))
    assert read.finish_reason == reason


def test_samples_that_slime_removes_are_skipped(tokenizer: Any, tmp_path: Path) -> None:
    kept = slime(response=None)
    read = read_rows(tokenizer, tmp_path / "a.jsonl", kept | {"remove_sample": True, "index": 1}, kept)
    assert [each.sample_id for each in read] == ["12"]


@pytest.mark.parametrize(
    ("columns", "name"),
    [({"response_length": 5}, "response_length"), ({"loss_mask": [1]}, "loss_mask"), ({"tokens": "a"}, "tokens")],
)
def test_invalid_rows_of_slime(columns: dict[str, Any], name: str, tokenizer: Any, tmp_path: Path) -> None:
    assert f"row 1: `{name}`" in rejection(tokenizer, tmp_path / "a.jsonl", slime(**columns))


# ── verifiers and prime-rl ───────────────────────────────────────────────────────────────────────────────────────────


def node(parent: int | None, ids: list[int], own: list[int], **values: Any) -> dict[str, Any]:
    logprobs = [-float(id_) for id_, is_own in zip(ids, own, strict=True) if is_own]
    message = {"role": "assistant" if any(own) else "user", "content": "x"}
    made = {"message": message, "token_ids": ids, "mask": [bool(each) for each in own], "logprobs": logprobs}
    return made | ({} if parent is None else {"parent": parent}) | values


TRACE = {
    "id": "t",
    "task": {"type": "Sum", "data": {"answer": "7"}, "key": "k"},
    "rewards": {"correct": {"score": 1.0, "weight": 0.5}, "length": {"score": 2.0}, "none": None},
    "nodes": [
        node(None, [5, 6], [0, 0]),
        node(0, [10, 11, 12], [0, 1, 1], finish_reason="tool_calls"),
        node(1, [13], [0]),
        node(2, [14, 15], [0, 1], finish_reason="stop"),
        node(1, [16], [0]),
        node(4, [17], [1], finish_reason="length"),
    ],
}


def test_paths_of_a_trace(tokenizer: Any, tmp_path: Path) -> None:
    first, second = read_rows(tokenizer, tmp_path / "a.jsonl", TRACE)
    assert (first.sample_id, first.prompt_id, first.answer, first.reward) == ("t/0", "k", "7", 2.5)
    assert first.prompt_ids.tolist() == [5, 6, 10]
    assert first.response_ids.tolist() == [11, 12, 13, 14, 15]
    assert own_mask(first) == [True, True, False, False, True]
    assert np.ravel(first.logprobs).tolist() == [-11, -12, 0, 0, -15]
    assert first.finish_reason == "stop"
    assert second.prompt_ids.tolist() == [5, 6, 10, 11, 12, 16], "the shared turn is learned once"
    assert (second.sample_id, second.response_ids.tolist(), second.finish_reason) == ("t/1", [17], "length")


def test_a_trace_of_another_agent_is_skipped(tokenizer: Any, tmp_path: Path) -> None:
    plain = {"nodes": TRACE["nodes"][:4], "id": "u"}
    others = [TRACE | {"agent": {"trainable": False}}, {"id": "failed", "nodes": []}]
    assert [each.sample_id for each in read_rows(tokenizer, tmp_path / "a.jsonl", *others, plain)] == ["u"]


def test_a_trace_without_token_ids_is_rendered(tokenizer: Any, tmp_path: Path) -> None:
    nodes = [{"message": {"role": role, "content": role}, "parent": i - 1 if i else None}
             for i, role in enumerate(("user", "assistant"))]  # fmt: skip
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", {"nodes": nodes})
    assert tokenizer.decode(read.response_ids) == "assistant<|im_end|>"


@pytest.mark.parametrize(
    "nodes",
    [
        [node(None, [5], [0]), node(1, [6], [1])],
        [node(None, [5], [0]), node(0, [6], [1], mask=[])],
        [node(None, [5], [0]), node(0, [6], [1], logprobs=[-1.0, -2.0])],
    ],
    ids=["parent", "mask", "logprobs"],
)
def test_invalid_traces(nodes: list[dict[str, Any]], tokenizer: Any, tmp_path: Path) -> None:
    assert "row 1: `nodes[1]" in rejection(tokenizer, tmp_path / "a.jsonl", {"nodes": nodes})


def test_results_of_verifiers(tokenizer: Any, tmp_path: Path) -> None:
    """`results.jsonl` has messages, and the calls of tools as texts in JSON."""
    call = json.dumps({"id": "c", "name": "sum", "arguments": "{}"})
    row = {
        "example_id": 4,
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [
            {"role": "assistant", "content": "a"},
            {"role": "tool", "content": "b", "tool_call_id": "c"},
            {"role": "assistant", "content": "c"},
        ],
        "answer": "x",
        "reward": 1.0,
        "is_truncated": False,
    }
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", row)
    assert (read.prompt_id, read.answer, read.reward, read.turns, read.finish_reason) == ("4", "x", 1.0, 2, "stop")
    assert tokenizer.decode(read.response_ids[own_mask(read)]) == "a<|im_end|>c<|im_end|>"
    (cut,) = read_rows(tokenizer, tmp_path / "a.jsonl", row | {"is_truncated": True})
    assert tokenizer.decode(cut.response_ids[own_mask(cut)]) == "a<|im_end|>c"
    row["completion"][0]["tool_calls"] = [call]
    with pytest.raises(OpdctlError, match="tool calls"):
        read_rows(tokenizer, tmp_path / "a.jsonl", row)


# ── Messages and texts ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "a"},
        {"prompt": "hi", "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_messages(row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", row)
    assert tokenizer.decode(read.prompt_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(read.response_ids) == "a<|im_end|>"
    assert read.loss_mask is None


def test_texts(tokenizer: Any, tmp_path: Path) -> None:
    (read,) = read_rows(tokenizer, tmp_path / "a.jsonl", {"prompt": "1+1=", "completion": "2"})
    assert (tokenizer.decode(read.prompt_ids), tokenizer.decode(read.response_ids)) == ("1+1=", "2")


def test_instructions_are_no_rollouts(tokenizer: Any, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    assert "`instruction`" in rejection(tokenizer, tmp_path / "a.jsonl", row)


# ── Any rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = (
    *(
        "prompt_ids",
        "response_ids",
        "input_ids",
        "prompts",
        "responses",
        "tokens",
        "response_length",
        "labels",
        "nodes",
    ),
    *("loss_mask", "response_mask", "attention_mask", "prompt_mask", "completion_mask", "logprobs", "teacher_logprobs"),
    *(
        "student_top_ids",
        "student_top_logprobs",
        "prompt",
        "completion",
        "response",
        "messages",
        "tools",
        "id",
        "index",
    ),
    *("answer", "reward", "reward_model", "status", "finish_reason", "turns", "rewards", "task", "agent"),
)
NUMBERS = st.integers(-2, 300) | st.floats(width=32) | st.booleans() | st.none()
SCALARS = NUMBERS | st.sampled_from(["", "a", "user", "assistant", "<|im_end|>", "\ud800"])
KEYS = st.sampled_from(
    ["role", "content", "message", "parent", "token_ids", "mask", "logprobs", "score", "data", "from"]
)
VALUES = st.recursive(
    SCALARS | st.lists(st.integers(0, 9), max_size=4) | st.lists(NUMBERS, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), max_size=2))
def test_any_row_is_read_or_refused(
    rows: list[dict[str, Any]], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    read, message = [], str(path)
    try:
        read = read_rows(tokenizer, path, *rows)
    except OpdctlError as error:
        message = error.message
    assert str(path) in message
    for each in read:
        count = len(each.response_ids)
        assert count
        assert len(each.prompt_ids)
        assert any(own_mask(each))
        assert all(
            len(column) == count for column in (each.loss_mask, each.logprobs, each.top_ids) if column is not None
        )
