"""Prompts as chats in the forms of OpenAI, TRL and ShareGPT, valid and malformed; schemas of tools."""

import json
from typing import Any

import pytest

from opdctl.data.messages import Chat, Message, parse_chat, parse_tools
from opdctl.errors import OpdctlError

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
PARSED_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def parsed(*turns: Any, **settings: Any) -> Chat:
    return parse_chat(list(turns), "p.jsonl: row 7: `prompt`", **settings)


def rejection(call: Any) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        call()
    assert caught.value.kind == "invalid_data"
    assert (caught.value.detail or "").startswith("p.jsonl: row 7: `prompt`")
    return caught.value


# ── Turns ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_is_one_message_of_the_user() -> None:
    assert parse_chat("2+2?", "row 1") == Chat("2+2?")
    assert Chat("2+2?").messages == (Message("user", "2+2?"),)


def test_chat_keeps_its_messages_in_order() -> None:
    turns = [("system", ""), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    # A Parquet file gives null for a key that another message has.
    cell = [{"content": text, "role": role, "name": None, "tool_calls": None} for role, text in turns]
    earlier = tuple(Message(role, text) for role, text in turns[:-1])
    assert parsed(*cell) == Chat("2+2?", earlier)
    assert [(each.role, each.text) for each in parsed(*cell).messages] == turns


def test_sharegpt_is_the_same_chat() -> None:
    names = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool", "user": "user"}
    chat = parsed(*({"from": name, "value": name} for name in names))
    assert chat == parsed(*({"role": role, "content": name} for name, role in names.items()))


def test_text_parts_are_joined_by_a_newline() -> None:
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?", "image_url": None}]
    assert parsed({"role": "user", "content": parts}) == Chat("2\n+2?")


@pytest.mark.parametrize("setting", ["drop", "continue", "error"])
def test_assistant_at_the_end(setting: Any) -> None:
    if setting == "error":
        assert (
            "the last message has role `assistant`"
            in rejection(lambda: parsed(USER, ANSWER, final_assistant=setting)).message
        )
    else:
        later = (Message("assistant", "4"),) if setting == "continue" else ()
        assert parsed(USER, ANSWER, final_assistant=setting) == Chat("2+2?", later=later)
    assert parsed(USER, final_assistant=setting) == Chat("2+2?")
    earlier = (Message("user", "2+2?"), Message("assistant", "4"))
    assert parsed(USER, ANSWER, USER, final_assistant=setting) == Chat("2+2?", earlier)


@pytest.mark.parametrize(
    ("cell", "part"),
    [
        ([], "must be text"),
        ({"role": "user", "content": "a"}, "must be text"),
        (["a"], "message 1: must be"),
        ([USER, ["user", "a"]], "message 2: must be"),
        ([{"role": "user"}], "message 1: must be"),
        ([{"role": "user", "content": None}], "message 1: must be"),
        ([{"from": "human", "content": "a"}], "message 1: must be"),
        ([{**USER, "contents": "b"}], "message 1: key `contents` is not supported; did you mean `content`?"),
        ([{"role": "usr", "content": "a"}], "message 1: unknown role `usr`; did you mean `user`?"),
        ([{"from": "bot", "value": "a"}], "message 1: unknown role `bot`"),
        ([{"role": ["user"], "content": "a"}], "message 1: unknown role"),
        ([{"role": "user", "content": 5}], "message 1: content must be text"),
        ([{"role": "user", "content": ["a"]}], "message 1: a part of the content must be"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "message 1: a part of the content must be"),
        ([{"role": "user", "content": "a\ud800"}], "message 1: invalid Unicode at character 1"),
        ([{**USER, "name": "a\ud800"}], "message 1: invalid Unicode at character 1"),
        ([{"role": "system", "content": "a"}], "no message has role `user`"),
        ([ANSWER], "no message has role `user`"),
        ([USER, {"role": "system", "content": "a"}], "the last message has role `system`"),
        ([USER, {"role": "user", "content": ""}], "the last message of the user is empty"),
    ],
)
def test_malformed_messages_are_rejected_with_place_and_reason(cell: Any, part: str) -> None:
    assert part in rejection(lambda: parse_chat(cell, "p.jsonl: row 7: `prompt`")).message


def test_long_value_is_shortened_in_the_error() -> None:
    error = rejection(lambda: parsed({"role": "user", "text": "a" * 10**6}))
    assert len(error.message) < 350


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_images_are_refused_with_one_sentence(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "a.png"}}]
    error = rejection(lambda: parsed({"role": "user", "content": parts}))
    assert f"message 1: a content of type `{kind}`: images, audio and video are not supported yet" in error.message


# ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_of_tools_are_kept_with_their_arguments_as_an_object() -> None:
    call = {"role": "assistant", "content": None, "reasoning_content": "2 and 2", "tool_calls": [{**CALL, "id": None}]}
    result = {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add", "weight": 0}
    extra = {"tool_calls": [PARSED_CALL], "reasoning_content": "2 and 2"}
    later = (Message("assistant", "", extra), Message("tool", "4", {"name": "add", "tool_call_id": "1"}))
    assert parsed(USER, call, result) == Chat("2+2?", later=later)
    assert parsed(USER, call, result, ANSWER) == Chat("2+2?", later=later)
    assert parsed(USER, {**ANSWER, "tool_calls": []}, USER).earlier[1] == Message("assistant", "4")


@pytest.mark.parametrize("calls", ["add", [5], [{"function": {"arguments": "{}"}}]])
def test_malformed_calls_are_rejected(calls: Any) -> None:
    assert "message 2: tool_calls must be" in rejection(lambda: parsed(USER, {**ANSWER, "tool_calls": calls})).message


def test_schemas_of_tools_are_a_list_or_its_json() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"a": {"default": None}}}}
    assert parse_tools(json.dumps([tool]), "row 1") == (tool,)
    # In a list, null is the key of another row.
    assert parse_tools([tool], "row 1") == ({"type": "function", "function": {"name": "add", "parameters": {"a": {}}}},)
    assert [parse_tools(cell, "row 1") for cell in (None, "", [], "[]")] == [()] * 4


@pytest.mark.parametrize("cell", ["[", "{}", '[{"type": "function"}]', [5], {"name": "add"}, "[" * 10**5])
def test_malformed_tools_are_rejected(cell: Any) -> None:
    rejection(lambda: parse_tools(cell, "p.jsonl: row 7: `prompt`"))
