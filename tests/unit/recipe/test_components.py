"""The columns that the weight and the objective of a recipe need are stored."""

from pathlib import Path

from opdctl.recipe.load import load_recipe


def test_required_columns_are_stored(smallest: Path) -> None:
    recipe = load_recipe([smallest], ["weight.name=tip", "objective.name=jsd", "objective.top_k=20", "score.top_k=3"])
    assert (recipe.rollout.entropy, recipe.rollout.top_k) == (True, 16)  # tip
    assert (recipe.score.student_top_k, recipe.score.top_k) == (True, 20)  # tip; jsd overrides the recipe's 3
    assert recipe.score.hidden_states is False
    explicit = load_recipe([smallest], ["weight.name=tip", "rollout.top_k=32"])
    assert explicit.rollout.top_k == 32
    product = load_recipe(
        [smallest], ["weight.times.name=prune", "objective.name=reverse_kl", "objective.support=full"]
    )
    assert (product.rollout.top_k, product.score.top_k, product.score.hidden_states) == (16, 16, True)
