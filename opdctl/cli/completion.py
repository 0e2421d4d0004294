"""Shell completion: recipes, run directories, keys and values of `--set`, benchmarks. Imports no torch."""

import glob
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def complete_recipes(incomplete: str) -> list[str]:
    """Return the recipes whose name begins with `incomplete`, and the TOML files whose path does."""
    from opdctl.recipe.library import recipe_names

    names = [name for name in recipe_names() if name.startswith(incomplete)]
    return [*names, *_files(incomplete, "*.toml", "*/*.toml")]


def complete_runs(incomplete: str) -> list[str]:
    """Return the run directories whose path begins with `incomplete`."""
    return [str(Path(recipe).parent) for recipe in _files(incomplete, "*/recipe.toml", "*/*/recipe.toml")]


def complete_data_files(incomplete: str) -> list[str]:
    """Return the data files, and the folders, whose path begins with `incomplete`."""
    from opdctl.recipe.data_names import is_data_file

    return [path for path in _files(incomplete, "*") if is_data_file(path) or Path(path).is_dir()]


def _files(incomplete: str, *patterns: str) -> list[str]:
    return [file for pattern in patterns for file in sorted(glob.glob(glob.escape(incomplete) + pattern))]


def complete_benchmarks(incomplete: str) -> list[str]:
    """Return the benchmarks that can complete a list such as `aime25,ma`."""
    from opdctl.registry import BENCHMARKS

    before, comma, _ = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in BENCHMARKS.names() if name not in before.split(",")]


def complete_settings(incomplete: str) -> list[str]:
    """Return the recipe keys that begin with `incomplete`, with their values as soon as only one key is left."""
    known = dict(_settings())
    key, equals, _ = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in known.get(key, [])]
    matching = [name for name in known if name.startswith(key)]
    if len(matching) == 1:  # with its values at once: a shell would put a space after a lone `key=`
        return [f"{matching[0]}={value}" for value in known[matching[0]] or [""]]
    return [f"{name}=" for name in matching]


def _settings() -> Iterator[tuple[str, list[str]]]:
    """Yield each recipe key that takes one value, with its choices, or its default."""
    from opdctl.recipe.schema import AUTO, Recipe
    from opdctl.registry import ENGINES, OBJECTIVES, WEIGHTS

    named = {f"{section}.engine": [AUTO, *ENGINES.names()] for section in ("rollout", "score")}
    for section, registry in (("weight", WEIGHTS), ("objective", OBJECTIVES)):
        named[f"{section}.name"] = registry.names()
        for entry in registry.entries():
            named |= {f"{section}.{name}": [_toml(value)] for name, value in entry.parameters.items()}
    yield from (dict(_section_settings(Recipe)) | named).items()


def _section_settings(section: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    from opdctl.recipe.section import Section

    for name, field in section.model_fields.items():
        kinds = [kind for kind in typing.get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
        if isinstance(kinds[0], type) and issubclass(kinds[0], Section):
            yield from _section_settings(kinds[0], f"{prefix}{name}.")
        elif typing.get_origin(field.annotation) is typing.Literal:
            yield f"{prefix}{name}", list(kinds)
        elif kinds[0] is bool:
            yield f"{prefix}{name}", ["true", "false"]
        elif typing.get_origin(field.annotation) not in (dict, list):
            word = isinstance(field.default, int | float | str) and len(str(field.default).split()) == 1
            yield f"{prefix}{name}", [_toml(field.default)] if word else []


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
