"""The options that commands share: name, help, completion."""

from pathlib import Path
from typing import Annotated

import typer

from opdctl.cli import completion


def split_names(text: str) -> list[str]:
    """Return the names in a list with commas; blanks around them do not matter."""
    return [name.strip() for name in text.split(",")]


Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        metavar="FILE_OR_NAME",
        help="Recipe: a TOML file, or a name from `opdctl list recipes`. Several merge left to right.",
        autocompletion=completion.complete_recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, such as train.steps=10.",
        autocompletion=completion.complete_settings,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="RUN_DIR",
        help="Run directory. Default: runs/<name>.",
        autocompletion=completion.complete_runs,
    ),
]
RunDir = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="A run directory.", autocompletion=completion.complete_runs)
]
NewestRunDir = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN_DIR]",
        help="A run directory. Default: the run under runs/ that was changed last.",
        autocompletion=completion.complete_runs,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[
    bool | None,
    typer.Option(
        "--verbose/--quiet", "-v/-q", help="More messages, and tracebacks of internal errors; or errors only."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME[:KEY=VALUE…],…",
        help="Token weights to show besides the recipe's, such as iw_opd:gamma=1,linear_decay; `all` for every one.",
    ),
]
