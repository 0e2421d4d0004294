"""The messages of a prompt: a text of the user, or a chat in the form of OpenAI or of ShareGPT. Imports no torch."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opdctl.artifacts import parsing
from opdctl.data.cells import MAX_SHOWN_CHARS, MEDIA_HINT, check_unicode
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.recipe.prompts import FinalAssistant

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""The names of roles under the key `from`. Others are those of ROLES."""
EXTRA_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Keys of a message that a chat template may read."""
IGNORED_KEYS = ("weight",)
"""Keys that concern the training of OpenAI's models on the answers in the data."""
Tool = Mapping[str, Any]
"""The schema of a tool, in the form of OpenAI."""


@dataclass(frozen=True)
class Message:
    """A message of a chat. role: one of ROLES. extra: its values under EXTRA_KEYS, for the chat template."""

    role: str
    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Yield the text, and those of the further values."""
        yield self.text
        yield from find_texts(self.extra)

    def map_texts(self, change: Callable[[str], str]) -> "Message":
        """Return the message with each of these texts changed."""
        return replace(self, text=change(self.text), extra=map_texts(self.extra, change))


@dataclass(frozen=True)
class Chat:
    """A chat before the chat template.

    text: the last message of the user. earlier: the messages before it. later: those after it: the calls of tools and
    their results, and the start of the response if the last one is the assistant's.
    """

    text: str
    earlier: tuple[Message, ...] = ()
    later: tuple[Message, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self.earlier, Message("user", self.text), *self.later)


def parse_chat(cell: Any, location: str, final_assistant: FinalAssistant = "drop") -> Chat:
    """Return the chat of a prompt cell: a text, or a list of messages.

    A message is `{"role": …, "content": …}`, or `{"from": …, "value": …}` as in ShareGPT. location: of the cell, for
    errors. final_assistant: what is done with a last message of the assistant, `prompts.final_assistant`.

    Raises:
        OpdctlError: the cell or a message has another form, has images, or a key or role that is unknown; no message
            is the user's, or its text is empty; the last message is the assistant's and `final_assistant` is "error".
    """
    messages = parse_messages(cell, location)
    if messages[-1].role == "assistant" and final_assistant != "continue":
        _drop_answer(messages, location, final_assistant)
    return make_chat(messages, location)


def parse_messages(cell: Any, location: str) -> list[Message]:
    """Return the messages of a cell: of a list, or the user's one of a text.

    Raises:
        OpdctlError: the cell or a message has another form, has images, or a key or role that is unknown.
    """
    if isinstance(cell, list) and cell:
        return [_parse_message(turn, f"{location}: message {n}") for n, turn in enumerate(cell, 1)]
    if isinstance(cell, str) and cell:
        return [Message("user", check_unicode(cell, location))]
    wanted = f"must be text or a list of chat messages, got {cell!r:.{MAX_SHOWN_CHARS}}"
    reason = "is null" if cell is None else wanted
    raise OpdctlError("invalid_data", f"{location} {reason}")


def make_chat(messages: Sequence[Message], location: str) -> Chat:
    """Return the chat of messages.

    Raises:
        OpdctlError: no message is the user's, or its text is empty; or none of the user, a tool or the assistant is
            last.
    """
    index = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if index is None:
        raise OpdctlError("invalid_data", f"{location}: no message has role `user`")
    if messages[-1].role not in ("user", "tool", "assistant"):
        reason = f"the last message has role `{messages[-1].role}`, not `user`"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint="remove the messages after the user's last one")
    if not messages[index].text.strip():
        raise OpdctlError("invalid_data", f"{location}: the last message of the user is empty")
    return Chat(messages[index].text, tuple(messages[:index]), tuple(messages[index + 1 :]))


def _drop_answer(messages: list[Message], location: str, final_assistant: FinalAssistant) -> None:
    if final_assistant == "error":
        reason = "the last message has role `assistant`"
        hint = 'remove it, or set prompts.final_assistant to "drop" or "continue"'
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint=hint)
    while messages and messages[-1].role == "assistant":
        messages.pop()


def _parse_message(turn: Any, location: str) -> Message:
    form = '{"role": …, "content": …} or {"from": …, "value": …}'
    # A Parquet file has null for a key that only other messages have.
    values = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    role_key, content_key = ("from", "value") if "from" in values else ("role", "content")
    if role_key not in values or (content_key not in values and "tool_calls" not in values):
        raise OpdctlError("invalid_data", f"{location}: must be {form}, got {turn!r:.{MAX_SHOWN_CHARS}}")
    known = (role_key, content_key, *EXTRA_KEYS, *IGNORED_KEYS)
    if unknown := [str(key) for key in values if key not in known]:
        reason = f"key `{unknown[0]:.{MAX_SHOWN_CHARS}}` is not supported{did_you_mean(unknown[0], known)}"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint="remove it from the messages")
    extra = {key: _without_nulls(values[key]) for key in EXTRA_KEYS if key in values and values[key] != []}
    if "tool_calls" in extra:
        extra["tool_calls"] = _parse_tool_calls(extra["tool_calls"], location)
    text = _parse_content(values.get(content_key, ""), location)
    _check_texts(extra, location)
    return Message(_parse_role(values[role_key], location), check_unicode(text, location), extra)


def _parse_role(role: Any, location: str) -> str:
    name = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if name in ROLES:
        return str(name)
    known = ", ".join(f"`{name}`" for name in ROLES)
    raise OpdctlError(
        "invalid_data",
        f"{location}: unknown role `{role!s:.{MAX_SHOWN_CHARS}}`{did_you_mean(str(role), ROLES)}",
        hint=f"use one of the roles {known}",
    )


def _parse_content(content: Any, location: str) -> str:
    """Return the text of a content; parts are joined by a newline, as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise OpdctlError("invalid_data", f"{location}: content must be text, got {content!r:.{MAX_SHOWN_CHARS}}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" and isinstance(kind, str):
            reason = f"a content of type `{kind:.{MAX_SHOWN_CHARS}}`: images, audio and video are not supported yet"
            raise OpdctlError("invalid_data", f"{location}: {reason}", hint=MEDIA_HINT)
        others = [key for key, value in part.items() if value is not None] if kind else []
        if not kind or {*others} != {"type", "text"} or not isinstance(part["text"], str):
            wanted = f'a part of the content must be {{"type": "text", "text": …}}, got {part!r:.{MAX_SHOWN_CHARS}}'
            raise OpdctlError("invalid_data", f"{location}: {wanted}")
        texts.append(part["text"])
    return "\n".join(texts)


# ── Tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_tools(cell: Any, location: str) -> tuple[Tool, ...]:
    """Return the schemas of tools: of a list, or of its text in JSON. There are none if the cell is null or empty.

    Raises:
        OpdctlError: it is no list of schemas with a name.
    """
    if isinstance(cell, str) and cell.strip():
        try:
            cell = parsing.parse_json(cell)
        except ValueError as error:  # no JSON, or beyond a bound
            raise OpdctlError("invalid_data", f"{location}: no JSON: {error}") from None
    else:
        cell = _without_nulls(cell)
    if cell in (None, "", []):
        return ()
    if not isinstance(cell, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in cell):
        form = 'a list of {"type": "function", "function": {"name": …, …}}, or its JSON text'
        raise OpdctlError("invalid_data", f"{location}: must be {form}, got {cell!r:.{MAX_SHOWN_CHARS}}")
    _check_texts(cell, location)
    return tuple(cell)


def tool_name(tool: Tool) -> str | None:
    """Return the name in the schema, or in the call, of a tool; None if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None


def _parse_tool_calls(calls: Any, location: str) -> list[dict[str, Any]]:
    """Return the calls with their arguments as an object, which templates expect; OpenAI's are its text in JSON, and
    a whole call of verifiers is one."""
    if isinstance(calls, list):
        calls = [_parse_call(call) for call in calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) and tool_name(call) for call in calls):
        form = 'tool_calls must be a list of {"function": {"name": …, "arguments": …}}'
        raise OpdctlError("invalid_data", f"{location}: {form}, got {calls!r:.{MAX_SHOWN_CHARS}}")
    return [_with_object(call) for call in calls]


def _parse_call(call: Any) -> Any:
    try:
        return parsing.parse_json(call) if isinstance(call, str) else call
    except ValueError:
        return call


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    arguments = call.get("arguments")
    try:
        parsed = parsing.parse_json(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null: a Parquet file has them for the keys of other rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# ── Texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of lists and objects with every text in it changed, the keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_texts(key, change): map_texts(item, change) for key, item in value.items()}
    return [map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def find_texts(value: Any) -> Iterator[str]:
    """Yield every text in a value of lists and objects, the keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        items = itertools.chain(*value.items()) if isinstance(value, Mapping) else value
        for item in items:
            yield from find_texts(item)


def _check_texts(value: Any, location: str) -> None:
    for text in find_texts(value):
        check_unicode(text, location)
