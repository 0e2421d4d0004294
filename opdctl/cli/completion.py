"""What the shell completes: recipes, run directories, keys and values of `--set`, benchmarks. Imports no torch.

Bash cuts a word at `=` and replaces only what stands behind it; other shells hand over the whole word.
"""

import glob
import typing
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

_cut_off = ""  # by bash, from the word in work, such as `weight.name=`


def join_bash_words(environment: MutableMapping[str, str]) -> None:
    """Take bash's cut out of the line it asks about, so that `--set weight.name=io` is an option with one value.

    COMP_WORDS `opdctl train --set weight.name = io`, a word a line, becomes `opdctl train --set io`; the values that
    are then given are those of `weight.name`.
    """
    global _cut_off
    words, at = environment.get("COMP_WORDS", "").split("\n"), int(environment.get("COMP_CWORD", "0"))
    if "=" not in words[max(at - 1, 0) : at + 1]:
        return
    key, value = (at - 1, "") if words[at] == "=" else (at - 2, words[at])
    _cut_off = f"{words[key]}="
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join([*words[:key], value]), str(key)


def recipes(incomplete: str) -> list[str]:
    """Return the TOML files that begin with `incomplete`, or lie in a folder that does."""
    return _files(incomplete, "*.toml", "*/*.toml")


def runs(incomplete: str) -> list[str]:
    """Return the run directories that begin with `incomplete`, or lie in a folder that does."""
    return [str(Path(recipe).parent) for recipe in _files(incomplete, "*/recipe.toml", "*/*/recipe.toml")]


def _files(incomplete: str, *patterns: str) -> list[str]:
    return [file for pattern in patterns for file in sorted(glob.glob(glob.escape(incomplete) + pattern))]


def benches(incomplete: str) -> list[str]:
    """Return the benchmarks that can come next in a list such as `aime25,ma`."""
    from opdctl.registry import BENCHMARKS

    before, comma, _ = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in BENCHMARKS.names() if name not in before.split(",")]


def settings(incomplete: str) -> list[str]:
    """Return keys of the recipe, and once there is no choice between keys the values that the key may have."""
    known = dict(_settings())
    key, equals, _ = (_cut_off + incomplete).partition("=")
    if equals:
        return [value if _cut_off else f"{key}={value}" for value in known.get(key, [])]
    matching = [name for name in known if name.startswith(key)]
    if len(matching) == 1:  # with its values at once: a shell would put a space behind a lone `key=`
        return [f"{matching[0]}={value}" for value in known[matching[0]] or [""]]
    return [f"{name}=" for name in matching]


def _settings() -> Iterator[tuple[str, list[str]]]:
    """Yield each key of the recipe that takes one value, with its choices, or else its default."""
    from opdctl.recipe.schema import AUTO, Recipe
    from opdctl.registry import ENGINES, OBJECTIVES, WEIGHTS

    named = {f"{section}.engine": [AUTO, *ENGINES.names()] for section in ("rollout", "score")}
    for section, registry in (("weight", WEIGHTS), ("objective", OBJECTIVES)):
        named[f"{section}.name"] = registry.names()
        for entry in registry.entries():
            named |= {f"{section}.{name}": [_toml(value)] for name, value in entry.parameters.items()}
    yield from (dict(_of_section(Recipe)) | named).items()


def _of_section(section: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    from opdctl.recipe.schema import Section

    for name, field in section.model_fields.items():
        kinds = [kind for kind in typing.get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
        if isinstance(kinds[0], type) and issubclass(kinds[0], Section):
            yield from _of_section(kinds[0], f"{prefix}{name}.")
        elif typing.get_origin(field.annotation) is typing.Literal:
            yield f"{prefix}{name}", list(kinds)
        elif kinds[0] is bool:
            yield f"{prefix}{name}", ["true", "false"]
        elif typing.get_origin(field.annotation) not in (dict, list):
            word = isinstance(field.default, int | float | str) and len(str(field.default).split()) == 1
            yield f"{prefix}{name}", [_toml(field.default)] if word else []


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
