"""The token weight and the objective of a recipe, and the settings that store what they read."""

from collections.abc import Mapping

from opdctl.losses.objectives import Objective
from opdctl.losses.token_weights import Weight, build_weight, merge_requirements
from opdctl.recipe.schema import Recipe
from opdctl.registry import OBJECTIVES, WEIGHTS


def build_token_weight(recipe: Recipe) -> Weight:
    """Build the recipe's token weight."""
    weight = recipe.weight
    return build_weight(weight.name, weight.params, (weight.times.name, weight.times.params) if weight.times else None)


def has_known_weight(recipe: Recipe) -> bool:
    """Whether the token weight is registered. Commands that only read a run do not import its plugins."""
    names = [recipe.weight.name, *([recipe.weight.times.name] if recipe.weight.times else [])]
    return {*names} <= {*WEIGHTS.names()}


def has_known_components(recipe: Recipe) -> bool:
    """Whether the token weight and the objective are registered."""
    return has_known_weight(recipe) and recipe.objective.name in OBJECTIVES.names()


def reads_trainer_logprobs(recipe: Recipe) -> bool:
    """Whether an update first computes the trainer's log-probs of all responses, because the weight reads them."""
    return recipe.weight.logprobs == "trainer" and build_token_weight(recipe).reads_student_logprobs


def build_objective(recipe: Recipe) -> Objective:
    """Build the recipe's objective."""
    return OBJECTIVES.build(recipe.objective.name, recipe.objective.params)


def required_columns(recipe: Recipe) -> dict[str, int | bool]:
    """Return the settings that store the columns which weight, objective and trainer read, with the required values."""
    trainer = {"rollout.routed_experts": True} if recipe.train.router_replay else {}
    return merge_requirements(build_token_weight(recipe).needs, build_objective(recipe).needs, trainer)


def unmet_requirements(recipe: Recipe, requirements: Mapping[str, int | bool]) -> dict[str, int | bool]:
    """Return the requirements that the recipe does not meet."""
    flat = recipe.flat()
    return {key: value for key, value in requirements.items() if flat[key] < value}
