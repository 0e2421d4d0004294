"""Console output: verbosity, control characters, tables and progress."""

import contextlib
import io
import re
import subprocess
import sys
import time

import pytest
from helpers.terminal import run_at_terminal
from rich.console import Console
from rich.text import Text

from opdctl import console


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The text that is printed; it is no terminal."""
    stream = io.StringIO()
    for name in ("console", "_stdout"):
        monkeypatch.setattr(console, name, Console(file=stream, highlight=False, markup=False, soft_wrap=True))
    return stream


def test_settings_end_with_their_command(capsys):
    with contextlib.suppress(ZeroDivisionError), console.settings(-1, "rank 1: ", is_stdout_json=True):
        console.answer("hidden")
        raise ZeroDivisionError
    with console.settings(0, is_stdout_json=True):
        console.answer("on stderr")
    console.answer("on stdout")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("on stdout\n", "on stderr\n")


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
    lines = output.getvalue().splitlines()
    assert lines[:-1] == [f"scoring: {10 * n} % ({2 * n} of 20, 0 s left)" for n in range(1, 10)]
    assert lines[-1] == "scoring: 100 % (20 of 20)"


def test_progress_prints_a_line_from_time_to_time_without_progress(output, monkeypatch):
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0.05)
    with console.progress("scoring", 20) as advance:
        while output.getvalue().count("\n") < 2:
            time.sleep(0.01)
        advance(1)
    assert output.getvalue().splitlines()[:2] == ["scoring: 0 % (0 of 20)"] * 2


@pytest.mark.parametrize("reserved", [False, True])
def test_answers_are_on_stdout_unless_it_gets_json(capsys, monkeypatch, reserved):
    monkeypatch.setattr(console, "_is_stdout_json", reserved)
    console.answer("a line")
    console.print_fields("fields", [("a", "b")])
    console.print_table("table", ("a",), [["b"]])
    console.print_renderable(Text("styled"))
    console.info("a note")
    captured = capsys.readouterr()
    answers, other = (captured.err, captured.out) if reserved else (captured.out, captured.err)
    assert all(word in answers for word in ("a line", "fields", "table", "styled"))
    assert ("a note" in answers) == reserved
    assert other == ("" if reserved else "a note\n")


def test_dumb_terminal_gets_lines():
    output = run_at_terminal("-c", live_table_program("lambda: exit('a row was made')"), term="dumb")
    assert output.splitlines() == [f"step {n}" for n in range(1, 21)]


def test_message_that_is_printed_once(output: io.StringIO) -> None:
    for _ in range(2):
        for text in ("one", "other"):
            console.warn_once(text)
            console.info_once(text)
    assert output.getvalue().splitlines() == ["warning: one", "one", "warning: other", "other"]
