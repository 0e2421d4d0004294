"""The wording of every error message, reviewed in one table: messages.txt beside this file.

A changed message fails here. Review the new wording, then write the table again:

    python tests/unit/test_messages.py
"""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import typer

from opdctl.cli.main import app
from opdctl.errors import EXIT_CODES, ErrorKind, ExitCode, OpdctlError

PACKAGE = Path(__file__).parents[2] / "opdctl"
TABLE = Path(__file__).with_name("messages.txt")
IMPERATIVES = {
    *("add", "check", "choose", "close", "convert", "correct", "create", "delete", "distil", "download", "evaluate"),
    *(
        "fix",
        "fork",
        "free",
        "give",
        "install",
        "keep",
        "log",
        "lower",
        "make",
        "move",
        "name",
        "pass",
        "provide",
        "put",
    ),
    *(
        "raise",
        "reduce",
        "relax",
        "remove",
        "rename",
        "replace",
        "rerun",
        "restart",
        "restore",
        "return",
        "run",
        "serve",
        "set",
    ),
    *("start", "store", "stop", "switch", "train", "update", "upgrade", "use", "wait", "write"),
}
CONDITIONS = ("to ", "if ", "for ", "a ", "an ", "the ", "its ", "each ", "only ", "{", "`", "known", "--dry-run")
"""Other beginnings of a hint: a purpose or a fact that decides what to do."""
BANNED = re.compile(
    r"\b(made again|begun|goes on|go on|gone on|whole|so many|in the mean|taken over|of its own|of your own|told|tells|"
    r"lies in|stands for|there is not|none is|damaged|spoilt|mend|a person|for want of)\b"
)


class Message(NamedTuple):
    module: str
    kind: str
    detail: str
    hint: str


def error_messages() -> Iterator[Message]:
    """Yield every message that the code can raise, with `{expression}` for its variable parts."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            hint = next((_template(word.value) for word in call.keywords if word.arg == "hint"), "")
            arguments = [_template(argument) for argument in call.args]
            module = str(path.relative_to(PACKAGE))
            if name == "OpdctlError" and len(arguments) > 1:
                yield Message(module, arguments[0], arguments[1], hint)
            elif name == "corrupt_artifact" and len(arguments) > 1:
                yield Message(module, "corrupt_artifact", f"{arguments[0]}: {arguments[1]}", "".join(arguments[2:3]))


def _template(node: ast.expr) -> str:
    """Return a string expression as a template."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Constant(value=None):
            return ""
        case ast.JoinedStr(values=values):
            return "".join(_template(value) for value in values)
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case _:
            return f"{{{ast.unparse(node)}}}"


MESSAGES = sorted(set(error_messages()))


def render_table() -> str:
    """Return the table: kind and detail as they are printed, then the hint."""
    lines = []
    for module, kind, detail, hint in MESSAGES:
        heading = kind.replace("_", " ").capitalize()
        lines += [module, f"    error: {heading}: {detail}".replace("\n", "\n        ")]
        lines += [f"    hint: {hint}".replace("\n", "\n        ")] if hint else []
    return "\n".join(lines) + "\n"


def test_messages_are_the_reviewed_ones():
    assert render_table() == TABLE.read_text(), "review the wording, then run: python tests/unit/test_messages.py"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: f"{message.module} {message.detail[:40]}")
def test_a_message_is_plain_and_actionable(message):
    assert message.kind in get_args(ErrorKind) or message.kind.startswith("{")
    for text in (message.detail, message.hint):
        fixed = re.sub(r"\{[^}]*\}|`[^`]*`", "", text)
        assert not BANNED.search(fixed), text
        assert not fixed.endswith("."), "messages end without a full stop"
    if message.hint:
        first = re.split(r"[ ,;:]", message.hint)[0]
        assert first in IMPERATIVES or message.hint.startswith(CONDITIONS), f"no imperative: {message.hint}"


def commands_in(text: str) -> list[str]:
    """Return the commands of opdctl in a message, each value replaced by 1."""
    found = re.findall(r"`opdctl ([^`]*)`", text)
    return [re.sub(r"\{[^}]*\}|…|\b[A-Z_]{2,}\b", "1", command) for command in found]


def parse(words: list[str]) -> None:
    """Let the command line parse the words of a command, without running it."""
    command = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup):
        name = words.pop(0)
        assert name in command.commands, name
        command = command.commands[name]
    command.make_context(command.name, words)


COMMANDS = sorted({command for message in MESSAGES for command in commands_in(f"{message.detail} {message.hint}")})


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("eval", "rollout")])
def test_commands_in_messages_can_be_parsed(command):
    parse(shlex.split(command))


def test_paths_in_commands_are_quoted():
    """A run may lie in a directory whose name has a space."""
    lines = [line for file in sorted(PACKAGE.rglob("*.py")) for line in file.read_text().splitlines()]
    commands = [found[1] for line in lines if (found := re.search(r"opdctl [a-z-]+([^`\"]*\{.*)", line))]
    assert len(commands) > 5
    for command in commands:
        for value in re.findall(r"\{([^}]*(?:path|dir)[^}]*)\}", command):
            assert value == "path" or "quote(" in value, command  # a variable of this name is quoted where it is set


def test_every_kind_is_used():
    kinds = {message.kind for message in MESSAGES} | {"settings_mismatch"}  # FingerprintMismatchError
    assert set(get_args(ErrorKind)) - kinds == set()


def test_a_message_begins_with_its_kind_and_the_kind_has_an_exit_code():
    error = OpdctlError("checksum_mismatch", "part-00000: SHA-256 ab…, expected cd…", hint="run `opdctl run repair`")
    assert error.message == "Checksum mismatch: part-00000: SHA-256 ab…, expected cd…"
    assert error.code == ExitCode.BAD_DATA
    assert set(EXIT_CODES) == set(get_args(ErrorKind))


if __name__ == "__main__":
    TABLE.write_text(render_table())
    sys.stdout.write(f"wrote {len(MESSAGES)} messages to {TABLE}\n")
