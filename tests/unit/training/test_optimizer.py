"""AdamW and the learning-rate schedule."""

import math

import pytest
import torch
from helpers.commands import small_recipe

from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.schema import Train
from opdctl.training import optimizer
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
    adamw = make_adamw(linear_and_norm(), Train(steps=1, weight_decay=0.5, betas=[0.8, 0.9]))
    groups = {group["weight_decay"]: [tuple(p.shape) for p in group["params"]] for group in adamw.param_groups}
    assert groups == {0.5: [(2, 3)], 0.0: [(2,), (2,), (2,)]}
    assert adamw.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("decay_vectors", "gain"), [(False, 1.0), (True, 1 - 0.1 * 0.5)])
def test_weight_decay_of_vectors(decay_vectors, gain):
    """Without a gradient a step multiplies what decays by 1 - learning rate · weight decay."""
    model = linear_and_norm()
    matrix = model[0].weight.detach().clone()
    settings = Train(steps=1, learning_rate=0.1, weight_decay=0.5, decay_vectors=decay_vectors)
    adamw = make_adamw(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw.step()
    torch.testing.assert_close(model[1].weight.detach(), torch.full((2,), gain))
    torch.testing.assert_close(model[0].weight.detach(), matrix * 0.95)


# ── bfloat16 weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [1.0, -1.0, 3.0e-5, -700.0])
def test_stochastic_rounding_by_hand(value):
    """A quarter of the way to the next bfloat16 number, away from zero: with probability 1/4, so right on average."""
    low = torch.tensor(value).bfloat16()
    high = (low.view(torch.int16) + 1).view(torch.bfloat16)
    between = low.float() + 0.25 * (high.float() - low.float())
    rounded = optimizer.round_stochastically(between.expand(2**16), torch.arange(2**16))
    assert (rounded == high).sum() == 2**14
    assert (rounded == low).sum() == 3 * 2**14
    exact = optimizer.round_stochastically(low.float().expand(3), torch.tensor([0, 1, 65_535]))
    assert (exact == low).all()


def test_random_bits_are_uniform_and_differ():
    """Of elements, of parameters and of steps. The standard error of a mean of 2¹⁸ uniform numbers is 0.0006."""
    elements = torch.arange(2**18)
    seeds = [torch.tensor(step * 2**32 + index) for step, index in ((1, 1), (1, 2), (2, 1))]
    drawn = [(optimizer._random_bits(elements, seed) >> shift) & 0xFFFF for seed in seeds for shift in (0, 16, 32)]
    for number, bits in enumerate(drawn):
        uniform = bits.double() / 2**16
        assert float(uniform.mean()) == pytest.approx(0.5, abs=0.003)
        assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.003)
        for other in drawn[:number]:
            assert abs(float(torch.corrcoef(torch.stack([bits, other]).double())[0, 1])) < 0.01


def updates(master_dtype, steps=300, learning_rate=1e-5):
    """Return the mean change of weights near 1 by a constant gradient, and the weights."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.uniform_(model.weight, 0.6, 0.9)
    if master_dtype != "float32":
        model.bfloat16()
    before = model.weight.detach().float().clone()
    settings = Train(steps=1, learning_rate=learning_rate, weight_decay=0, master_dtype=master_dtype)
    adamw = make_adamw(model, settings)
    for _ in range(steps):
        model.weight.grad = torch.full_like(model.weight, 0.5)
        adamw.step()
    return float((model.weight.detach().float() - before).mean()), model.weight.detach()


def test_small_updates_are_right_on_average():
    """300 updates of 1e-5 each, where bfloat16 numbers are 2⁻⁸ apart: to nearest, all are lost."""
    assert updates("float32")[0] == pytest.approx(-300e-5, rel=5e-3)
    change, weight = updates("bfloat16")
    assert weight.dtype == torch.bfloat16
    assert change == pytest.approx(-300e-5, rel=0.05)
    assert torch.equal(updates("bfloat16")[1], weight)


def test_a_step_is_that_of_torch_before_rounding():
    torch.manual_seed(0)
    weight, gradients = torch.randn(50, 3), torch.randn(4, 50, 3)
    expected = torch.nn.Parameter(weight.clone())
    adamw = torch.optim.AdamW([expected], lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    values, step = (weight, torch.zeros(50, 3), torch.zeros(50, 3)), torch.tensor(0.0)
    for gradient in gradients:
        expected.grad, step = gradient, step + 1
        adamw.step()
        values = optimizer._adamw(values[0], gradient, *values[1:], step, adamw.param_groups[0])
    torch.testing.assert_close(values[0], expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("override", ["student.dtype=float32", "lora.rank=4"])
def test_bfloat16_weights_need_a_bfloat16_student_without_adapters(override):
    with pytest.raises(OpdctlError) as error:
        small_recipe("student.dtype=bfloat16", "train.master_dtype=bfloat16", override)
    assert "train.master_dtype" in error.value.message
