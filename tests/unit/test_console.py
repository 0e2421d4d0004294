"""Console output: verbosity, control characters, tables and progress."""

import io
import re
import subprocess
import sys

import pytest
from helpers.terminal import run_at_terminal
from rich.console import Console

from opdctl import console


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The text that is printed; it is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=stream, highlight=False, markup=False, soft_wrap=True))
    return stream


def live_table_program(make_row: str) -> str:
    """Return a program that adds twenty rows to a live table."""
    rows = f"[add({make_row}, f'step {{n}}') for n in range(1, 21)]"
    return f"from opdctl import console\nwith console.live_table('a run', ('step', 'loss')) as add: {rows}"


def test_live_table_shows_the_last_rows_at_a_terminal():
    output = run_at_terminal("-c", live_table_program("lambda: [str(n), f'{n}.5']"))
    last = output.rpartition("a run")[2]
    assert re.findall(r"│ +(\d+) │", last) == [str(n) for n in range(21 - console.MAX_TABLE_ROWS, 21)]
    assert "step 20" not in output


def test_live_table_prints_lines_elsewhere_and_makes_no_rows():
    program = live_table_program("lambda: exit('a row was made')")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines() == [f"step {n}" for n in range(1, 21)]


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (-1, ["warning: w", "error: e", "hint: h"]),
        (0, ["i", "warning: w", "error: e", "hint: h"]),
        (1, ["i", "d", "warning: w", "error: e", "hint: h"]),
    ],
)
def test_verbosity(output, monkeypatch, level, lines):
    monkeypatch.setattr(console, "_level", level)
    console.info("i")
    console.debug("d")
    console.warn("w")
    console.error("e", "h")
    assert output.getvalue().splitlines() == lines


def test_control_characters_and_markup_are_not_interpreted(output):
    console.info("[red]\x1b[31mred\u202e\ttab")
    console.print_table("\x1btitle", ("a",), [["\x07"]])
    text = output.getvalue()
    assert text.startswith("[red]\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}")
    assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_progress_prints_every_tenth_after_a_delay(output, monkeypatch):
    with console.progress("scoring", 20) as advance:
        advance(5)
    assert output.getvalue() == ""
    monkeypatch.setattr(console, "PROGRESS_DELAY_SECONDS", -1.0)
    with console.progress("scoring", 20) as advance:
        for _ in range(20):
            advance(1)
    assert output.getvalue().splitlines() == [f"scoring: {10 * n} % ({2 * n} of 20)" for n in range(1, 11)]


def test_message_that_is_printed_once(output: io.StringIO) -> None:
    for _ in range(2):
        for text in ("one", "other"):
            console.warn_once(text)
            console.info_once(text)
    assert output.getvalue().splitlines() == ["warning: one", "one", "warning: other", "other"]
