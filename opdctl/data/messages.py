"""The messages of a prompt: a text of the user, or a chat whose last message is the user's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opdctl.data.cells import MAX_SHOWN_CHARS, check_unicode
from opdctl.errors import OpdctlError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """A message of a chat. role: one of ROLES."""

    role: str
    text: str


def parse_messages(cell: Any, location: str) -> tuple[Message, ...]:
    """Return the messages of a prompt cell: a text, or a list of `{"role": …, "content": …}`.

    location: of the cell, for errors.

    Raises:
        OpdctlError: the cell or a message has another form, a role is unknown, the last message is not the user's, or
            its text is empty.
    """
    if isinstance(cell, list) and cell:
        messages = tuple(_parse_message(turn, f"{location}: message {n}") for n, turn in enumerate(cell, 1))
    elif isinstance(cell, str) and cell:
        messages = (Message("user", check_unicode(cell, location)),)
    else:
        wanted = f"must be text or a list of chat messages, got {cell!r:.{MAX_SHOWN_CHARS}}"
        reason = "is null" if cell is None else wanted
        raise OpdctlError("invalid_data", f"{location} {reason}")
    if messages[-1].role != "user":
        reason = f"the last message has role `{messages[-1].role}`, not `user`"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint="remove the messages after the user's last one")
    if not messages[-1].text.strip():
        raise OpdctlError("invalid_data", f"{location}: the last message is empty")
    return messages


def _parse_message(turn: Any, location: str) -> Message:
    form = '{"role": …, "content": …}'
    # A Parquet file has null for a key that only other messages have.
    keys = {key for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else set()
    if keys != {"role", "content"}:
        raise OpdctlError("invalid_data", f"{location}: must be {form}, got {turn!r:.{MAX_SHOWN_CHARS}}")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        known = ", ".join(f"`{name}`" for name in ROLES)
        raise OpdctlError(
            "invalid_data",
            f"{location}: unknown role `{role!s:.{MAX_SHOWN_CHARS}}`{did_you_mean(str(role), ROLES)}",
            hint=f"use one of the roles {known}",
        )
    if not isinstance(content, str):
        raise OpdctlError("invalid_data", f"{location}: content must be text, got {content!r:.{MAX_SHOWN_CHARS}}")
    return Message(role, check_unicode(content, location))
