"""`opdctl list`: the components, benchmarks, engines, recipes and runs that a command can name."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from opdctl import console
from opdctl.cli.options import Json, Overrides, Recipes, RunOption, Verbose
from opdctl.cli.session import command_session, print_json, read_recipe_options


class Kind(StrEnum):
    """What to list."""

    weights = "weights"
    objectives = "objectives"
    benchmarks = "benchmarks"
    engines = "engines"
    recipes = "recipes"
    runs = "runs"


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """List what a command or a recipe can name. --recipe and --set add the components of their plugins.

    \b
    opdctl list weights
    opdctl list objectives --set plugins='["mine"]'
    opdctl list recipes
    """
    with command_session(verbose, as_json=json_):
        from opdctl.recipe.load import default_eval_recipe

        if recipe or run:
            read_recipe_options(recipe, set_, run, "read")
        elif set_:
            default_eval_recipe("toy:student", set_)  # any recipe: only its plugins matter
        rows = LISTS[kind]()
        if json_:
            print_json({kind.value: rows})


def _list_components(kind: Kind) -> list[dict[str, Any]]:
    from opdctl.registry import OBJECTIVES, WEIGHTS

    entries = (WEIGHTS if kind is Kind.weights else OBJECTIVES).entries()
    console.print_components(kind.value, entries)
    return [asdict(entry) for entry in entries]


def _list_benchmarks() -> list[dict[str, Any]]:
    from opdctl.registry import BENCHMARKS

    benchmarks = [BENCHMARKS.get(name)() for name in BENCHMARKS.names()]
    rows = [
        {"bench": each.name, "data": each.source.location, "grader": each.grader.name, "samples": each.samples}
        for each in benchmarks
    ]
    _print("benchmarks", rows)
    console.answer("or a file of problems: --bench mine.jsonl (.parquet, .csv), or a hub data set: hub:ORG/NAME:SUBSET")
    return rows


def _list_engines() -> list[dict[str, Any]]:
    from opdctl.environment import has_vllm
    from opdctl.registry import ENGINES

    installed = {"vllm": has_vllm()}
    rows = [
        {"engine": entry.name, "available": installed.get(entry.name, True), "description": entry.summary}
        for entry in ENGINES.entries()
    ]
    _print("engines", rows)
    return rows


def _list_recipes() -> list[dict[str, Any]]:
    from opdctl.recipe.library import describe_recipe, recipe_names

    rows = []
    for name in recipe_names():
        description, kind = describe_recipe(name)
        rows.append({"recipe": name, "kind": kind, "description": description})
    _print("recipes", rows)
    console.answer("an overlay goes after a complete recipe: --recipe quickstart --recipe variants/perm")
    return rows


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Print the runs in a folder, and return them as JSON values."""
    from opdctl.pipeline.overview import summarize_runs

    found = list(summarize_runs(folder))
    _print(f"runs under {folder}/", [each.as_row() for each in found])
    return [each.as_dict() for each in found]


def _print(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        cells = [[str(value) for value in row.values()] for row in rows]
        console.print_table(title, tuple(rows[0]), cells, left=len(rows[0]))
    else:
        console.answer(f"no {title}")


LISTS: dict[Kind, Callable[[], list[dict[str, Any]]]] = {
    Kind.weights: lambda: _list_components(Kind.weights),
    Kind.objectives: lambda: _list_components(Kind.objectives),
    Kind.benchmarks: _list_benchmarks,
    Kind.engines: _list_engines,
    Kind.recipes: _list_recipes,
    Kind.runs: lambda: list_runs(Path("runs")),
}
