"""TODO."""

from collections.abc import Mapping

from opdctl.losses.objectives import Objective as TokenObjective
from opdctl.losses.token_weights import Weight as TokenWeight
from opdctl.losses.token_weights import build as build_weight
from opdctl.losses.token_weights import merge_requirements
from opdctl.recipe.schema import Recipe
from opdctl.registry import OBJECTIVES


def build_token_weight(recipe: Recipe) -> TokenWeight:
    """Build the recipe's token weight."""
    given = recipe.weight
    return build_weight(given.name, given.params, (given.times.name, given.times.params) if given.times else None)


def build_objective(recipe: Recipe) -> TokenObjective:
    """Build the recipe's objective."""
    return OBJECTIVES.build(recipe.objective.name, recipe.objective.params)


def required_columns(recipe: Recipe) -> dict[str, int | bool]:
    """Return the settings of rollout and score that have stored what the recipe's weight and objective ask for."""
    return merge_requirements(build_token_weight(recipe).needs, build_objective(recipe).needs)


def unmet_requirements(recipe: Recipe, needs: Mapping[str, int | bool]) -> dict[str, int | bool]:
    """Return those of `needs` that the recipe does not meet."""
    flat = recipe.flat()
    return {key: value for key, value in needs.items() if flat[key] < value}
