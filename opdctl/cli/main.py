"""The command line: parse, call, print. Data go to stdout, everything else to stderr. Imports no torch up here."""

import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from opdctl.cli import analyze, completion, evaluate, runs, stages, train

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"opdctl {importlib.metadata.version('opdctl')}\n")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a teacher language model into a student on the student's own responses, stage by stage.

    \b
    opdctl train --recipe recipes/quickstart.toml
    opdctl status runs/quickstart
    opdctl analyze-position runs/quickstart
    """


app.command()(stages.rollout)
app.command("score-teacher")(stages.score_teacher)
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command("analyze-position")(analyze.analyze_position)
app.command()(runs.change)
app.command()(runs.status)


def main() -> None:
    """Run the command line."""
    completion.join_bash_words(os.environ)
    app(prog_name="opdctl")
