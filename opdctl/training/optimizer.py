"""AdamW and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from opdctl.recipe.schema import Train

SLICE = 2**22  # elements that are updated at a time: several temporary copies of them exist


def learning_rate(settings: Train, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then a constant rate or a decay to 0.

    It depends on the step alone, so a resumed run needs no scheduler state.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.lr_scheduler_type == "constant":
        return settings.learning_rate
    assert settings.decay_steps is not None  # recipe validation requires it
    remaining = max(0.0, 1 - (step - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps))
    if settings.lr_scheduler_type == "linear":
        return settings.learning_rate * remaining
    return settings.learning_rate * ((1 - math.cos(math.pi * remaining)) / 2)


class StochasticAdamW(torch.optim.AdamW):
    """AdamW whose bfloat16 weights and moments are rounded up or down at random, so that they are right on average.

    Rounded to nearest, an update of less than half the distance to the next bfloat16 number is lost, each time (Zamirai
    et al. 2020, arXiv 2010.06192). The random bits depend on step, parameter and element alone, so any number of
    processes makes the same update, and a resumed run continues it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(parameter, index, group)

    def _update(self, parameter: Tensor, index: int, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        tensors: tuple[Any, ...] = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        local: list[Tensor] = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        first = _first_element(parameter)
        for parts in zip(*(tensor.view(-1).split(SLICE) for tensor in local), strict=True):
            elements = torch.arange(first, first + len(parts[0]), device=parts[0].device)
            bits = _random_bits(elements, state["step"].long() * 2**32 + index)
            first += len(parts[0])
            weight, gradient, mean, square = (part.float() for part in parts)
            values = _adamw(weight, gradient, mean, square, state["step"], group)
            for number, (part, value) in enumerate(zip((parts[0], *parts[2:]), values, strict=True)):
                part.copy_(round_stochastically(value, (bits >> 16 * number) & 0xFFFF))


def _adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight and moments after a step of AdamW (Loshchilov and Hutter 2019, algorithm 2), in float32."""
    beta1, beta2 = group["betas"]
    mean = mean.lerp(gradient, 1 - beta1)
    square = square.lerp(gradient.square(), 1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
    weight = weight * (1 - group["lr"] * group["weight_decay"])
    return weight - group["lr"] * (mean / (1 - beta1**step)) / denominator, mean, square


def _first_element(parameter: Tensor) -> int:
    """Return the number of a shard's first element in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets[0] * math.prod(parameter.shape[1:])


def _random_bits(elements: Tensor, seed: Tensor) -> Tensor:
    """Return 64 random bits for each element: the finalizer of SplitMix64 (Steele et al. 2014)."""
    bits = elements + seed * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * factor
    return bits ^ ((bits >> 31) & (2**33 - 1))


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Return float32 numbers in bfloat16, rounded away from zero with the probability of the 16 bits that are lost.

    bits: random integers below 2¹⁶.
    """
    return ((values.view(torch.int32) + bits.int()) & -0x10000).view(torch.float32).bfloat16()


def make_adamw(model: torch.nn.Module, settings: Train) -> torch.optim.AdamW:
    """Return AdamW for the trainable parameters. Weight decay applies to matrices, and to vectors on request."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    vector_decay = settings.weight_decay if settings.decay_vectors else 0.0
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": vector_decay},
    ]
    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": (settings.betas[0], settings.betas[1])}
    if settings.master_dtype == "bfloat16":
        return StochasticAdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)  # no temporary copies of all parameters
