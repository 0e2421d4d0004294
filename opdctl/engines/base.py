"""The interface between the stages and the backends that run a model: token ids in, token ids and log-probs out.

An engine loads its weights from a finished model directory. Its `logprob_metadata` states how its log-probs were
computed; the stage stores it beside them. Imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opdctl.artifacts.records import Completion, Ids, TokenScores
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Model, Recipe, RolloutColumns, Sampling, Score


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete. The seed alone determines the sampled response."""

    prompt_ids: Ids
    seed: int


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A prompt and the response to score. `top_ids`, [T, K], are additional ids to score at each token."""

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
        on_progress: Callable[[int], None],
        *,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> list[Completion]:
        """Complete every request, in order. `on_progress(n)` is called when n more requests are finished."""
        ...

    def score(
        self, requests: Sequence[ScoreRequest], settings: Score, on_progress: Callable[[int], None]
    ) -> list[TokenScores]:
        """Return the raw log-probs of every response's tokens, in nats, at temperature 1, in order."""
        ...

    def load_weights(self, model: ModelDir) -> None:
        """Replace the weights by those of another directory."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


@dataclass(frozen=True)
class EngineContext:
    """What an engine factory receives besides the model: the recipe, the model's settings in it, and the device."""

    recipe: Recipe
    settings: Model
    device: str
