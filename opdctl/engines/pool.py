"""Engines that stay loaded between steps."""

import contextlib
from collections.abc import Iterator

from opdctl.engines.base import Engine, EngineContext
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe
from opdctl.registry import ENGINES


class EnginePool:
    """One engine per role, created at its first use and kept loaded from step to step."""

    def __init__(self, recipe: Recipe, device: str):
        self.device = device
        self._recipe = recipe
        self._engines: dict[tuple[str, str], tuple[Engine, ModelDir]] = {}

    def get(self, role: str, engine: str, model: ModelDir) -> Engine:
        """Return the engine of `role` with the weights of `model`."""
        key = (role, engine)
        if key not in self._engines:
            settings = self._recipe.models().get(role, self._recipe.student)
            context = EngineContext(self._recipe, settings, self.device)
            self._engines[key] = ENGINES.get(engine)(model, context), model
        loaded_engine, loaded_model = self._engines[key]
        if loaded_model.path != model.path:
            loaded_engine.load_weights(model)
            self._engines[key] = loaded_engine, model
        return loaded_engine

    def close(self) -> None:
        for engine, _ in self._engines.values():
            engine.close()
        self._engines.clear()


@contextlib.contextmanager
def open_engine_pool(recipe: Recipe, device: str) -> Iterator[EnginePool]:
    pool = EnginePool(recipe, device)
    try:
        yield pool
    finally:
        pool.close()
