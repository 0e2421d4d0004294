"""Console output: what a command was asked for on stdout; messages and progress on stderr.

With --json the JSON object alone is on stdout, and what was asked for is on stderr, too.

Text from prompts, responses and models is never interpreted as markup or as terminal escape codes.
"""

import codecs
import contextlib
import functools
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

UNWRAPPED_WIDTH = 1000
"""Columns of a file or a pipe: tables are never wrapped there."""


def _make_console(*, stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = UNWRAPPED_WIDTH
    return made


console = _make_console(stderr=True)
_stdout = _make_console(stderr=False)
_is_stdout_json = False
_level = 0
_name = ""
_forwarded: set[str] = set()
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Escape codes, and characters that change the direction of text. Tab and newline are not among them."""
MAX_TABLE_ROWS = 12
"""Rows of a live table; older rows scroll out."""
PROGRESS_DELAY_SECONDS = 10.0
"""Work that takes less time prints no progress lines outside a terminal."""
PROGRESS_SECONDS = 30.0
"""The longest time without a progress line."""


PLAIN = {"≤": "<=", "≥": ">=", "→": "->", "–": "-", "─": "-", "│": "|", "…": "...", "×": "x", "±": "+-", "Δ": "d"}
"""What is printed in the place of a character that the encoding of a terminal or a pipe lacks."""


def use_plain_characters() -> None:
    """Let stdout and stderr replace characters that their encoding lacks, such as ASCII in the locale C."""
    codecs.register_error("plain", _encode_plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def _encode_plainly(error: UnicodeError) -> tuple[str, int]:
    """Return a plain form of the characters that cannot be encoded; box characters are `+`, unknown ones an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = [PLAIN.get(each) or ("+" if "─" <= each <= "╿" else ascii(each)[1:-1]) for each in characters]
    return "".join(plain), error.end


def _print_answer(renderable: RenderableType) -> None:
    if _level >= 0:
        (console if _is_stdout_json else _stdout).print(renderable)


@contextlib.contextmanager
def settings(level: int, name: str = "", *, is_stdout_json: bool) -> Iterator[None]:
    """Set how a command prints, until it ends.

    Args:
        level: the verbosity (-1 errors and warnings, 0 normal, 1 debug).
        name: a prefix for errors, such as "rank 1: ".
        is_stdout_json: stdout gets a JSON object, so that answers go to stderr.
    """
    global _level, _name, _is_stdout_json
    before = _level, _name, _is_stdout_json
    _level, _name, _is_stdout_json = level, name, is_stdout_json
    try:
        yield
    finally:
        _level, _name, _is_stdout_json = before


def _strip_control_chars(text: str) -> str:
    return CONTROL_CHARS.sub("\N{REPLACEMENT CHARACTER}", text)


def info(message: str, style: str = "") -> None:
    if _level >= 0:
        console.print(Text(_strip_control_chars(message), style=style))


def answer(message: str, style: str = "") -> None:
    """Print a line of what the command was asked for."""
    _print_answer(Text(_strip_control_chars(message), style=style))


def debug(message: str) -> None:
    if _level >= 1:
        console.print(Text(_strip_control_chars(message), style="dim"))


def warn(message: str) -> None:
    console.print(Text.assemble(("warning: ", "yellow"), _strip_control_chars(message)))


@functools.cache
def info_once(message: str) -> None:
    """Print a message the first time that this process has it."""
    info(message)


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning the first time that this process has it."""
    warn(message)


def error(message: str, hint: str | None) -> None:
    console.print(Text.assemble(_name, ("error: ", "bold red"), _strip_control_chars(message)))
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), _strip_control_chars(hint)))


def print_renderable(text: Text) -> None:
    """Print styled text as an answer. The caller has removed control characters."""
    _print_answer(text)


class _Forwarder:
    """Stands in for the console of a process that has none."""

    is_terminal = False
    is_dumb_terminal = False

    def __init__(self, send: Callable[[Text], None], advance: Callable[[int], None] | None):
        self.print, self.advance = send, advance


def forward_to(send: Callable[[Text], None], level: int, advance: Callable[[int], None] | None = None) -> None:
    """Let all messages of this process, a child, be printed by its parent: `send` passes them to it.

    advance: passes on the number of items that were processed, for the progress bar of the parent.
    """
    global console, _level
    console = _Forwarder(send, advance)  # type: ignore[assignment]
    _level = level


def print_line(line: str) -> None:
    """Print what another process has printed as a message, as often as it comes."""
    console.print(Text(_strip_control_chars(line)))


def print_forwarded(text: Text) -> None:
    """Print a message of a child process, unless one has sent it before."""
    if text.plain not in _forwarded:
        _forwarded.add(text.plain)
        console.print(text)


def get_level() -> int:
    """Return the verbosity, for a child process."""
    return _level


def print_fields(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a titled list of (label, value) as an answer."""
    width = max(len(label) for label, _ in rows)
    _print_answer(Text(title, style="bold"))
    for label, value in rows:  # no table, which would wrap paths and commands
        _print_answer(Text.assemble((f"{label:<{width}}  ", "cyan"), _strip_control_chars(value)))


def print_components(title: str, entries: Sequence[Any]) -> None:
    """Print the components of a registry (`ComponentInfo`): name, summary, parameters with defaults, source."""
    _print_answer(Text(title, style="bold"))
    for entry in entries:
        parameters = ", ".join(f"{name} = {json.dumps(value)}" for name, value in entry.parameters.items())
        _print_answer(Text.assemble((entry.name, "cyan"), f"  {entry.summary}"))
        _print_answer(Text("    " + "; ".join(part for part in (parameters, entry.source) if part), style="dim"))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table as an answer.

    The first `left` columns are left-justified; the others are right-justified, as numbers are.
    """
    _print_answer(_build_table(title, header, rows, left))


def _build_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    table = Table(title=Text(_strip_control_chars(title), style="bold"), title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index >= left else "left")
    for row in rows:
        table.add_row(*(Text(_strip_control_chars(cell)) for cell in row))
    return table


@contextlib.contextmanager
def live_table(title: str, header: Sequence[str]) -> Iterator[Callable[[Callable[[], Sequence[str]], str], None]]:
    """Yield a function add(make_row, line), where `line` has the content of the row as text.

    On a terminal, the last rows are a table that stays at the bottom, below messages and progress. Elsewhere, also on a
    dumb terminal, each line is printed and no row is made.
    """
    if _level < 0 or not _can_redraw():
        yield lambda make_row, line: info(line)
        return
    rows: list[Sequence[str]] = []
    with Live(console=console, auto_refresh=False) as live:

        def add(make_row: Callable[[], Sequence[str]], line: str) -> None:
            rows.append(make_row())
            live.update(_build_table(title, header, rows[-MAX_TABLE_ROWS:], left=0), refresh=True)

        yield add


@contextlib.contextmanager
def progress(label: str, total: int, *, is_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function advance(n), called after n of `total` items.

    It draws a bar on a terminal. Elsewhere it prints a line every 10 %, and whenever PROGRESS_SECONDS have passed.
    is_bytes: the items are bytes, which are shown with their number per second.
    """
    if isinstance(console, _Forwarder) and console.advance:
        yield console.advance
    elif _level < 0:
        yield lambda n: None
    elif _can_redraw():
        count = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description}"), BarColumn(), *count, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)
    else:
        with _plain_lines(label, total, is_bytes=is_bytes) as advance:
            yield advance


def _can_redraw() -> bool:
    return console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def _plain_lines(label: str, total: int, *, is_bytes: bool) -> Iterator[Callable[[int], None]]:
    start = printed = time.monotonic()
    done = printed_tenth = 0
    ended = threading.Event()

    def print_line() -> None:
        nonlocal printed
        printed = time.monotonic()
        left = f", {(printed - start) * (total - done) / done:.0f} s left" if 0 < done < total else ""
        speed = f", {decimal(int(done / max(printed - start, 1e-3)))}/s" if is_bytes else ""
        counts = f"{decimal(done)} of {decimal(total)}" if is_bytes else f"{done} of {total}"
        info(f"{label}: {100 * done // max(total, 1)} % ({counts}{speed}{left})")

    def advance(n: int) -> None:
        nonlocal done, printed_tenth
        done += n
        tenth = 10 * done // max(total, 1)
        if tenth > printed_tenth and time.monotonic() - start > PROGRESS_DELAY_SECONDS:
            printed_tenth = tenth
            print_line()

    def print_without_progress() -> None:
        while not ended.wait(max(0.0, printed + PROGRESS_SECONDS - time.monotonic())):
            if time.monotonic() - printed >= PROGRESS_SECONDS:
                print_line()

    watcher = threading.Thread(target=print_without_progress, daemon=True)
    watcher.start()
    try:
        yield advance
    finally:
        ended.set()
        watcher.join()
