"""AdamW and the learning-rate schedule."""

import math

import torch

from opdctl.recipe.schema import Train


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


def make_adamw(model: torch.nn.Module, settings: Train) -> torch.optim.AdamW:
    """Return AdamW for the trainable parameters. Weight decay applies to matrices, and to vectors on request."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    vector_decay = settings.weight_decay if settings.decay_vectors else 0.0
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": vector_decay},
        ],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,  # no temporary copies of all parameters
    )
