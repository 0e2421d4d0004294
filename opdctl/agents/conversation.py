"""The calls of one episode as trajectories of token ids. Knows no HTTP and no engine.

A call that begins with the text of an earlier call extends it: its prompt is the earlier prompt, the ids that were
sampled, and the ids of the new text. So no text that the student sampled is tokenized again, and each id of a
trajectory is one that the engine read or sampled. A call that begins otherwise starts another trajectory, as with chat
templates that drop earlier thinking, or with a second agent.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from opdctl.artifacts.records import Completion, Ids, LossMask
from opdctl.data.special_tokens import MarkedText

COMPLETION_COLUMNS = tuple(
    each.name for each in fields(Completion) if each.name not in ("response_ids", "finish_reason", "routed_experts")
)
"""The columns of a completion with a row for each token, besides the ids."""


class ContextLengthError(Exception):
    """No room is left for a response."""


class Codec(Protocol):
    """The tokenizer of the student, for the texts of a conversation."""

    def encode(self, text: MarkedText, *, is_continuation: bool) -> Sequence[int]:
        """Return the ids of the text of a prompt, or of text that other tokens precede."""
        ...

    def decode(self, prompt_ids: Ids, response_ids: Ids) -> str:
        """Return the text of a response after its prompt, special tokens included."""
        ...


@dataclass(eq=False)
class Call:
    """One call of the student.

    prompt_text: None if the prompt was given as ids. previous: the call of the same trajectory that it extends.
    max_tokens: of the response. received, finished: times in seconds. is_extended: whether another call continues its
    trajectory. is_last_refused: whether there was no room for one.
    """

    number: int
    prompt_ids: Ids
    prompt_text: str | None
    previous: "Call | None"
    max_tokens: int
    received: float
    completion: Completion | None = None
    text: str | None = None
    finished: float = 0.0
    is_extended: bool = False
    is_last_refused: bool = False

    def ids(self) -> Ids:
        """Return the ids of prompt and response."""
        assert self.completion is not None
        return np.concatenate([self.prompt_ids, self.completion.response_ids])

    def trajectory(self) -> "list[Call]":
        """Return the calls of its trajectory up to this one."""
        return [*(self.previous.trajectory() if self.previous else []), self]


@dataclass(frozen=True)
class SampledTrajectory:
    """A trajectory of an episode.

    completion: of all tokens after the first prompt; its columns are 0 at those that were not sampled. loss_mask:
    whether each token was sampled, [T]. turns: the calls. tool_seconds: the time between them, and after the last one
    if no other call of the episode came later. last_call: the number of the call that ends it.
    """

    prompt_ids: Ids
    completion: Completion
    loss_mask: LossMask
    turns: int
    tool_seconds: float
    last_call: int


class Conversation:
    """The calls of one episode.

    max_response: all tokens of a trajectory after its first prompt. max_total: with that prompt.
    """

    def __init__(
        self, codec: Codec, max_response: int, max_total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._codec, self._max_response, self._max_total, self._clock = codec, max_response, max_total, clock
        self._calls: list[Call] = []
        self.is_exhausted = False  # whether a call had no room for a response

    def begin(self, prompt: MarkedText | Ids, max_tokens: int | None = None) -> Call:
        """Return a call with the ids of its prompt: a text, or ids.

        Raises:
            ContextLengthError: no room is left for a response.
        """
        received = self._clock()
        earlier = self._find_earlier(prompt)
        if isinstance(prompt, MarkedText):
            text, known = prompt.plain, _text_of(earlier) if earlier else ""
            start = earlier.ids() if earlier else np.zeros(0, np.int32)
            added = self._codec.encode(prompt.after(len(known)), is_continuation=earlier is not None)
            ids = np.concatenate([start, np.asarray(added, np.int32)])
        else:
            text, ids = None, prompt
        previous = earlier if earlier and not earlier.is_extended else None
        room = self._room(ids, previous)
        if room <= 0:
            self.is_exhausted = True
            if previous:
                previous.is_last_refused = True
            raise ContextLengthError(f"the prompt has {len(ids)} tokens, and no room is left for a response")
        if previous:
            previous.is_extended = True
        call = Call(len(self._calls), ids, text, previous, min(room, max_tokens or room), received)
        self._calls.append(call)
        return call

    def _find_earlier(self, prompt: MarkedText | Ids) -> Call | None:
        """Return the longest earlier call with which a prompt begins, of equal ones one that can be extended."""
        done = [call for call in self._calls if call.completion is not None]
        if isinstance(prompt, MarkedText):
            text = prompt.plain
            begun = [call for call in done if call.prompt_text is not None and text.startswith(_text_of(call))]
        else:
            begun = [call for call in done if np.array_equal(call.ids(), prompt[: len(call.ids())])]
        return max(begun, key=lambda call: (len(call.ids()), not call.is_extended), default=None)

    def _room(self, ids: Ids, previous: Call | None) -> int:
        """Return how many tokens a response may have."""
        first_prompt = previous.trajectory()[0].prompt_ids if previous else ids
        return min(self._max_response - (len(ids) - len(first_prompt)), self._max_total - len(ids))

    def finish(self, call: Call, completion: Completion) -> str:
        """Record the response to a call, and return its text with special tokens."""
        call.text = self._codec.decode(call.prompt_ids, completion.response_ids)
        call.finished = self._clock()
        call.completion = completion
        return call.text

    def trajectories(self) -> list[SampledTrajectory]:
        """Return the trajectories at the end of the episode, in the order of their first calls."""
        now = self._clock()
        done = [call for call in self._calls if call.completion is not None]
        extended = {call.previous.number for call in done if call.previous}
        last = max((call.finished for call in done), default=now)
        ends = [call.trajectory() for call in done if call.number not in extended]
        ends.sort(key=lambda calls: calls[0].number)
        return [_join(calls, now if calls[-1].finished == last else None) for calls in ends]


def _text_of(call: Call) -> str:
    """Return the text of prompt and response."""
    return f"{call.prompt_text}{call.text}"


def _join(calls: Sequence[Call], end: float | None) -> SampledTrajectory:
    """Return the calls of one trajectory as one response. end: the time of the end of its last tool, if it had one."""
    position = start = len(calls[0].prompt_ids)
    completions = []
    mask: list[bool] = []
    for call in calls:
        assert call.completion is not None
        completions.append((len(call.prompt_ids) - position, call.completion))
        mask += [False] * (len(call.prompt_ids) - position) + [True] * len(call.completion.response_ids)
        position = len(call.ids())
    last = calls[-1]
    gaps = [after.received - before.finished for before, after in itertools.pairwise(calls)]
    columns: dict[str, Any] = {name: _join_column(name, completions) for name in COMPLETION_COLUMNS}
    finish_reason = "length" if last.is_last_refused else completions[-1][1].finish_reason
    completion = Completion(response_ids=last.ids()[start:], finish_reason=finish_reason, **columns)
    tool_seconds = sum(gaps) + (end - last.finished if end is not None else 0.0)
    return SampledTrajectory(
        calls[0].prompt_ids, completion, np.array(mask, np.bool_), len(calls), tool_seconds, last.number
    )


def _join_column(name: str, completions: Iterable[tuple[int, Completion]]) -> np.ndarray | None:
    """Return a column of all responses, [T] or [T, K], with zeros before each for the tokens that precede it."""
    pieces = []
    for before, completion in completions:
        values = getattr(completion, name)
        if values is None:
            return None
        pieces += [np.zeros((before, *values.shape[1:]), values.dtype), values]
    return np.concatenate(pieces)
