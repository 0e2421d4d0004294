"""TODO."""

import contextlib
from collections.abc import Iterator

from opdctl.engines.base import Engine, EngineContext
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe
from opdctl.registry import ENGINES


class EnginePool:
    """Engines that stay loaded from step to step: one a role. An engine is made when it is first asked for."""

    def __init__(self, recipe: Recipe, device: str):
        self._recipe, self._device = recipe, device
        self._engines: dict[tuple[str, str], tuple[Engine, ModelDir]] = {}

    def get(self, role: str, engine: str, model: ModelDir) -> Engine:
        """Return the engine of `role` with the weights of `model`."""
        key = (role, engine)
        if key not in self._engines:
            settings = self._recipe.models().get(role, self._recipe.student)
            self._engines[key] = (
                ENGINES.get(engine)(model, EngineContext(self._recipe, settings, self._device)),
                model,
            )
        held, loaded = self._engines[key]
        if loaded.path != model.path:
            held.load_weights(model)
            self._engines[key] = (held, model)
        return held

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
