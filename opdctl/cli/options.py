"""The options that commands share: name, help, completion."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from opdctl.cli import completion


def with_launcher(overrides: list[str] | None, launcher: str | None) -> list[str]:
    """Return the overrides of a recipe with that of `--launcher`, if it is given."""
    return [*(overrides or []), *([f"pipeline.launcher={launcher}"] if launcher else [])]


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
_RUN_DIR = typer.Argument(
    metavar="RUN_DIR",
    help="The run. Default: that of --run, else runs/<name> of --recipe, else the newest one under runs/.",
    autocompletion=completion.complete_runs,
)
RunDir = Annotated[Path | None, _RUN_DIR]
RunDirOrWord = Annotated[str | None, _RUN_DIR]
"""The run, before another argument that is always given: of two words the first, of one none."""
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        "--output",
        metavar="RUN_DIR",
        help="The same as RUN_DIR. With --recipe: the directory of a new run.",
        autocompletion=completion.complete_runs,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Launcher = Annotated[
    Literal["local", "ray"] | None,
    typer.Option("--launcher", help="The same as --set pipeline.launcher=…: this machine, or a Ray cluster."),
]
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
