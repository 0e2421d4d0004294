"""Models and requests for tests of engines."""

from typing import Any

import numpy as np

from opdctl.artifacts.records import Completion, sample_seed
from opdctl.engines.base import Engine, Request
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import Model, Sampling


def directory(name: str) -> ModelDir:
    return ModelDir(find_or_download(Model(model=name), "model"), "float32")


def requests(count: int, cut: int = 0) -> list[Request]:
    """Prompts of 13 tokens; with `cut`, of 13 down to 13 - cut tokens, so that most need padding."""
    rng = np.random.default_rng(7)
    prompts = [rng.choice(np.arange(2, 28), 13, replace=False).astype(np.int32) for _ in range(count)]
    return [Request(p[: 13 - i % (cut + 1)], sample_seed(0, f"sample {i}")) for i, p in enumerate(prompts)]


def generate(engine: Engine, wanted: list[Request], batch_size: int = 64, **sampling: Any) -> list[Completion]:
    return engine.generate(wanted, Sampling(**({"max_tokens": 40} | sampling)), batch_size, lambda n: None)
