"""Prompts as chat messages, valid and malformed."""

from typing import Any

import pytest

from opdctl.data.messages import Message, parse_messages
from opdctl.errors import OpdctlError

USER = {"role": "user", "content": "2+2?"}


def test_text_is_one_message_of_the_user() -> None:
    assert parse_messages("2+2?", "row 1") == (Message("user", "2+2?"),)


def test_chat_keeps_its_messages_in_order() -> None:
    turns = [("system", ""), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    # A Parquet file gives null for a key that another message has.
    cell = [{"content": text, "role": role, "name": None} for role, text in turns]
    assert parse_messages(cell, "row 1") == tuple(Message(role, text) for role, text in turns)


@pytest.mark.parametrize(
    ("cell", "part"),
    [
        ([], "must be text"),
        ({"role": "user", "content": "a"}, "must be text"),
        (["a"], "message 1: must be"),
        ([USER, ["user", "a"]], "message 2: must be"),
        ([{"role": "user"}], "message 1: must be"),
        ([{"role": "user", "content": None}], "message 1: must be"),
        ([{**USER, "tool_calls": []}], "message 1: must be"),
        ([{"role": "usr", "content": "a"}], "message 1: unknown role `usr`; did you mean `user`?"),
        ([{"role": ["user"], "content": "a"}], "message 1: unknown role"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "message 1: content must be text"),
        ([{"role": "user", "content": "a\ud800"}], "message 1: invalid Unicode at character 1"),
        ([USER, {"role": "assistant", "content": "4"}], "the last message has role `assistant`"),
        ([USER, {"role": "user", "content": ""}], "the last message is empty"),
    ],
)
def test_malformed_messages_are_rejected_with_place_and_reason(cell: Any, part: str) -> None:
    with pytest.raises(OpdctlError) as caught:
        parse_messages(cell, "p.jsonl: row 7: `prompt`")
    assert caught.value.kind == "invalid_data"
    assert (caught.value.detail or "").startswith("p.jsonl: row 7: `prompt`")
    assert part in caught.value.message


def test_long_value_is_shortened_in_the_error() -> None:
    with pytest.raises(OpdctlError) as caught:
        parse_messages([{"role": "user", "text": "a" * 10**6}], "row 1")
    assert len(caught.value.message) < 300
