"""Episodes over real HTTP, with an engine that answers by a rule."""

import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.tokenizers import NUM_IDS, byte_level, write_tokenizer

from opdctl.agents import episodes
from opdctl.agents.episodes import EpisodeRequest, EpisodeResult, EpisodeRunner, EpisodeSettings
from opdctl.agents.gateway import Gateway, open_gateway
from opdctl.agents.student import Student
from opdctl.artifacts.records import Completion
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.engines.base import Request
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Sampling

END = 2
HELLO = [*byte_level().encode("hello").ids, END]
USER = {"messages": [{"role": "user", "content": "?"}]}


class Engine:
    """Answers `hello` to every request, and keeps the requests of each call of it."""

    def __init__(self) -> None:
        self.rounds: list[list[Request]] = []

    def sample(self, requests: Iterable[Request | None]) -> Generator[tuple[int, Completion]]:
        self.rounds.append([])
        count = 0
        for request in requests:
            if request is not None:
                self.rounds[-1].append(request)
                ids = np.array(HELLO[: request.max_tokens], np.int32)
                reason = "stop" if len(ids) == len(HELLO) else "length"
                yield count, Completion(ids, -np.ones(len(ids), np.float32), reason)
                count += 1


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    model = ModelDir(write_tokenizer(Path(tmp_path_factory.mktemp("model"))), "float32")
    renderer = PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat())
    return Student(model.tokenizer, renderer, model.vocab_size, Sampling(max_tokens=40, temperature=0.7), 200)


@pytest.fixture
def run(student: Student) -> Callable[..., list[EpisodeResult]]:
    def play(function: Any, count: int = 1, engine: Engine | None = None, **settings: Any) -> list[EpisodeResult]:
        defaults = {"seed": 0, "timeout_seconds": 20, "max_running": 8, "batches_across_parts": False}
        with open_gateway() as gateway:
            sample = (engine or Engine()).sample
            runner = EpisodeRunner(function, gateway, student, sample, EpisodeSettings(**(defaults | settings)))
            requests = [EpisodeRequest(f"p{n}/00000/0", {"number": n}) for n in range(count)]
            return [result for _, result in sorted(runner.run(requests), key=lambda pair: pair[0])]

    return play


def post(base_url: str, endpoint: str = "chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{base_url}/{endpoint}", json=body, timeout=30)


def test_answer_of_a_chat(run, student):
    answers = []

    def play(row: Any, base_url: str) -> float:
        answers.append(post(base_url, **USER, return_token_ids=True, logprobs=True, model="any").json())
        return 0.5

    (result,) = run(play)
    ((trajectory, reward),) = result.trajectories
    (answer,) = answers
    choice = answer["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": "hello"}, "stop")
    assert choice["token_ids"] == HELLO == trajectory.completion.response_ids.tolist()
    assert answer["prompt_token_ids"] == trajectory.prompt_ids.tolist()
    assert answer["usage"]["completion_tokens"] == len(HELLO)
    assert [each["logprob"] for each in choice["logprobs"]["content"]] == [-1.0] * len(HELLO)
    assert [each["token"] for each in choice["logprobs"]["content"]] == [*"hello", "<|im_end|>"]
    assert reward == 0.5


def test_completion_of_text_and_of_ids(run):
    answers = []

    def play(row: Any, base_url: str) -> None:
        body = {"return_token_ids": True, "max_tokens": 3, "logprobs": 1}
        first = post(base_url, "completions", prompt="<|im_start|>a", **body).json()["choices"][0]
        ids = [*first["prompt_token_ids"], *first["token_ids"], 100]
        answers.extend([first, post(base_url, "completions", prompt=ids, **body).json()["choices"][0]])

    (result,) = run(play)
    ((trajectory, _),) = result.trajectories
    first, second = answers
    assert first["prompt_token_ids"] == byte_level().encode("<|im_start|>a").ids
    assert (first["text"], first["finish_reason"]) == ("hel", "length")
    assert first["logprobs"]["tokens"] == ["h", "e", "l"]
    assert second["prompt_token_ids"] == [*first["prompt_token_ids"], *HELLO[:3], 100]
    assert trajectory.turns == 2
    assert trajectory.loss_mask.tolist() == [True] * 3 + [False] + [True] * 3


REFUSED = {
    "n": {"n": 2},
    "stream": {"stream": True},
    "temperature": {"temperature": 1.0},
    "top_p": {"top_p": 0.5},
    "max_tokens": {"max_tokens": 0},
    "logprobs": {"logprobs": 3},
    "seed": {"seed": 1},
    "stop": {"stop": [""]},
    "messages": {"messages": [{"role": "friend", "content": "?"}]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_request_that_cannot_be_answered_is_refused_with_a_reason(run, name):
    answers = []

    def play(row: Any, base_url: str) -> None:
        answers.append(post(base_url, **(USER | REFUSED[name])))
        post(base_url, **USER)

    run(play)
    assert answers[0].status_code == 400
    assert name in answers[0].json()["error"]["message"]


def test_settings_of_the_recipe_are_accepted(run):
    answers = []

    def play(row: Any, base_url: str) -> None:
        body = {"temperature": 0.7, "top_p": 1, "n": 1, "stream": False, "top_k": -1, "user": "me", "seed": None}
        answers.append(post(base_url, **USER, **body).status_code)
        answers.append(httpx.get(f"{base_url}/models").json()["data"][0]["id"])

    run(play)
    assert answers == [200, "student"]


@pytest.mark.parametrize("includes", [False, True])
def test_stop_string(run, includes):
    texts = []
    engine = Engine()

    def play(row: Any, base_url: str) -> None:
        answer = post(base_url, **USER, stop="l", include_stop_str_in_output=includes).json()
        texts.append(answer["choices"][0]["message"]["content"])

    run(play, engine=engine)
    assert engine.rounds[0][0].stop == ("l",)
    assert texts == ["hello" if includes else "he"]


def test_address_ends_with_its_episode_and_is_not_guessed(run):
    addresses = []

    def play(row: Any, base_url: str) -> None:
        post(base_url, **USER)
        addresses.append(base_url)
        other = base_url.rsplit("/", 2)[0] + "/guess/v1"
        assert post(other, **USER).status_code == 404
        if len(addresses) > 1:
            assert post(addresses[0], **USER).status_code == 404

    results = run(play, 2, max_running=1)
    assert not [result.failure for result in results if result.failure]
    assert len(set(addresses)) == 2


def test_round_has_a_call_of_every_running_episode(run):
    engine = Engine()

    def play(row: Any, base_url: str) -> None:
        time.sleep(0.05 * row["number"])
        for _ in range(2):
            post(base_url, **USER)

    run(play, 6, engine, max_running=4)
    assert [len(requests) for requests in engine.rounds] == [4, 4, 2, 2]
    seeds = [request.seed for requests in engine.rounds for request in requests]
    assert len(set(seeds)) == 12


def test_slow_tool_delays_others_for_a_bounded_time(run, monkeypatch):
    monkeypatch.setattr(episodes, "MAX_TOOL_WAIT_SECONDS", 0.2)
    times: dict[int, float] = {}
    slow_tool = threading.Event()

    def play(row: Any, base_url: str) -> None:
        if row["number"] == 0:
            slow_tool.wait(15)
        post(base_url, **USER)
        times[row["number"]] = time.monotonic()
        if row["number"] == 1:
            slow_tool.set()

    results = run(play, 2)
    assert not [result.failure for result in results if result.failure]
    assert times[1] < times[0]


def test_engine_across_parts_gets_calls_while_it_works(run):
    """One stream, whose requests are None while none waits."""
    release = threading.Event()

    class Slow(Engine):
        def sample(self, requests: Iterable[Request | None]) -> Generator[tuple[int, Completion]]:
            held: list[int] = []
            pauses = count = 0
            for request in requests:
                if request is None:
                    pauses += 1
                    time.sleep(0.01)
                    if count == 2:
                        break
                else:
                    held.append(count)
                    count += 1
                    release.set()
            assert pauses
            for number in held:
                yield number, Completion(np.array(HELLO, np.int32), -np.ones(len(HELLO), np.float32), "stop")

    def play(row: Any, base_url: str) -> None:
        if row["number"] == 1:
            release.wait(15)
        post(base_url, **USER)

    results = run(play, 2, Slow(), batches_across_parts=True)
    assert not [result.failure for result in results if result.failure]


def raise_value_error(row: Any, base_url: str) -> None:
    post(base_url, **USER)
    raise ValueError("the tool\nis gone")


def hang(row: Any, base_url: str) -> None:
    post(base_url, **USER)
    time.sleep(60)


FAILING = {
    "it raises": (raise_value_error, "ValueError: the tool is gone, at test_gateway.py"),
    "no call": (lambda row, base_url: None, "the function did not call the student"),
    "a text": (lambda row, base_url: post(base_url, **USER) and "good", "a reward must be a finite number"),
    "not finite": (lambda row, base_url: post(base_url, **USER) and float("nan"), "a reward must be a finite number"),
    "another id": (lambda row, base_url: post(base_url, **USER) and [{"id": "x"}], "no trajectory ends with"),
    "it hangs": (
        lambda row, base_url: post(base_url, **USER) and time.sleep(60),
        "TimeoutError: not finished after 2 s",
    ),
    "it exits": (lambda row, base_url: exit(3), "SystemExit: 3"),
}


@pytest.mark.parametrize("name", FAILING)
def test_failure_is_described(run, name):
    function, text = FAILING[name]
    (result,) = run(function, timeout_seconds=2)
    assert text in (result.failure or "")
    assert not result.trajectories


def test_list_selects_trajectories_with_their_rewards(run):
    def play(row: Any, base_url: str) -> list[dict[str, Any]]:
        ids = [post(base_url, **USER).json()["id"] for _ in range(3)]
        return [{"id": ids[2], "reward": 1}, {"id": ids[0]}]

    (result,) = run(play)
    assert [(trajectory.last_call, reward) for trajectory, reward in result.trajectories] == [(2, 1.0), (0, None)]


def test_call_without_room_is_refused_and_the_episode_is_kept(run):
    codes = []

    def play(row: Any, base_url: str) -> None:
        ids = [50]
        while True:
            answer = post(base_url, "completions", prompt=ids, return_token_ids=True)
            if answer.status_code != 200:
                codes.append(answer.json()["error"]["code"])
                answer.raise_for_status()
            ids += [*answer.json()["choices"][0]["token_ids"], 60]

    (result,) = run(play)
    ((trajectory, reward),) = result.trajectories
    assert codes == ["context_length_exceeded"]
    assert (reward, trajectory.completion.finish_reason) == (None, "length")
    assert len(trajectory.completion.response_ids) <= 40


def test_invalid_bodies(student):
    with open_gateway() as gateway:
        address = gateway.open(lambda endpoint, body: {"endpoint": endpoint, "body": body})
        url = f"{address}/chat/completions"
        assert httpx.post(url, json={"a": 1}).json() == {"endpoint": "chat/completions", "body": {"a": 1}}
        for content in (b"{", b"\xff", b"[" * 10**5):
            answer = httpx.post(url, content=content)
            assert answer.status_code == 400
            assert "no JSON" in answer.json()["error"]["message"]


def test_vocabulary_of_ids_is_checked(run):
    answers = []

    def play(row: Any, base_url: str) -> None:
        answers.extend(
            post(base_url, "completions", prompt=prompt) for prompt in ([], [NUM_IDS], [-1], ["a", "b"], [1.5])
        )
        post(base_url, **USER)

    run(play)
    assert [answer.status_code for answer in answers] == [400] * 5


def test_gateway_closes_its_socket():
    gateway = Gateway()
    address = gateway.open(lambda endpoint, body: {})
    gateway.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/models")
