"""Many episodes at once on one engine: each runs in a thread, and the main thread passes their calls to the engine.

An engine that batches across parts gets each call as soon as it arrives. Another one gets rounds: the calls that wait
when every running episode waits, so that its batches, and on a CPU their bits, do not depend on the speed of the
episodes. A round waits for slow tools at most `MAX_TOOL_WAIT_SECONDS`.

A thread cannot be ended. That of an episode beyond its time is abandoned: its address is closed, and the thread ends
with this process.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opdctl import signals
from opdctl.agents import api
from opdctl.agents.api import Answer, ApiError, CallRequest
from opdctl.agents.conversation import Call, ContextLengthError, Conversation, SampledTrajectory
from opdctl.agents.function import Environment, describe_error, play_episode, read_rewards
from opdctl.agents.gateway import Gateway
from opdctl.agents.student import Student
from opdctl.artifacts.records import Completion, sample_seed
from opdctl.engines.base import Request
from opdctl.errors import OpdctlError

MAX_TOOL_WAIT_SECONDS = 5.0
"""That a round waits for the episodes that do not call the engine."""
WAIT_POLL_SECONDS = 0.1
StreamCompletions = Callable[[Iterable[Request | None]], Generator[tuple[int, Completion]]]
"""The engine: requests → number and completion of each."""


@dataclass(frozen=True)
class EpisodeRequest:
    """An episode to play. name: its sample id. row: of the prompt's source."""

    name: str
    row: dict[str, Any]


@dataclass(frozen=True)
class EpisodeResult:
    """The trajectories of an episode with their rewards, or why it failed."""

    trajectories: list[tuple[SampledTrajectory, float | None]] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class EpisodeSettings:
    """seed: of the run. timeout_seconds: of an episode. max_running: episodes at once. batches_across_parts: of the
    engine."""

    seed: int
    timeout_seconds: float
    max_running: int
    batches_across_parts: bool


@dataclass(eq=False)
class _WaitingCall:
    """A call that waits for its completion, in a thread of the gateway."""

    episode: "_Episode"
    call: Call
    request: Request
    is_answered: threading.Event = field(default_factory=threading.Event)
    completion: Completion | None = None

    def answer(self, completion: Completion | None) -> None:
        """Let the thread continue. None: the episode has ended."""
        self.completion = completion
        self.is_answered.set()


@dataclass(eq=False)
class _Episode:
    """A running episode. deadline: by the clock of `time.monotonic`. lock: of the conversation. stack: of its thread
    at the deadline."""

    number: int
    request: EpisodeRequest
    conversation: Conversation
    deadline: float
    address: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    result: Any = None
    error: BaseException | None = None
    thread: threading.Thread | None = None
    stack: traceback.StackSummary | None = None


class EpisodeRunner:
    """Plays episodes. `run` is called by one thread, that of the engine."""

    def __init__(
        self,
        environment: Environment,
        gateway: Gateway,
        student: Student,
        sample: StreamCompletions,
        settings: EpisodeSettings,
    ) -> None:
        self._environment, self._gateway, self._student = environment, gateway, student
        self._sample, self._settings = sample, settings
        self._changed = threading.Condition()  # of what follows: the running episodes, and those that threads add to
        self._running: dict[int, _Episode] = {}
        self._waiting: list[_WaitingCall] = []
        self._ended: deque[_Episode] = deque()

    def run(self, episodes: Iterable[EpisodeRequest]) -> Generator[tuple[int, EpisodeResult]]:
        """Play episodes; yield the number and the result of each when it has ended."""
        remaining = enumerate(episodes)
        try:
            while self._start_episodes(remaining):
                calls = self._next_calls()
                with contextlib.closing(self._complete(calls, remaining)) as results:
                    yield from results
        finally:
            for episode in list(self._running.values()):
                self._close(episode)

    # ── The thread of the engine ─────────────────────────────────────────────────────────────────────────────────────

    def _start_episodes(self, remaining: Iterator[tuple[int, EpisodeRequest]]) -> bool:
        """Start episodes up to the maximum; return whether any is running or has ended."""
        while len(self._running) < self._settings.max_running and (item := next(remaining, None)):
            number, request = item
            deadline = time.monotonic() + self._settings.timeout_seconds
            episode = _Episode(number, request, self._student.open_conversation(), deadline)
            episode.address = self._gateway.open(partial(self._respond, episode))
            with self._changed:
                self._running[number] = episode
            name = f"{signals.EPISODE_THREAD}{request.name}"
            episode.thread = threading.Thread(target=self._play, args=(episode,), daemon=True, name=name)
            episode.thread.start()
        return bool(self._running or self._ended)

    def _next_calls(self) -> list[_WaitingCall]:
        """Wait for calls or for the end of an episode, and return the calls that the engine gets together."""
        start = time.monotonic()
        with self._changed:
            while True:
                self._expire_episodes()
                busy = self._running.keys() - {waiting.episode.number for waiting in self._waiting}
                has_waited = self._settings.batches_across_parts or time.monotonic() - start > MAX_TOOL_WAIT_SECONDS
                if not busy or (has_waited and (self._waiting or self._ended)):
                    # Ended episodes make room for others, whose calls are part of the same round.
                    return [] if self._ended and not self._settings.batches_across_parts else self._take_waiting()
                self._changed.wait(WAIT_POLL_SECONDS)
                signals.check()

    def _take_waiting(self) -> list[_WaitingCall]:
        with self._changed:
            calls = sorted(self._waiting, key=lambda each: (each.episode.number, each.call.number))
            self._waiting.clear()
            return calls

    def _complete(
        self, calls: list[_WaitingCall], remaining: Iterator[tuple[int, EpisodeRequest]]
    ) -> Generator[tuple[int, EpisodeResult]]:
        """Let the engine complete calls, and those that arrive meanwhile if it takes them; yield the results of the
        episodes that have ended."""
        in_work: dict[int, _WaitingCall] = {}

        def take_requests() -> Iterator[Request | None]:
            count, arrived = 0, calls
            while arrived or in_work:
                for waiting in arrived:
                    in_work[count] = waiting
                    count += 1
                    yield waiting.request
                if not self._settings.batches_across_parts:
                    return
                self._start_episodes(remaining)
                arrived = self._take_waiting()
                if not arrived and in_work:
                    yield None

        yield from self._take_ended()
        try:
            if calls:
                with contextlib.closing(self._sample(take_requests())) as completions:
                    for number, completion in completions:
                        in_work.pop(number).answer(completion)
                        yield from self._take_ended()
        finally:
            for waiting in in_work.values():
                waiting.answer(None)

    def _take_ended(self) -> Iterator[tuple[int, EpisodeResult]]:
        with self._changed:
            self._expire_episodes()
        while self._ended:
            episode = self._ended.popleft()
            yield episode.number, self._result_of(episode)

    def _expire_episodes(self) -> None:
        """End the episodes whose time is over."""
        now = time.monotonic()
        for episode in [each for each in self._running.values() if each.deadline < now]:
            episode.error = TimeoutError(f"not finished after {self._settings.timeout_seconds:g} s")
            frame = sys._current_frames().get((episode.thread and episode.thread.ident) or 0)
            episode.stack = traceback.extract_stack(frame) if frame else traceback.StackSummary()
            self._close(episode)
            self._ended.append(episode)

    def _close(self, episode: _Episode) -> None:
        """Close the address of an episode, and answer its waiting calls."""
        with self._changed:
            self._running.pop(episode.number, None)
            waiting = [each for each in self._waiting if each.episode is episode]
            self._waiting = [each for each in self._waiting if each.episode is not episode]
        self._gateway.close_address(episode.address)
        for each in waiting:
            each.answer(None)

    def _result_of(self, episode: _Episode) -> EpisodeResult:
        with episode.lock:
            conversation = episode.conversation
            found = {self._response_id(episode, each.last_call): each for each in conversation.trajectories()}
        try:
            if episode.error:
                # Without room for a response, an environment cannot continue: what was sampled counts.
                if not conversation.is_exhausted or episode.stack is not None or not found:
                    raise episode.error
            elif not found:
                raise ValueError("the function did not call the student")
            rewards = read_rewards(episode.result, [*found])
        except BaseException as error:
            return EpisodeResult(failure=describe_error(error, self._environment, episode.stack))
        return EpisodeResult([(found[id_], reward) for id_, reward in rewards.items()])

    def _response_id(self, episode: _Episode, call: int) -> str:
        return f"{episode.request.name}/turn-{call}"

    # ── The threads of the episodes, and of the gateway ──────────────────────────────────────────────────────────────

    def _play(self, episode: _Episode) -> None:
        try:
            episode.result = play_episode(self._environment, episode.request.row, episode.address)
        except BaseException as error:
            episode_error: BaseException | None = error
        else:
            episode_error = None
        with self._changed:
            if episode.number in self._running:
                episode.error = episode_error
                self._close(episode)
                self._ended.append(episode)
                self._changed.notify_all()

    def _respond(self, episode: _Episode, endpoint: str, body: Any) -> dict[str, Any]:
        """Return the answer to a request of an episode."""
        if endpoint == api.MODELS and body is None:
            return api.models_to_json(self._student.max_total)
        if endpoint not in (api.CHAT, api.COMPLETIONS) or body is None:
            raise ApiError(f"there is no such endpoint: {endpoint}", "not_found", 404)
        student = self._student
        parsed = api.parse_request(endpoint, body, student.sampling, student.vocab_size)
        with episode.lock:
            call = self._begin_call(episode, parsed)
        seed = sample_seed(self._settings.seed, f"{episode.request.name} turn {call.number}")
        waiting = _WaitingCall(episode, call, Request(call.prompt_ids, seed, call.max_tokens, parsed.stop))
        with self._changed:
            if episode.number not in self._running:
                waiting.answer(None)
            else:
                self._waiting.append(waiting)
                self._changed.notify_all()
        waiting.is_answered.wait()
        if waiting.completion is None:
            raise ApiError("the episode has ended", "not_found", 404)
        with episode.lock:
            episode.conversation.finish(call, waiting.completion)
        return Answer(
            id=self._response_id(episode, call.number),
            created=int(time.time()),
            request=parsed,
            prompt_ids=call.prompt_ids,
            completion=waiting.completion,
            text=student.visible_text(call.prompt_ids, waiting.completion.response_ids),
            stop=waiting.request.stops(student.sampling),
            decode=student.decode_ids,
        ).to_json()

    def _begin_call(self, episode: _Episode, parsed: CallRequest) -> Call:
        try:
            return episode.conversation.begin(self._student.read_prompt(parsed), parsed.max_tokens)
        except ContextLengthError as error:
            raise ApiError(str(error), "context_length_exceeded") from None
        except OpdctlError as error:
            raise ApiError(f"{error.detail}{f'; {error.hint}' if error.hint else ''}") from None
