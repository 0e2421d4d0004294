"""Engines that stay loaded between steps, and take turns with the memory of a GPU."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

from opdctl import console, distributed
from opdctl.artifacts.stage_dir import PartMakers
from opdctl.engines.base import Engine, EngineContext
from opdctl.engines.host import HostedEngine
from opdctl.engines.parity import measure_probe
from opdctl.environment import select_engine_gpus
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.startup import measure_startup
from opdctl.recipe.schema import Recipe
from opdctl.registry import ENGINES


class EnginePool:
    """One engine per role, created at its first use and kept loaded from step to step.

    On a GPU the engine of the latest `get` has the memory; others have given theirs back, unless the shares that the
    recipe gives to each, `vllm.gpu_memory_utilization`, fit together.

    An engine that has loaded a student of a run is compared with the trainer on the student's probe.
    """

    def __init__(self, recipe: Recipe, device: str):
        self.device = device
        self._recipe = recipe
        self._engines: dict[tuple[str, str], tuple[Engine, ModelDir]] = {}
        self._probe_rms: dict[tuple[str, str], float] = {}

    @property
    def read_this_memory(self) -> bool:
        """Whether the student's engines are on this machine, where they can read memory files of this process."""
        return not self._recipe.spans_nodes(self._recipe.rollout.engine)

    def owns(self, engine: str) -> bool:
        """Whether this process has engines of that name. An engine on several GPUs belongs to one of their ranks."""
        return self._gpus(engine) is not None

    def _gpus(self, engine: str) -> tuple[str, ...] | None:
        if self.device == "cpu" or engine not in ("vllm", "transformers"):
            return ()
        if self._recipe.spans_nodes(engine):  # Ray assigns them
            return ()
        count = self._recipe.gpus_per_engine(engine)
        return select_engine_gpus(distributed.local_rank(), distributed.visible_gpus(), count)

    def get(self, role: str, engine: str, model: ModelDir) -> Engine:
        """Return the engine of `role` with the weights of `model`, in a process that owns it.

        Raises:
            OpdctlError: the log-probs of a student's probe differ from the trainer's.
        """
        with measure_startup():
            return self._get((role, engine), model)

    def _get(self, key: tuple[str, str], model: ModelDir) -> Engine:
        hosted = {key, *(other for other, (each, _) in self._engines.items() if isinstance(each, HostedEngine))}
        if not self._recipe.vllm.fit_together(len(hosted)):
            self.release(hosted - {key})
        if key not in self._engines:
            self._start(key, model)
        elif self._engines[key][1].path != model.path:
            self._load_weights(key, model)
        return self._engines[key][0]

    def probe_rms(self, role: str, engine: str) -> float | None:
        """Return by how many nats RMS an engine differed from the trainer, None if its model has no probe."""
        return self._probe_rms.get((role, engine))

    def _start(self, key: tuple[str, str], model: ModelDir) -> None:
        role, engine = key
        settings = self._recipe.models().get(role, self._recipe.student)
        gpus = self._gpus(engine)
        assert gpus is not None
        context = EngineContext(self._recipe, settings, self.device, gpus)
        self._engines[key] = ENGINES.get(engine)(model, context), model
        if difference := self._probe(key):
            raise OpdctlError(
                "logprob_mismatch",
                f"{model.path}: in a new engine `{engine}` {difference}",
                hint="set rollout.engine to another engine; raise pipeline.max_logprob_rms only if you know the cause",
            )

    def _load_weights(self, key: tuple[str, str], model: ModelDir) -> None:
        """Load other weights into a running engine, and start it anew if it does not show that it has them.

        Not having them shows in the digest if all of the weights are the old ones, however small the update was; and
        in the log-probs of the probe if a part of them is wrong by more than rounding. An update that left the probe as
        it was may have left the weights as they were.
        """
        engine, loaded = self._engines[key]
        before = engine.logprob_metadata.get("weights")
        engine.load_weights(model)
        self._engines[key] = engine, model
        keeps_weights = before is not None and engine.logprob_metadata["weights"] == before
        is_updated = model.probe is None or model.probe != loaded.probe
        if difference := "it holds the same weights as before" if keeps_weights and is_updated else self._probe(key):
            console.warn(f"{model.path}: after the engine `{key[1]}` has loaded it, {difference}; starting it anew")
            engine.close()
            self._start(key, model)

    def _probe(self, key: tuple[str, str]) -> str:
        """Compare an engine with the trainer; describe a difference that is too large, "" if there is none.

        An engine that cannot tell its weights, such as a server, is not compared: it does not load students.
        """
        engine, model = self._engines[key]
        self._probe_rms.pop(key, None)
        if model.probe is None or "weights" not in engine.logprob_metadata:
            return ""
        rms, maximum = measure_probe(engine, model.probe)
        self._probe_rms[key] = rms
        bound = max(model.logprob_tolerance, self._recipe.pipeline.max_logprob_rms)
        if rms <= bound:  # NaN is too large
            return ""
        return (
            f"the log-probs of {len(model.probe.logprobs)} fixed tokens differ from the trainer's by {rms:.3g} nats "
            f"RMS, at most {maximum:.3g}; the bound for {model.dtype} is {bound:g}"
        )

    def part_makers(
        self, section: Literal["rollout", "score"], role: str, make_parts: Callable[..., int]
    ) -> PartMakers:
        """Return which processes make the parts of a stage: here this one, if it has engines of that name.

        section: of the recipe, which names the engine. role: of the model that the parts need. make_parts: a function
        of a module, or a partial of one. Each worker of a cluster calls it with its own `run` and `engines`, and it
        returns the number of parts that it made.
        """
        return PartMakers(is_here=self.owns(getattr(self._recipe, section).engine))

    def start(self, models: Mapping[str, tuple[str, ModelDir]]) -> None:
        """Start the engines that this process owns, of (engine, model) by role, and wait until they are ready.

        They start at the same time if the memory allows.

        Raises:
            OpdctlError: one cannot start.
        """
        engines = [self.get(role, engine, model) for role, (engine, model) in models.items() if self.owns(engine)]
        for each in engines:
            each.logprob_metadata  # noqa: B018 - known when the engine is ready

    def release(self, keys: Collection[tuple[str, str]] | None = None) -> None:
        """Let engines give their GPU memory back until their next call: those of `keys`, all if None."""
        if self.device == "cpu":
            return
        for key, (engine, _) in self._engines.items():
            if isinstance(engine, HostedEngine) and (keys is None or key in keys):
                engine.release(keep_weights=key[0] != "student")

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
