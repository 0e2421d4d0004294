"""What a person sees: messages and progress, on stderr. Data on stdout is the command line's business.

Nothing from a prompt, a response or a model is ever read as markup, nor as an order to the terminal.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


if not console.is_terminal:
    console.width = 1000  # a file is as wide as its tables


_level = 0
_name = ""
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)  # moves the cursor, colours, turns text round
MAX_TABLE_ROWS = 12  # of a table that grows
PROGRESS_DELAY_SECONDS = 10.0  # seconds: shorter work shows no plain progress lines


def set_level(level: int, name: str = "") -> None:
    """Set how much is said, -1 errors only, 0 the usual, 1 details; and whose errors these are, among several ranks."""
    global _level, _name
    _level, _name = level, name


def _strip_control_chars(text: str) -> str:
    return UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def info(message: str, style: str = "") -> None:
    if _level >= 0:
        console.print(Text(_strip_control_chars(message), style=style))


def debug(message: str) -> None:
    if _level >= 1:
        console.print(Text(_strip_control_chars(message), style="dim"))


def warn(message: str) -> None:
    console.print(Text.assemble(("warning: ", "yellow"), _strip_control_chars(message)))


def error(message: str, hint: str | None) -> None:
    console.print(Text.assemble(_name, ("error: ", "bold red"), _strip_control_chars(message)))
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), _strip_control_chars(hint)))


def print_renderable(text: Text) -> None:
    """Print styled text, whose parts the caller has made safe."""
    if _level >= 0:
        console.print(text)


def print_fields(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a titled list of (what, value)."""
    if _level >= 0:
        width = max(len(what) for what, _ in rows)
        console.print(Text(title, style="bold"))
        for what, value in rows:  # not a table: a path or a command must not be broken
            console.print(Text.assemble((f"{what:<{width}}  ", "cyan"), _strip_control_chars(value)))


def print_components(title: str, entries: Sequence[Any]) -> None:
    """Print registry entries: name, what it is, parameters with defaults, source."""
    if _level >= 0:
        console.print(Text(title, style="bold"))
        for entry in entries:
            parameters = ", ".join(
                f"{name} = {json.dumps(value)}" for name, value in entry.parameters.items()
            )  # as in TOML
            console.print(Text.assemble((entry.name, "cyan"), f"  {entry.summary}"))
            console.print(Text("    " + "; ".join(part for part in (parameters, entry.source) if part), style="dim"))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table, its first `left` columns to the left, the others, numbers mostly, to the right."""
    if _level >= 0:
        console.print(_grid(title, header, rows, left))


def _grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Table:
    grid = Table(title=Text(_strip_control_chars(title), style="bold"), title_justify="left")
    for number, name in enumerate(header):
        grid.add_column(name, justify="right" if number >= left else "left")
    for row in rows:
        grid.add_row(*(Text(_strip_control_chars(cell)) for cell in row))
    return grid


@contextlib.contextmanager
def live_table(title: str, header: Sequence[str]) -> Iterator[Callable[[Callable[[], Sequence[str]], str], None]]:
    """Yield a function that takes how to make a row, and the line that says the same: on a terminal the last rows are
    a table that stays in its place while messages and progress pass, elsewhere each line is said and no row made."""
    if _level < 0 or not console.is_terminal:
        yield lambda make_row, line: info(line)
        return
    rows: list[Sequence[str]] = []
    with Live(console=console, auto_refresh=False) as live:

        def add(make_row: Callable[[], Sequence[str]], line: str) -> None:
            rows.append(make_row())
            live.update(_grid(title, header, rows[-MAX_TABLE_ROWS:], left=0), refresh=True)

        yield add


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told of each `n` more done: a bar on a terminal, else a plain line every 10 %."""
    if _level < 0:
        yield lambda n: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)
    else:
        yield _plain_lines(label, total)


def _plain_lines(label: str, total: int) -> Callable[[int], None]:
    start, done, said = time.monotonic(), 0, 0

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        tenth = 10 * done // max(total, 1)
        if tenth > said and time.monotonic() - start > PROGRESS_DELAY_SECONDS:
            said = tenth
            info(f"{label}: {10 * tenth} % ({done} of {total})")

    return advance
