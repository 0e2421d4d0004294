"""The interface between the stages and the backends that run a model: token ids in, token ids and log-probs out.

An engine loads its weights from a finished model directory. Its `logprob_metadata` states how its log-probs were
computed; the stage stores it beside them. Imports no torch.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from opdctl.artifacts.records import Completion, Ids, TokenScores
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Model, Recipe, RolloutColumns, Sampling, Score

Handover = dict[str, Any]
"""What an engine passes on to a new process that takes its place: it means nothing to the process that starts both."""
_Result = TypeVar("_Result")
SCORED_AT_ONCE = 64
"""Sequences that an engine scores at a time: the next ones are ready when one is finished."""
RESUME_HINT = "run the same command again to resume; finished parts are kept"


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete. The seed alone determines the sampled response.

    max_tokens: of the response, if fewer than those of the sampling settings. stop: strings that end it, in addition.
    """

    prompt_ids: Ids
    seed: int
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def limit(self, sampling: Sampling) -> int:
        """Return the maximum length of the response."""
        return sampling.max_tokens if self.max_tokens is None else min(self.max_tokens, sampling.max_tokens)

    def stops(self, sampling: Sampling) -> list[str]:
        """Return the strings that end the response."""
        return [*sampling.stop, *self.stop]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A prompt and the response to score. `top_ids`, [T, K], are additional ids to score at each token."""

    prompt_ids: Ids
    response_ids: Ids
    top_ids: Ids | None = None


class Engine(Protocol):
    """Generates and scores with one model."""

    batches_across_parts: bool
    """Whether requests of several parts may be in work together. If not, the bits of a part depend on it alone."""
    num_passes: int
    """Forward passes that it has finished."""

    @property
    def logprob_metadata(self) -> dict[str, str]:
        """How the log-probs are computed. `weights`: the digest of the weights in memory, if the engine knows it."""
        ...

    def stream_completions(
        self,
        requests: Iterable[Request | None],
        sampling: Sampling,
        batch_size: int,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> Generator[tuple[int, Completion]]:
        """Complete every request; yield its number and its completion as soon as it is finished, in any order.

        At most `batch_size` are in work at a time. A request is taken when there is room for it. None among them, which
        has no number, is "no request at the moment": an engine that batches across parts continues with those in work.
        """
        ...

    def stream_scores(self, requests: Iterable[ScoreRequest], settings: Score) -> Generator[tuple[int, TokenScores]]:
        """Compute the raw log-probs of every response's tokens, in nats, at temperature 1; yield them in any order."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        batch_size: int,
        on_progress: Callable[[int], None],
        *,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> list[Completion]:
        """Return the completions of all requests, in order. `on_progress(1)` is called when one is finished."""
        ...

    def score(
        self, requests: Sequence[ScoreRequest], settings: Score, on_progress: Callable[[int], None]
    ) -> list[TokenScores]:
        """Return the scores of all requests, in order. `on_progress(1)` is called when one is finished."""
        ...

    def load_weights(self, model: ModelDir) -> Handover | None:
        """Replace the weights by those of another directory.

        An engine that needs a new process for them returns what that process receives, by `take_over`.
        """
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """Return the settings by their names in vLLM's requests, without those that end a response."""
    return {name: getattr(sampling, name) for name in Sampling.model_fields if not name.startswith("stop")}


class InOrder:
    """The base class of all engines: `generate` and `score` from the streams."""

    num_passes = 0

    def generate(
        self: Engine,
        requests: Sequence[Request],
        sampling: Sampling,
        batch_size: int,
        on_progress: Callable[[int], None],
        *,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> list[Completion]:
        return _in_order(self.stream_completions(requests, sampling, batch_size, columns), on_progress)

    def score(
        self: Engine, requests: Sequence[ScoreRequest], settings: Score, on_progress: Callable[[int], None]
    ) -> list[TokenScores]:
        return _in_order(self.stream_scores(requests, settings), on_progress)


def _in_order(results: Generator[tuple[int, _Result]], on_progress: Callable[[int], None]) -> list[_Result]:
    by_number: dict[int, _Result] = {}
    with contextlib.closing(results):
        for number, result in results:
            by_number[number] = result
            on_progress(1)
    return [by_number[number] for number in range(len(by_number))]


@dataclass(frozen=True)
class EngineContext:
    """What an engine factory receives besides the model: the recipe, the model's settings in it, and the device.

    gpus: the GPUs of the engine, as in CUDA_VISIBLE_DEVICES; on a CPU none.
    """

    recipe: Recipe
    settings: Model
    device: str
    gpus: tuple[str, ...] = ()
