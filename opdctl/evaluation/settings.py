"""Which runs are the seeds of one setting, and what a setting is called: by the recipe keys that differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdctl.recipe.dependencies import is_mutable
from opdctl.recipe.schema import Recipe

PAIR_PREFIXES = ("student.", "teacher.", "teachers.")


@dataclass(frozen=True)
class Setting:
    """What the seeds of an experiment have in common.

    pair: how its models differ from those of other settings, such as "student=Qwen/Qwen3-4B". method: how the remaining
    keys differ, such as "iw_opd gamma=0.5". Each is empty if it is the same in all settings, but not both.
    """

    pair: str
    method: str

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.pair, self.method)))


def find_settings(recipes: Sequence[Recipe]) -> list[Setting]:
    """Return the setting of each recipe. Recipes that differ only in seed, name and mutable keys have the same."""
    values = [_compared_values(recipe) for recipe in recipes]
    pairs, methods = (
        _describe_differences(
            [{key: each[key] for key in each if key.startswith(PAIR_PREFIXES) == is_pair} for each in values]
        )
        for is_pair in (True, False)
    )
    name = recipes[0].name.removesuffix(f"-seed-{recipes[0].seed}")  # derived names end with the seed
    return [
        Setting(pair, method) if pair or method else Setting("", name)
        for pair, method in zip(pairs, methods, strict=True)
    ]


def _compared_values(recipe: Recipe) -> dict[str, Any]:
    values = {key: value for key, value in recipe.flat().items() if key != "seed" and not is_mutable(key)}
    if recipe.reference and recipe.reference.model == recipe.student.model:
        values["reference.model"] = "student"  # a property of the method, whichever student it is
    return values


def _describe_differences(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the values of the keys that differ, of each recipe; empty texts if all are equal."""
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if _differs(recipes, key)]
    return [
        " ".join(_format_value(key, recipe[key]) for key in keys if _is_distinguishing(recipes, recipe, key))
        or ("without" if keys else "")
        for recipe in recipes
    ]


def _differs(recipes: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({repr(recipe.get(key)) for recipe in recipes}) > 1


def _is_distinguishing(recipes: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], key: str) -> bool:
    """Whether a key belongs in the label. A key of a component or model does only if it differs within these."""
    section = key.rpartition(".")[0]
    name = f"{section}.model" if f"{section}.model" in recipe else f"{section}.name"
    same_component = [each for each in recipes if each.get(name) == recipe.get(name)] if key != name else recipes
    return recipe.get(key) is not None and _differs(same_component, key)


def _format_value(key: str, value: Any) -> str:
    section, _, name = key.rpartition(".")
    return str(value) if name == "name" else f"{section if name == 'model' else name}={value}"
