"""The command line: parse, call, print. Data go to stdout, everything else to stderr. Imports no torch at the top."""

import atexit
import importlib.metadata
import os
import sys
import threading
from typing import Annotated

import typer

from opdctl import console
from opdctl.cli.analyze_position import analyze_position
from opdctl.cli.compare import compare
from opdctl.cli.eval import evaluate
from opdctl.cli.list import list_
from opdctl.cli.run import run_app
from opdctl.cli.stages import rollout, score_teacher
from opdctl.cli.status import status
from opdctl.cli.train import train
from opdctl.signals import EPISODE_THREAD

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"opdctl {importlib.metadata.version('opdctl')}\n")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a teacher language model into a student on the student's own responses, stage by stage.

    \b
    opdctl train --recipe quickstart
    opdctl status runs/quickstart
    opdctl analyze-position runs/quickstart
    """


app.command()(rollout)
app.command("score-teacher")(score_teacher)
app.command()(train)
app.command("eval")(evaluate)
app.command("analyze-position")(analyze_position)
app.command()(status)
app.command()(compare)
app.command("list")(list_)
app.add_typer(run_app, name="run")


def main() -> None:
    """Run the command line."""
    if sys.getfilesystemencoding() != "utf-8":  # an ASCII locale without UTF-8 mode: names of files would be escaped
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "opdctl", *sys.argv[1:]])
    console.use_plain_characters()
    try:
        app(prog_name="opdctl")
    except SystemExit as end:
        _end_process(end)
        raise


def _end_process(end: SystemExit) -> None:
    """End the process at once if nothing needs the interpreter's own end. That frees a million objects in more than a
    second, and would wait for the threads of an episode that hangs."""
    threads = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if not any(thread.name.startswith(EPISODE_THREAD) for thread in threads):
        if not all(thread.daemon for thread in threads):
            return
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else bool(end.code))
