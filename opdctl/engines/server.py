"""The engine for a vLLM server: its completions API with token ids only.

The model directory here supplies the tokenizer. The API does not expose which weights the server holds, nor whether its
log-probs at a temperature other than 1 are raw or processed. The engine verifies what the API exposes: model name,
tokenizer, context length, and the form of every response.

The server's distribution covers all rows of the output matrix. Rows beyond the shared ids are padding rows, which other
engines mask. Here sampling avoids them, top-k entries omit them, and their probability is measured once: it makes all
other log-probs too low.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import httpx
import numpy as np

from opdctl import console
from opdctl.artifacts.records import Completion, Ids, Logprobs, TokenScores
from opdctl.engines.base import EngineContext, InOrder, Request, ScoreRequest, sampling_params
from opdctl.engines.http import MAX_RESPONSE_BYTES, Client, MalformedResponseError, Parse, Parsed
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, find_local
from opdctl.recipe.schema import RolloutColumns, Sampling, Score, model_key

_Item = TypeVar("_Item", Request, ScoreRequest)
Numbers = np.ndarray[Any, np.dtype[np.float64]]
TokenEntries = tuple[np.ndarray[Any, np.dtype[np.int64]], Numbers]
"""Ids and log-probs of the tokens that the server returns at one position."""
VLLM_NEG_INF = -9999.0  # vLLM's JSON encoding of minus infinity
MAX_LOGPROB = 1e-3  # rounding above 0
MISSING_ENDPOINT_STATUSES = (404, 405, 501)
TOKENIZER_SAMPLE_SIZE = 128  # ids of the vocabulary in each text that compares the tokenizers
PADDING_CONTEXTS, PADDING_SAMPLE_SIZE = 4, 32  # requests: one for each of these ids after each context
MAX_PADDING_NATS = 0.01
SPARE_ENTRIES = 4  # additional most probable tokens, in place of padding ids among them
FORBIDDEN_LOGIT_BIAS = -100.0  # the least that the API accepts
MAX_ENTRY_BYTES = 512
"""Maximum mean size of a token's entry in a response. One with log-prob, rank and text has about 90 bytes."""


class ServerEngine(InOrder):
    """Generates and scores with the model of one server, with concurrent requests."""

    batches_across_parts = True

    def __init__(self, model: ModelDir, context: EngineContext):
        self._model, self._settings, self._key = model, context.settings, _recipe_key(context)
        self._max_prompt, self._max_response = context.recipe.prompts.max_tokens, context.recipe.rollout.max_tokens
        self._url = _server_url(context.settings.server, self._key)
        self._padding_ids = range(model.vocab_size, model.num_embeddings)
        self._has_checked_padding = not self._padding_ids
        self.load_weights(model)
        self._client = Client(f"{self._key}.server", context.recipe.server)
        try:
            self._served_name, self._max_model_len = self._find_served_model(context.settings.served_name)
            self._check_tokenizer()
        except BaseException:
            self.close()
            raise
        kind = "processed" if not context.recipe.rollout.modifications else "raw or processed, as configured"
        self.logprob_metadata = {"engine": "server", "dtype": model.dtype, "logprobs": f"{kind}, float32, nats"}

    def load_weights(self, model: ModelDir) -> None:
        """Accept the directory if it is the one of the recipe: the weights of a server are fixed.

        Raises:
            OpdctlError: it is another directory, such as a student in training or a model given to `eval`.
        """
        in_hub_cache = f"models--{self._settings.model.replace('/', '--')}"
        if model.path != find_local(self._settings, f"{self._key}.model") and in_hub_cache not in model.path.parts:
            raise OpdctlError(
                "unsupported_setting",
                f"{self._url}: the server's weights are fixed; it cannot serve {model.path}",
                hint='set rollout.engine = "vllm" or "transformers" to sample from this model',
            )

    def close(self) -> None:
        self._client.close()

    def stream_completions(
        self,
        requests: Iterable[Request | None],
        sampling: Sampling,
        batch_size: int,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> Generator[tuple[int, Completion]]:
        hint = 'set rollout.engine = "transformers"'
        if columns.entropy:
            raise OpdctlError("unsupported_setting", "rollout.entropy: a server returns no entropies", hint=hint)
        if columns.sampling_logprobs or (columns.top_k and sampling.modifications):
            why = "a server's log-probs of a modified distribution may be raw or processed"
            names = ", ".join(sampling.modifications)
            raise OpdctlError("unsupported_setting", f"rollout: {names}: {why}", hint=hint)
        known = self._check_padding(filter(None, requests), lambda request: request.prompt_ids)
        end_ids = self._model.end_ids(sampling.stop_token_ids)
        vocab_size, top_k = self._model.vocab_size, columns.top_k
        entries = self._num_entries(top_k)
        fixed: dict[str, Any] = {"logprobs": entries, "stop_token_ids": end_ids}
        if self._padding_ids:
            fixed["logit_bias"] = dict.fromkeys(map(str, self._padding_ids), FORBIDDEN_LOGIT_BIAS)

        def bodies() -> Iterator[tuple[dict[str, Any], Parse[Completion], int]]:
            for request in known:
                own = sampling.model_copy(
                    update={"max_tokens": request.limit(sampling), "stop": request.stops(sampling)}
                )
                self._check_length(len(request.prompt_ids), own.max_tokens, self._max_prompt + sampling.max_tokens)
                body = self._body(request.prompt_ids, own) | fixed | {"seed": request.seed}
                if own.stop:
                    body |= {"stop": own.stop, "include_stop_str_in_output": True}
                parse = partial(_parse_completion, sampling=own, end_ids=end_ids, vocab_size=vocab_size, top_k=top_k)
                yield body, self._response_parser(body, parse), _max_response_bytes(body, entries)

        yield from self._client.post_all(f"{self._url}/completions", bodies())

    def stream_scores(self, requests: Iterable[ScoreRequest], settings: Score) -> Generator[tuple[int, TokenScores]]:
        for name in ("entropy", "student_top_k", "hidden_states"):
            if getattr(settings, name):
                raise OpdctlError(
                    "unsupported_setting",
                    f"score.{name}: a server does not return it; the recipe, its weight or its objective requires it",
                    hint='set score.engine = "transformers"',
                )
        requests = self._check_padding(requests, _first_half)
        vocab_size, entries = self._model.vocab_size, self._num_entries(settings.top_k)

        def bodies() -> Iterator[tuple[dict[str, Any], Parse[TokenScores], int]]:
            for request in requests:
                ids = np.concatenate([request.prompt_ids, request.response_ids])
                self._check_length(len(ids), 1, self._max_prompt + self._max_response + 1)
                body = self._body(ids, Sampling(max_tokens=1)) | {"prompt_logprobs": entries}
                parse = partial(_parse_scores, request=request, vocab_size=vocab_size, top_k=settings.top_k)
                yield body, self._response_parser(body, parse), _max_response_bytes(body, entries)

        yield from self._client.post_all(f"{self._url}/completions", bodies())

    def _num_entries(self, top_k: int) -> int:
        """Return how many most probable tokens are requested, so that `top_k` remain without those of padding rows."""
        return top_k and top_k + min(len(self._padding_ids), SPARE_ENTRIES)

    def _check_padding(self, requests: Iterable[_Item], context: Callable[[_Item], Ids]) -> Iterable[_Item]:
        """Return the requests after a check of the padding rows, which is made once.

        It measures the probability that the server gives to these rows after `context` of the first requests, and
        prints it. With probability p on them every other log-prob is -log(1 - p) nats below that of a masked
        distribution.

        Raises:
            OpdctlError: that is more than `MAX_PADDING_NATS`.
        """
        remaining = iter(requests)
        first = list(itertools.islice(remaining, 0 if self._has_checked_padding else PADDING_CONTEXTS))
        if first:
            self._measure_padding([context(request) for request in first])
        return itertools.chain(first, remaining)

    def _measure_padding(self, contexts: Sequence[Ids]) -> None:
        padding = len(self._padding_ids)
        sample = self._padding_ids[:: math.ceil(padding / PADDING_SAMPLE_SIZE)]
        longest = None if self._max_model_len is None else self._max_model_len - 2  # id and sampled token come after it

        def bodies() -> Iterator[tuple[dict[str, Any], Parse[float], int]]:
            for context in contexts:
                for id_ in sample:
                    body = self._body(np.append(context[:longest], id_), Sampling(max_tokens=1))
                    body["prompt_logprobs"] = 0
                    parse = partial(_parse_last_probability, id_=id_)
                    yield body, self._response_parser(body, parse), _max_response_bytes(body, 0)

        by_number = dict(self._client.post_all(f"{self._url}/completions", bodies()))
        probabilities = [by_number[number] for number in range(len(by_number))]
        means = np.reshape(probabilities, (len(contexts), len(sample))).mean(1)
        probability = min(float(means.max()) * padding, 1.0)
        nats = -math.log1p(-probability) if probability < 1 else math.inf
        text = (
            f"{self._url}: {padding} padding rows of the server's output matrix have probability {probability:.2g}, "
            f"which makes log-probs up to {nats:.2g} nats too low"
        )
        if nats > MAX_PADDING_NATS:
            raise OpdctlError(
                "unsupported_model",
                f"{text}, more than {MAX_PADDING_NATS}",
                hint='use the engine "vllm" or "transformers", which mask these rows, '
                "or serve a copy of the model with its embeddings resized",
            )
        console.info(text)
        self._has_checked_padding = True

    def _body(self, ids: Ids, sampling: Sampling) -> dict[str, Any]:
        # All settings: for absent ones the server would apply the defaults of the model's generation config.
        return sampling_params(sampling) | {
            "model": self._served_name,
            "prompt": ids.tolist(),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _response_parser(self, body: dict[str, Any], parse: Parse[Parsed]) -> Parse[Parsed]:
        """Return a function that checks a response to `body` and applies `parse` to its one choice."""

        def parse_response(content: Any) -> Parsed:
            (choice,) = content["choices"]
            if choice.get("prompt_token_ids") is None or choice.get("token_ids") is None:
                raise OpdctlError(
                    "unsupported_setting",
                    f"{self._url}: the server returns no token ids, and opdctl never tokenizes text again",
                    hint="use vLLM 0.10.2 or newer, without a gateway that drops fields",
                )
            if choice["prompt_token_ids"] != body["prompt"]:
                raise MalformedResponseError("the echoed prompt token ids differ from the request")
            return parse(choice)

        return parse_response

    def _find_served_model(self, served_name: str | None) -> tuple[str, int | None]:
        """Return the model's name at the server, and the maximum sequence length if the server reports it."""

        def parse(content: Any) -> dict[str, dict[str, Any]]:
            cards = [card for card in content["data"] if not card.get("parent")]  # adapters have a parent
            for card in cards:
                if type(card["id"]) is not str or type(card.get("max_model_len")) not in (int, type(None)):
                    raise MalformedResponseError(f"the model {card['id']} with {card.get('max_model_len')} tokens")
            return {card["id"]: card for card in cards}

        cards = self._client.get(f"{self._url}/models", parse)
        name = next(iter(cards)) if served_name is None and len(cards) == 1 else served_name
        if name is None or name not in cards:
            served = self._client.printable(", ".join(f"`{served}`" for served in sorted(cards))) or "none"
            problem = f"no model `{name}`" if name else "not exactly one model"
            raise OpdctlError(
                "missing_model",
                f"{self._url}: {problem}; served models: {served}",
                hint=f"set {self._key}.served_name to the name under which the server serves {self._model.path.name}",
            )
        return name, cards[name].get("max_model_len")

    def _check_length(self, prompt: int, response: int, longest: int) -> None:
        """Raise OpdctlError if the server cannot process a request, with the longest one of the recipe in the hint."""
        if self._max_model_len is not None and prompt + response > self._max_model_len:
            raise OpdctlError(
                "unsupported_setting",
                f"{self._url}: {prompt} + {response} tokens exceed the server's maximum of {self._max_model_len}",
                hint=f"start the server with --max-model-len {max(prompt + response, longest)} or more",
            )

    def _check_tokenizer(self) -> None:
        """Raise OpdctlError unless ids from the entire vocabulary are the same tokens at the server.

        How the server splits text does not matter: it receives ids.
        """
        tokenizer, vocab_size = self._model.tokenizer, self._model.vocab_size
        stride = max(1, vocab_size // TOKENIZER_SAMPLE_SIZE)
        url = self._url.removesuffix("/v1") + "/tokenize"
        for start in sorted({0, stride // 2}):
            text = tokenizer.decode(list(range(start, vocab_size, stride)))
            body = {"model": self._served_name, "prompt": text, "add_special_tokens": False, "return_token_strs": True}
            tokens = self._client.post(url, body, _parse_tokens, absent=MISSING_ENDPOINT_STATUSES)
            if tokens is None:
                console.warn(f"{url}: no such endpoint; the server's tokenizer is not checked")
                return
            for id_, token in tokens:
                if (own := tokenizer.convert_ids_to_tokens(id_)) != token:
                    raise OpdctlError(
                        "incompatible_tokenizer",
                        f"{self._url}: the server's tokenizer is not that of {self._model.path}: id {id_} is "
                        f"{self._client.printable(repr(token))} there, {own!r} here",
                        hint=f"serve the model that {self._key}.model names",
                    )


def _first_half(request: ScoreRequest) -> Ids:
    """Return the prompt and the first half of the response."""
    return np.concatenate([request.prompt_ids, request.response_ids[: len(request.response_ids) // 2]])


def _recipe_key(context: EngineContext) -> str:
    """Return the recipe's key of the model's settings."""
    name = next((name for name, model in context.recipe.models().items() if model is context.settings), "student")
    return model_key(name)


def _server_url(server: str | None, key: str) -> str:
    if server is None:
        raise OpdctlError(
            "invalid_recipe",
            f"{key}.server: required by the engine `server`, but not set",
            hint=f'set {key}.server to the server\'s address, such as "http://host:8000/v1"',
        )
    try:
        return str(httpx.URL(server)).rstrip("/")
    except httpx.InvalidURL as error:
        raise OpdctlError("invalid_recipe", f"{key}.server: {server}: {error}") from None


def _max_response_bytes(body: dict[str, Any], entries: int) -> int:
    """Return the maximum size of a completions response with this many most probable tokens at each position."""
    num_tokens = len(body["prompt"]) + body["max_tokens"]
    return MAX_RESPONSE_BYTES + num_tokens * (entries + 2) * MAX_ENTRY_BYTES


def _parse_tokens(content: Any) -> list[tuple[int, str]]:
    """Return ids and their tokens."""
    ids, tokens = _to_ids(content["tokens"]), content["token_strs"]
    if not set(map(type, tokens)) <= {str}:
        raise MalformedResponseError("tokens that are no strings")
    return list(zip(ids, tokens, strict=True))


def _to_ids(values: Sequence[Any]) -> list[int]:
    """Return the values if they are token ids: JSON integers that are not negative and have 32 bits."""
    if not set(map(type, values)) <= {int}:
        raise MalformedResponseError("token ids that are no integers")
    if values and not 0 <= min(values) <= max(values) < 2**31:
        raise MalformedResponseError("a token id below 0 or above 2^31")
    return list(values)


def _to_numbers(values: Iterable[Any]) -> Numbers:
    """Return JSON numbers as float64.

    Raises:
        MalformedResponseError: a value is of another type, as `false`, or beyond the range of float64.
    """
    listed = list(values)
    if not set(map(type, listed)) <= {int, float}:
        types = sorted({type(value).__name__ for value in listed} - {"int", "float"})
        raise MalformedResponseError(f"log-probs of the type {', '.join(types)}")
    try:
        return np.array(listed, np.float64)
    except OverflowError:
        raise MalformedResponseError("a log-prob beyond the range of float64") from None


def _to_logprobs(array: Numbers) -> Logprobs:
    """Return log-probs in nats as float32.

    Raises:
        MalformedResponseError: a value is not a finite, non-positive number.
    """
    is_valid = (array > VLLM_NEG_INF) & (array < MAX_LOGPROB)  # not of NaN
    if not is_valid.all():
        raise MalformedResponseError(f"invalid log-prob {array[~is_valid][0]}")
    return array.astype(np.float32)


def _parse_row(ids: Iterable[str], values: list[Any], vocab_size: int) -> TokenEntries:
    """Return the entries of one position without those of padding rows."""
    names = list(ids)
    numbers, digits = list(map(int, names)), "".join(names)
    if names and not (digits.isascii() and digits.isdecimal()):  # int() also reads " 1", "-1" and "1_0"
        raise MalformedResponseError("token ids that are not written as decimal numbers")
    if len(set(numbers)) < len(numbers):
        raise MalformedResponseError("a token id that occurs twice at one position")
    ids_E, logp_E = np.array(numbers, np.int64), _to_numbers(values)
    if ids_E.max(initial=0) < vocab_size:
        return ids_E, logp_E
    return ids_E[ids_E < vocab_size], logp_E[ids_E < vocab_size]


def _parse_top_k(rows: list[TokenEntries], top_k: int) -> tuple[Ids, Logprobs]:
    """Return ids and log-probs of each row's most probable tokens, [T, K].

    The server adds the token itself if it is not among the most probable.
    """
    ids_TK, logp_TK = np.zeros((len(rows), top_k), np.int32), np.zeros((len(rows), top_k))
    for (ids_E, logp_E), ids_K, logp_K in zip(rows, ids_TK, logp_TK, strict=True):
        if len(ids_E) < top_k:
            raise MalformedResponseError(f"{len(ids_E)} most probable tokens instead of {top_k}")
        order_K = np.lexsort((ids_E, -logp_E))[:top_k]
        ids_K[:], logp_K[:] = ids_E[order_K], logp_E[order_K]
    return ids_TK, _to_logprobs(logp_TK.ravel()).reshape(logp_TK.shape)


def _parse_completion(choice: Any, sampling: Sampling, end_ids: list[int], vocab_size: int, top_k: int) -> Completion:
    ids, reason, logprobs = _to_ids(choice["token_ids"]), choice["finish_reason"], choice["logprobs"]
    if logprobs["tokens"] != [f"token_id:{id_}" for id_ in ids] or len(logprobs["token_logprobs"]) != len(ids):
        raise MalformedResponseError(f"the log-probs do not belong to the {len(ids)} tokens of the response")
    is_ended = ids[-1] in end_ids or choice.get("stop_reason") in sampling.stop
    if not (is_ended if reason == "stop" else reason == "length" and len(ids) == sampling.max_tokens):
        raise MalformedResponseError(f"finish reason `{reason}` after {len(ids)} tokens, the last one {ids[-1]}")
    if max(ids) >= vocab_size:
        raise MalformedResponseError(f"the response contains id {max(ids)} despite its logit bias")
    top: dict[str, Any] = {}
    if top_k:
        rows = [
            _parse_row((name.removeprefix("token_id:") for name in row), list(row.values()), vocab_size)
            for _, row in zip(ids, logprobs["top_logprobs"], strict=True)
        ]
        top["top_ids"], top["top_logprobs"] = _parse_top_k(rows, top_k)
    return Completion(np.array(ids, np.int32), _to_logprobs(_to_numbers(logprobs["token_logprobs"])), reason, **top)


def _parse_scores(choice: Any, request: ScoreRequest, vocab_size: int, top_k: int) -> TokenScores:
    entries, prompt, response = choice["prompt_logprobs"], len(request.prompt_ids), len(request.response_ids)
    if len(entries) != prompt + response:
        raise MalformedResponseError(f"{len(entries)} log-probs for {prompt} + {response} tokens")
    scored = entries[prompt:]
    values = [row[str(id_)]["logprob"] for id_, row in zip(request.response_ids, scored, strict=True)]
    logprobs = _to_logprobs(_to_numbers(values))
    if not top_k:
        return TokenScores(logprobs)
    rows = [_parse_row(row, [entry["logprob"] for entry in row.values()], vocab_size) for row in scored]
    top_ids, top_logprobs = _parse_top_k(rows, top_k)
    return TokenScores(logprobs, top_ids=top_ids, top_logprobs=top_logprobs)


def _parse_last_probability(choice: Any, id_: int) -> float:
    """Return the probability of the prompt's last token."""
    (logprob,) = _to_numbers([choice["prompt_logprobs"][-1][str(id_)]["logprob"]])
    if math.isnan(logprob):
        raise MalformedResponseError("the log-prob nan")
    return math.exp(min(0.0, logprob))
