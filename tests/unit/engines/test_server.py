"""The engine `server` with a local imitation of vLLM's API: requests, parsing, and checks at the start."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers.commands import small_recipe
from helpers.engines import requests
from helpers.servers import Answer, Proxy, Received, engine_at, server_settings, teacher

from opdctl import console
from opdctl.engines.base import EngineContext, Request, ScoreRequest
from opdctl.engines.server import ServerEngine
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import Model, Rollout, RolloutColumns, Sampling, Score

EOS = 1
MODELS = {"data": [{"id": "teacher", "max_model_len": 256}, {"id": "adapter", "parent": "teacher"}]}


def completion(body: Any) -> dict[str, Any]:
    """Respond with the reversed prompt and EOS, or as much of it as fits. Token t has log-prob -(t + 1) / 8."""
    ids = [*reversed(body["prompt"]), EOS][: body["max_tokens"]]
    values = [-(t + 1) / 8 for t in range(len(ids))]
    names = [f"token_id:{id_}" for id_ in ids]
    top = [{name: value, "token_id:50": -0.01, "token_id:51": -9.0} for name, value in zip(names, values, strict=True)]
    return {
        "prompt_token_ids": body["prompt"],
        "token_ids": ids,
        "finish_reason": "stop" if ids[-1] == EOS else "length",
        "logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": top},
    }


def prompt_scores(body: Any) -> dict[str, Any]:
    """Return log-prob -t / 8 for token t of the text, and 50, 51 as the most probable ids."""
    rows: list[Any] = [None]
    for t, id_ in list(enumerate(body["prompt"]))[1:]:
        values = {50: -0.02, 51: -0.01} | {id_: -t / 8}
        rows.append({str(key): {"logprob": value} for key, value in values.items()})
    return {"prompt_token_ids": body["prompt"], "token_ids": [EOS], "prompt_logprobs": rows}


class Api:
    """What the imitation answers; a test changes an attribute, or the choice of each completion by `edit`."""

    def __init__(self) -> None:
        self.models: Any = MODELS
        self.tokenize: Callable[[str], list[int]] | None = lambda text: teacher().tokenizer.encode(
            text, add_special_tokens=False
        )
        self.token: Callable[[int], str] = teacher().tokenizer.convert_ids_to_tokens
        self.edit: Callable[[Any], Any] = lambda choice: None
        self.bodies: list[Any] = []

    def answer(self, received: Received) -> Answer:
        if received.path == "/v1/models":
            return self._json(self.models)
        body = json.loads(received.body)
        if received.path == "/tokenize":
            if self.tokenize is None:
                return Answer(404, b"")
            ids = self.tokenize(body["prompt"])
            return self._json({"tokens": ids, "token_strs": [self.token(id_) for id_ in ids]})
        self.bodies.append(body)
        choice = prompt_scores(body) if "prompt_logprobs" in body else completion(body)
        self.edit(choice)
        return self._json({"choices": [choice]})

    def _json(self, content: Any) -> Answer:
        return Answer(200, json.dumps(content).encode())


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def server(api) -> Iterator[Proxy]:
    server = Proxy()
    server.set(api.answer)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def engine(server) -> Iterator[ServerEngine]:
    engine = engine_at(server.url)
    yield engine
    engine.close()


def rejection(call: Callable[[], Any], kind: str) -> OpdctlError:
    with pytest.raises(OpdctlError) as error:
        call()
    assert error.value.kind == kind
    return error.value


SCORED = [
    ScoreRequest(request.prompt_ids, np.arange(2, 2 + count, dtype=np.int32))
    for request, count in zip(requests(3, cut=2), (4, 1, 7), strict=True)
]


# ── Requests and results ─────────────────────────────────────────────────────────────────────────────────────────────


def test_completions_have_ids_logprobs_and_reason(engine, api):
    prompts = requests(5, cut=4)
    progress: list[int] = []
    completions = engine.generate(
        prompts, Sampling(max_tokens=12), 64, progress.append, columns=RolloutColumns(top_k=2)
    )
    assert sum(progress) == 5
    for request, result in zip(prompts, completions, strict=True):
        ids = [*request.prompt_ids.tolist()[::-1], EOS][:12]
        assert result.response_ids.tolist() == ids
        np.testing.assert_array_equal(result.logprobs, np.float32([-(t + 1) / 8 for t in range(len(ids))]))
        assert result.logprobs.dtype == np.float32
        assert result.finish_reason == ("stop" if ids[-1] == EOS else "length")
        assert result.top_ids[0].tolist() == [50, ids[0]]
        assert result.top_logprobs.shape == (len(ids), 2)
    assert {result.finish_reason for result in completions} == {"stop", "length"}


def test_request_states_every_sampling_setting(engine, api):
    (request,) = requests(1)
    engine.generate([request], Sampling(max_tokens=12, temperature=0.5, top_p=0.75), 64, lambda n: None)
    (body,) = api.bodies
    assert body == {
        "model": "teacher",
        "prompt": request.prompt_ids.tolist(),
        "seed": request.seed,
        "max_tokens": 12,
        "temperature": 0.5,
        "top_p": 0.75,
        "logprobs": 0,
        "stop_token_ids": [EOS],
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_k": 0,
        "min_p": 0.0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def test_scores_are_those_of_the_response_tokens(engine):
    for top_k in (0, 2):
        for request, scores in zip(SCORED, engine.score(SCORED, Score(top_k=top_k), lambda n: None), strict=True):
            start = len(request.prompt_ids)
            expected = [-(start + t) / 8 for t in range(len(request.response_ids))]
            np.testing.assert_array_equal(scores.logprobs, np.float32(expected))
            if top_k:
                assert scores.top_ids.tolist() == [[51, 50]] * len(expected)
                np.testing.assert_array_equal(scores.top_logprobs, np.float32([[-0.01, -0.02]] * len(expected)))
            else:
                assert scores.top_ids is None


def test_most_probable_ids_are_sorted_by_logprob_and_then_by_id(engine, api):
    """As from a plain sort; equal log-probs, and the token itself as an additional entry, included."""
    rng = np.random.default_rng(0)
    rows: list[dict[int, float]] = []

    def edit(choice: Any) -> None:
        rows.clear()
        for t, id_ in enumerate(choice["prompt_token_ids"]):
            ids = {*rng.choice(52, 12, replace=False).tolist(), id_}
            rows.append({each: -int(rng.integers(1, 5)) / 4 for each in ids})
            if t:
                choice["prompt_logprobs"][t] = {str(k): {"logprob": v, "rank": 1} for k, v in rows[t].items()}

    api.edit = edit
    for request in SCORED:
        (scores,) = engine.score([request], Score(top_k=6), lambda n: None)
        scored = rows[len(request.prompt_ids) :]
        wanted = [sorted(row.items(), key=lambda entry: (-entry[1], entry[0]))[:6] for row in scored]
        assert scores.top_ids.tolist() == [[id_ for id_, _ in row] for row in wanted]
        assert scores.top_logprobs.tolist() == [[value for _, value in row] for row in wanted]
        assert scores.logprobs.tolist() == [
            row[id_] for row, id_ in zip(scored, request.response_ids.tolist(), strict=True)
        ]


MALFORMED_SCORES = {
    "another prompt": lambda choice: choice["prompt_token_ids"].reverse(),
    "too few": lambda choice: choice["prompt_logprobs"].pop(),
    "none": lambda choice: choice.update(prompt_logprobs=None),
    "other ids": lambda choice: choice["prompt_logprobs"][-1].pop("5"),
    "too few most probable": lambda choice: choice["prompt_logprobs"][-1].pop("50"),
    **{
        f"log-prob {value}": lambda choice, value=value: choice["prompt_logprobs"][-1].update({"5": {"logprob": value}})
        for value in (float("nan"), float("-inf"), None, -9999.0, 0.5, "-1", False, True, [], -(10**400), 10**400)
    },
}


@pytest.mark.parametrize("edit", MALFORMED_SCORES.values(), ids=MALFORMED_SCORES)
def test_malformed_scores_are_rejected(engine, api, edit):
    api.edit = edit
    rejection(lambda: engine.score(SCORED[:1], Score(top_k=3), lambda n: None), "malformed_response")
    assert len(api.bodies) == 2


MALFORMED_COMPLETIONS = {
    "other ids": lambda choice: choice["token_ids"].reverse(),
    "too few log-probs": lambda choice: choice["logprobs"]["token_logprobs"].pop(),
    "NaN": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, float("nan")),
    "another reason": lambda choice: choice.update(finish_reason="abort"),
    "length too short": lambda choice: choice.update(finish_reason="length"),
    "too few most probable": lambda choice: choice["logprobs"]["top_logprobs"][0].pop("token_id:50"),
    "too few positions": lambda choice: choice["logprobs"]["top_logprobs"].pop(),
    **{
        f"top log-prob {value}": lambda choice, value=value: choice["logprobs"]["top_logprobs"][0].update(
            {"token_id:50": value}
        )
        for value in (float("nan"), None, "-1", False, 10**400)
    },
    **{
        f"top id {name}": lambda choice, name=name: choice["logprobs"]["top_logprobs"][0].update({name: -0.01})
        for name in ("token_id:-3", "token_id: 3", "token_id:1_0", "token_id:050", "token_id:" + "9" * 30, "x")
    },
    **{
        f"id {value}": lambda choice, value=value: (
            choice["token_ids"].__setitem__(0, value),
            choice["logprobs"]["tokens"].__setitem__(0, f"token_id:{value}"),
        )
        for value in (True, 3.0, -3, 10**400, "3", None)
    },
}


@pytest.mark.parametrize("edit", MALFORMED_COMPLETIONS.values(), ids=MALFORMED_COMPLETIONS)
def test_malformed_completion_is_rejected(engine, api, edit):
    api.edit = edit
    sampling = Sampling(max_tokens=40)
    rejection(
        lambda: engine.generate(requests(1), sampling, 1, lambda n: None, columns=RolloutColumns(top_k=3)),
        "malformed_response",
    )


@pytest.mark.parametrize("field", ["prompt_token_ids", "token_ids"])
def test_server_without_token_ids_is_rejected(engine, api, field):
    api.edit = lambda choice: choice.pop(field)
    error = rejection(lambda: engine.score(SCORED[:1], Score(), lambda n: None), "unsupported_setting")
    assert "0.10.2" in error.hint
    assert len(api.bodies) == 1


# ── Padding rows ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def padded(server) -> Iterator[ServerEngine]:
    """An engine whose server's output matrix has padding rows: those of the ids 52 to 55."""
    engine = engine_at(server.url, vocab_size=52)
    yield engine
    engine.close()


def give_padding(probability: float) -> Callable[[Any], None]:
    """Give padding ids this probability at a prompt's end, and put one among the most probable ids."""

    def edit(choice: Any) -> None:
        rows = choice.get("prompt_logprobs") or []
        for row in rows[1:]:
            row.update({"53": {"logprob": -0.001}})
        if choice["prompt_token_ids"][-1] >= 52:
            rows[-1] = {str(choice["prompt_token_ids"][-1]): {"logprob": float(np.log(probability))}}

    return edit


def test_probability_of_padding_rows_is_measured_once(padded, api, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(console, "info", messages.append)
    api.edit = give_padding(1e-6)
    for _ in range(2):
        padded.score(SCORED, Score(), lambda n: None)
    assert len(messages) == 1
    assert "4e-06" in messages[0]
    asked = [body["prompt"] for body in api.bodies if body["prompt"][-1] >= 52]
    contexts = [[*request.prompt_ids, *request.response_ids[: len(request.response_ids) // 2]] for request in SCORED]
    assert sorted(asked) == sorted([*context, id_] for context in contexts for id_ in range(52, 56))


@pytest.mark.parametrize("task", ["score", "generate"])
def test_probable_padding_rows_are_rejected(padded, api, server, task):
    api.edit = give_padding(0.01)
    calls = {
        "score": lambda: padded.score(SCORED, Score(), print),
        "generate": lambda: padded.generate(requests(1), Sampling(max_tokens=20), 1, print),
    }
    error = rejection(calls[task], "unsupported_model")
    assert server.url in error.message
    assert "0.041 nats" in error.message  # -log(1 - 4 · 0.01)
    assert error.hint


def test_ids_of_padding_rows_enter_no_top_k(padded, api):
    api.edit = give_padding(1e-6)
    for request, scores in zip(SCORED, padded.score(SCORED, Score(top_k=2), lambda n: None), strict=True):
        assert scores.top_ids.tolist() == [[51, 50]] * len(request.response_ids)
    assert api.bodies[-1]["prompt_logprobs"] == 2 + 4
    api.edit = lambda choice: choice["prompt_logprobs"][-1].update({"53": choice["prompt_logprobs"][-1].pop("50")})
    rejection(lambda: padded.score(SCORED[:1], Score(top_k=3), lambda n: None), "malformed_response")


def test_sampling_avoids_padding_rows(padded, api):
    api.edit = give_padding(1e-6)
    padded.generate(requests(1), Sampling(max_tokens=20), 1, lambda n: None)
    assert api.bodies[-1]["logit_bias"] == {str(id_): -100 for id_ in range(52, 56)}
    foreign = [Request(np.array([2, 53, 3], np.int32), 0)]  # which this server's response contains
    rejection(lambda: padded.generate(foreign, Sampling(max_tokens=20), 1, lambda n: None), "malformed_response")


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_only_model_is_used_and_adapters_are_ignored(engine, api):
    engine.score(SCORED[:1], Score(), lambda n: None)
    assert api.bodies[0]["model"] == "teacher"


def test_unknown_served_name_lists_the_models(server):
    error = rejection(lambda: engine_at(server.url, "teacher.served_name=taecher"), "missing_model")
    assert all(name in error.message for name in ("`taecher`", "`teacher`"))
    assert "teacher.served_name" in error.hint


@pytest.mark.parametrize("card", [{"id": 1}, {"id": None}, {"id": "teacher", "max_model_len": "256"}, {"id": []}, 3])
def test_malformed_list_of_models_is_rejected(server, api, card):
    api.models = {"data": [card, {"id": "other"}]}
    rejection(lambda: engine_at(server.url, "teacher.served_name=other2"), "malformed_response")


def test_names_of_models_show_no_part_of_the_key(server, api, monkeypatch):
    monkeypatch.setenv("OPDCTL_API_KEY", "sk-Proj4f9Q7xLm2Zt8")
    api.models = {"data": [{"id": "a\x1b[31m"}, {"id": "sk-Proj4f9Q7xLm2Zt"}]}
    error = rejection(lambda: engine_at(server.url, "teacher.served_name=taecher"), "missing_model")
    assert "Proj4f" not in error.message
    assert "\x1b" not in error.message


def test_several_models_require_a_name(server, api):
    api.models = {"data": [{"id": "teacher"}, {"id": "other"}]}
    error = rejection(lambda: engine_at(server.url), "missing_model")
    assert "`other`, `teacher`" in error.message
    engine_at(server.url, "teacher.served_name=other").close()


def test_too_long_sequence_is_rejected_without_a_request(server, api):
    """The hint has the longest sequence of the recipe: the next too long one would ask for another restart."""
    api.models = {"data": [{"id": "teacher", "max_model_len": 18}]}
    engine = engine_at(server.url, "prompts.max_tokens=20", "rollout.max_tokens=30")
    error = rejection(lambda: engine.generate(requests(1), Sampling(max_tokens=8), 1, print), "unsupported_setting")
    assert "13 + 8 tokens" in error.message
    assert "--max-model-len 28" in error.hint
    longest = max(SCORED, key=lambda each: len(each.prompt_ids) + len(each.response_ids))
    error = rejection(lambda: engine.score([longest], Score(), print), "unsupported_setting")
    assert "18 + 1 tokens" in error.message
    assert "--max-model-len 51" in error.hint
    engine.close()
    assert not api.bodies


def test_another_tokenizer_is_rejected(server, api):
    api.token = lambda id_: teacher().tokenizer.convert_ids_to_tokens(id_ ^ 1)
    error = rejection(lambda: engine_at(server.url), "incompatible_tokenizer")
    assert str(teacher().path) in error.message


@pytest.mark.parametrize("id_", ["3", 10**30, -1, 1.0, True, None])
def test_malformed_tokens_are_rejected(server, api, id_):
    api.tokenize = lambda text: [id_]
    api.token = lambda id_: "a"
    rejection(lambda: engine_at(server.url), "malformed_response")


def test_server_that_splits_text_otherwise_is_accepted(server, api):
    """As where the class of its tokenizer loses spaces that tokenizer.json keeps: the engine sends only ids."""
    api.tokenize = lambda text: [5, 3, 4]
    engine_at(server.url).close()


def test_missing_tokenize_endpoint_is_a_warning(server, api, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(console, "warn", messages.append)
    api.tokenize = None
    engine_at(server.url).close()
    assert len(messages) == 1
    assert "/tokenize" in messages[0]


@pytest.mark.parametrize("name", ["entropy", "student_top_k", "hidden_states"])
def test_unsupported_score_settings_are_rejected(engine, name):
    error = rejection(lambda: engine.score([], Score(**{name: True}), print), "unsupported_setting")
    assert f"score.{name}" in error.message
    assert "score.engine" in error.hint


def test_sampling_settings_and_stop_strings_are_sent(engine, api):
    """The imitation reverses the prompt, and ends at the stop string's token as a server that knows it would."""
    (request,) = requests(1)
    last = int(request.prompt_ids[8])

    def stop(choice: Any) -> None:
        for values in (choice["token_ids"], *choice["logprobs"].values()):
            del values[5:]
        choice.update(finish_reason="stop", stop_reason="END")

    api.edit = stop
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 1.5, "frequency_penalty": 0.5}
    settings = penalties | {"top_k": 20, "min_p": 0.1, "stop": ["END", "\nQ:"]}
    (done,) = engine.generate([request], Sampling(max_tokens=12, **settings, stop_token_ids=[7]), 64, lambda n: None)
    (body,) = api.bodies
    expected = settings | {"include_stop_str_in_output": True, "stop_token_ids": [EOS, 7]}
    assert expected == {name: body[name] for name in expected}
    assert (done.response_ids.tolist()[-1], len(done.logprobs), done.finish_reason) == (last, 5, "stop")


@pytest.mark.parametrize("reason", [None, "other", 7])
def test_end_for_a_reason_that_was_not_requested_is_malformed(engine, api, reason):
    def stop(choice: Any) -> None:
        for values in (choice["token_ids"], *choice["logprobs"].values()):
            del values[5:]
        choice.update(finish_reason="stop", stop_reason=reason)

    api.edit = stop
    rejection(
        lambda: engine.generate(requests(1), Sampling(max_tokens=12, stop=["END"]), 1, lambda n: None),
        "malformed_response",
    )


def test_rollouts_from_another_distribution_are_rejected(engine):
    rollout = Rollout(temperature=0.5)
    error = rejection(lambda: engine.generate([], rollout.sampling(), 1, print, columns=rollout), "unsupported_setting")
    assert "rollout: temperature: " in error.message
    assert "rollout.engine" in error.hint


@pytest.mark.parametrize(
    ("sampling", "options"),
    [({}, {"entropy": True}), ({"temperature": 0.5}, {"top_k": 2}), ({"top_p": 0.5}, {"top_k": 2})],
)
def test_unsupported_sampling_settings_are_rejected(engine, sampling, options):
    settings, columns = Sampling(**sampling), RolloutColumns(**options)
    error = rejection(lambda: engine.generate([], settings, 1, print, columns=columns), "unsupported_setting")
    assert "rollout.engine" in error.hint


def test_weights_of_another_model_are_rejected(engine):
    engine.load_weights(teacher())
    student = ModelDir(find_or_download(Model(model="toy:student"), "model"), "float32")
    error = rejection(lambda: engine.load_weights(student), "unsupported_setting")
    assert str(student.path) in error.message
    assert "rollout.engine" in error.hint


@pytest.mark.parametrize(
    ("sampling", "start"),
    [({}, "processed, "), ({"temperature": 0.5}, "raw or processed"), ({"top_p": 0.5}, "raw or processed")],
)
def test_metadata_states_whether_logprobs_are_processed(server, sampling, start):
    recipe = small_recipe(*server_settings(server.url))
    recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=sampling)})
    engine = ServerEngine(teacher(), EngineContext(recipe, recipe.models()["teacher"], "cpu"))
    assert engine.logprob_metadata["logprobs"].startswith(start)
    engine.close()


def test_missing_address_is_rejected():
    recipe = small_recipe()
    error = rejection(
        lambda: ServerEngine(teacher(), EngineContext(recipe, recipe.models()["teacher"], "cpu")), "invalid_recipe"
    )
    assert "teacher.server" in error.message
    assert "teacher.server" in error.hint
