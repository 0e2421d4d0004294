"""Engines: what a stage asks of the thing that runs a model. They speak token ids only. Imports no torch.

Weights reach an engine as a finished model directory. An engine says, in `logprob_metadata`, what its log-probs are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opdctl.artifacts.records import Ids, Logprobs, TokenScores
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Model, Recipe, Sampling, Score


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
class ScoreRequest:
    """A response to be scored, after its prompt; `top_ids` [T, K] are further ids to be scored at each token."""

    prompt_ids: Ids
    response_ids: Ids
    top_ids: Ids | None = None


class Engine(Protocol):
    """Generates and scores with one model."""

    logprob_metadata: dict[str, str]

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

    def score(
        self, answered: Sequence[ScoreRequest], settings: Score, advance: Callable[[int], None]
    ) -> list[TokenScores]:
        """Return what the model says of every response's tokens, raw, at temperature 1, in nats."""
        ...

    def load_weights(self, model: ModelDir) -> None:
        """Take over another directory's weights."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True)
class EngineContext:
    """What an engine is made with: the recipe, with its `vllm` and `server` sections; the model's own settings in it;
    the device."""

    recipe: Recipe
    settings: Model
    device: str
