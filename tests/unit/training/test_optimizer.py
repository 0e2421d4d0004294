"""AdamW and the learning-rate schedule."""

import math

import pytest
import torch
from helpers.commands import small_recipe

from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.schema import Train
from opdctl.training.optimizer import learning_rate, make_adamw


def test_learning_rate_schedules():
    def rates(schedule, **settings):
        train = Train(steps=9, learning_rate=8.0, lr_scheduler_type=schedule, **settings)
        return [learning_rate(train, step) for step in range(8)]

    assert rates("constant", warmup_steps=4) == [2, 4, 6, 8, 8, 8, 8, 8]
    assert rates("linear", warmup_steps=2, decay_steps=6) == [4, 8, 8, 6, 4, 2, 0, 0]
    cosine = [8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert rates("cosine", warmup_steps=2, decay_steps=6) == pytest.approx([4, 8, *cosine, 0])


def test_decay_without_decay_steps_is_refused():
    with pytest.raises(OpdctlError) as error:
        small_recipe("train.lr_scheduler_type=cosine")
    assert (error.value.kind, error.value.code) == ("invalid_recipe", ExitCode.USAGE)
    assert "train.decay_steps" in error.value.message


def linear_and_norm():
    """Return a trainable matrix and three trainable vectors, and a frozen layer."""
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)])
    model[2].requires_grad_(False)
    return model


def test_weight_decay_applies_to_trainable_matrices_only():
    optimizer = make_adamw(linear_and_norm(), Train(steps=1, weight_decay=0.5, betas=[0.8, 0.9]))
    groups = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups}
    assert groups == {0.5: [(2, 3)], 0.0: [(2,), (2,), (2,)]}
    assert optimizer.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("decay_vectors", "gain"), [(False, 1.0), (True, 1 - 0.1 * 0.5)])
def test_weight_decay_of_vectors(decay_vectors, gain):
    """Without a gradient a step multiplies what decays by 1 - learning rate · weight decay."""
    model = linear_and_norm()
    matrix = model[0].weight.detach().clone()
    settings = Train(steps=1, learning_rate=0.1, weight_decay=0.5, decay_vectors=decay_vectors)
    optimizer = make_adamw(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), torch.full((2,), gain))
    torch.testing.assert_close(model[0].weight.detach(), matrix * 0.95)
