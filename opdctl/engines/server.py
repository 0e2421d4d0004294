"""The engine for a vLLM server that runs elsewhere: its completions API, in token ids only.

Of the model it knows the tokenizer and nothing else: which weights the server holds, and whether its log-probs at a
temperature other than 1 are raw or processed, cannot be seen from outside. What it cannot see it checks as far as it
can: name, tokenizer, context length, and every answer's form. The server's distribution is over all rows of the output
matrix, the few beyond the tokenizer's ids included.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import httpx
import numpy as np

from opdctl import console
from opdctl.artifacts.records import Ids, Logprobs, TokenScores
from opdctl.engines.base import Completion, EngineContext, Request, ScoreRequest
from opdctl.engines.http import Client, MalformedResponseError, Read
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, find_local
from opdctl.recipe.schema import Sampling, Score, model_key

VLLM_NEG_INF = -9999.0  # what vLLM writes for minus infinity, which JSON lacks


# Each of these the server would else take from the model's generation config.
NEUTRAL_SAMPLING_PARAMS = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "top_k": 0,
    "min_p": 0.0,
}
NO_ENDPOINT = (404, 405, 501)
Made = TypeVar("Made")


class ServerEngine:
    """Generates and scores with the model of one server, many requests at once."""

    def __init__(self, model: ModelDir, place: EngineContext):
        self._model, self._settings, self._key = model, place.settings, _own_key(place)
        self._url = _address(place.settings.server, self._key)
        self.load_weights(model)
        self._client = Client(f"{self._key}.server", place.recipe.server)
        try:
            self._name, self._longest = self._served(place.settings.served_name)
            self._check_tokenizer()
        except BaseException:
            self.close()
            raise
        kind = "processed" if _is_unmodified(place.recipe.rollout) else "raw or processed, as the server was started"
        self.logprob_metadata = {"engine": "server", "dtype": model.dtype, "logprobs": f"{kind}, float32, nats"}

    def load_weights(self, model: ModelDir) -> None:
        """Take the directory if it is the recipe's own: a server keeps the weights that it was started with.

        Raises OpdctlError for any other, such as a student in training, or one that `eval` is given.
        """
        in_hub_cache = f"models--{self._settings.model.replace('/', '--')}"
        if model.path != find_local(self._settings, f"{self._key}.model") and in_hub_cache not in model.path.parts:
            raise OpdctlError(
                f"{self._url}: a server keeps the weights it was started with, so it cannot become {model.path}",
                hint='set rollout.engine = "vllm" or "transformers" to draw with this model',
            )

    def close(self) -> None:
        self._client.close()

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
        if entropy:
            raise OpdctlError("a server gives no entropies", hint='set rollout.engine = "transformers"')
        if top_k and not _is_unmodified(sampling):
            raise OpdctlError(
                "at a temperature or top-p other than 1 a server's most probable tokens are of unknown kind",
                hint='set rollout.engine = "transformers"',
            )
        self._check_length(max((len(request.prompt_ids) for request in requests), default=0), sampling.max_tokens)
        eos_ids = list(self._model.eos_ids)
        read = partial(_read_completion, sampling=sampling, eos_ids=eos_ids, top_k=top_k)

        def asked() -> Iterator[tuple[dict[str, Any], Read[Completion]]]:
            for request in requests:
                own = {"seed": request.seed, "logprobs": top_k, "stop_token_ids": eos_ids}
                body = self._body(request.prompt_ids, sampling) | own
                yield body, self._reader(body, read)

        return self._client.post_all(f"{self._url}/completions", asked(), advance)

    def score(
        self, answered: Sequence[ScoreRequest], settings: Score, advance: Callable[[int], None]
    ) -> list[TokenScores]:
        for name in ("entropy", "student_top_k", "hidden_states"):
            if getattr(settings, name):
                raise OpdctlError(
                    f"score.{name}: a server does not give it; weight or objective need it, or the recipe asks for it",
                    hint='set score.engine = "transformers"',
                )
        lengths = [len(each.prompt_ids) + len(each.response_ids) for each in answered]
        self._check_length(max(lengths, default=0), 1)

        def asked() -> Iterator[tuple[dict[str, Any], Read[TokenScores]]]:
            for each in answered:
                ids = np.concatenate([each.prompt_ids, each.response_ids])
                body = self._body(ids, Sampling(max_tokens=1)) | {"prompt_logprobs": settings.top_k}
                yield body, self._reader(body, partial(_read_scores, each=each, top_k=settings.top_k))

        return self._client.post_all(f"{self._url}/completions", asked(), advance)

    def _body(self, ids: Ids, sampling: Sampling) -> dict[str, Any]:
        return NEUTRAL_SAMPLING_PARAMS | {
            "model": self._name,
            "prompt": ids.tolist(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _reader(self, body: dict[str, Any], read: Read[Made]) -> Read[Made]:
        """Return `read` for the one choice of an answer to `body`, once that answer is known to be to these ids."""

        def of_answer(answer: Any) -> Made:
            (choice,) = answer["choices"]
            if choice.get("prompt_token_ids") is None or choice.get("token_ids") is None:
                raise OpdctlError(
                    f"{self._url}: the server returns no token ids, and text is never tokenised again",
                    hint="serve with a vLLM that knows `return_token_ids` (0.10.2 or newer), without a gateway that "
                    "drops fields",
                )
            if choice["prompt_token_ids"] != body["prompt"]:
                raise MalformedResponseError("it read other prompt tokens than those sent")
            return read(choice)

        return of_answer

    def _served(self, wanted: str | None) -> tuple[str, int | None]:
        """Return the model's name at the server and the longest sequence that it takes, if the server says."""

        def read(answer: Any) -> dict[str, dict[str, Any]]:
            return {card["id"]: card for card in answer["data"] if not card.get("parent")}  # those are adapters

        cards = self._client.get(f"{self._url}/models", read)
        name = next(iter(cards)) if wanted is None and len(cards) == 1 else wanted
        if name is None or name not in cards:
            served = ", ".join(f"`{each}`" for each in sorted(cards)) or "nothing"
            asked = f"no model `{name}`" if name else "no single model"
            raise OpdctlError(
                f"{self._url}: {asked}; it serves {served}",
                hint=f"set {self._key}.served_name to the name under which the server serves {self._model.path.name}",
            )
        return name, cards[name].get("max_model_len")

    def _check_length(self, prompt: int, response: int) -> None:
        if self._longest is not None and prompt + response > self._longest:
            raise OpdctlError(
                f"{self._url}: the server takes {self._longest} tokens, but {prompt} + {response} are needed",
                hint=f"start it with --max-model-len {prompt + response} or more",
            )

    def _check_tokenizer(self) -> None:
        """Raise OpdctlError unless the server makes the same ids of texts with tokens from the whole vocabulary."""
        stride = max(1, self._model.vocab_size // 128)
        url = self._url.removesuffix("/v1") + "/tokenize"
        for start in sorted({0, stride // 2}):
            text = self._model.tokenizer.decode(list(range(start, self._model.vocab_size, stride)))
            body = {"model": self._name, "prompt": text, "add_special_tokens": False}
            theirs = self._client.post(url, body, lambda answer: list(answer["tokens"]), NO_ENDPOINT)
            if theirs is None:
                console.warn(f"{url}: there is no such endpoint: whether the server's tokenizer fits is not checked")
                return
            ours = self._model.tokenizer.encode(text, add_special_tokens=False)
            if ours != theirs:
                raise OpdctlError(
                    f"{self._url}: the server's tokenizer is not that of {self._model.path}: of {text[:40]!r} "
                    f"it makes {theirs[:8]} …, not {ours[:8]} …",
                    hint=f"serve the very model that {self._key}.model names",
                )


def _own_key(place: EngineContext) -> str:
    """Return the recipe's key of the model's settings."""
    name = next((name for name, model in place.recipe.models().items() if model is place.settings), "student")
    return model_key(name)


def _address(server: str | None, key: str) -> str:
    if server is None:
        raise OpdctlError(
            f"{key}.server is not set, and the engine `server` needs it",
            hint=f'set {key}.server to the server\'s address, such as "http://host:8000/v1"',
        )
    try:
        return str(httpx.URL(server)).rstrip("/")
    except httpx.InvalidURL as error:
        raise OpdctlError(f"{key}.server: {server}: {error}") from None


def _is_unmodified(sampling: Sampling) -> bool:
    """Whether raw and processed log-probs are the same."""
    return sampling.temperature == 1 and sampling.top_p == 1


def _checked(values: list[Any]) -> Logprobs:
    """Return log-probs as float32. Raises BrokenError for any that is none."""
    for value in values:
        if not (isinstance(value, (int, float)) and math.isfinite(value) and VLLM_NEG_INF < value < 1e-3):
            raise MalformedResponseError(f"a log-prob is {value!r}")
    return np.array(values, np.float32)


def _top(entries: dict[int, float], k: int) -> list[tuple[int, float]]:
    """Return the k most probable; the server adds the token itself to them where it is not one of them."""
    if len(entries) < k:
        raise MalformedResponseError(f"{len(entries)} most probable tokens, not {k}")
    return sorted(entries.items(), key=lambda entry: (-entry[1], entry[0]))[:k]


def _tops(rows: list[dict[int, float]], k: int) -> tuple[Ids, Logprobs]:
    """Return ids and log-probs of each row's k most probable tokens, [T, K]."""
    kept = [_top(row, k) for row in rows]
    ids = np.array([[id_ for id_, _ in row] for row in kept], np.int32).reshape(len(rows), k)
    return ids, _checked([value for row in kept for _, value in row]).reshape(len(rows), k)


def _read_completion(choice: Any, sampling: Sampling, eos_ids: list[int], top_k: int) -> Completion:
    ids, reason, said = choice["token_ids"], choice["finish_reason"], choice["logprobs"]
    if said["tokens"] != [f"token_id:{id_}" for id_ in ids] or len(said["token_logprobs"]) != len(ids):
        raise MalformedResponseError(f"its log-probs are not those of its {len(ids)} tokens")
    if not (ids[-1] in eos_ids if reason == "stop" else reason == "length" and len(ids) == sampling.max_tokens):
        raise MalformedResponseError(f"the response ends for `{reason}` with token {ids[-1]} after {len(ids)} tokens")
    found: dict[str, Any] = {}
    if top_k:
        rows = [{int(k.removeprefix("token_id:")): v for k, v in row.items()} for row in said["top_logprobs"]]
        found["top_ids"], found["top_logprobs"] = _tops(rows, top_k)
    return Completion(np.array(ids, np.int32), _checked(said["token_logprobs"]), reason, **found)


def _read_scores(choice: Any, each: ScoreRequest, top_k: int) -> TokenScores:
    entries = choice["prompt_logprobs"]
    if len(entries) != len(each.prompt_ids) + len(each.response_ids):
        raise MalformedResponseError(
            f"{len(entries)} log-probs of {len(each.prompt_ids)} + {len(each.response_ids)} tokens"
        )
    rows = [{int(k): v["logprob"] for k, v in row.items()} for row in entries[len(each.prompt_ids) :]]
    logprobs = _checked([row[int(id_)] for id_, row in zip(each.response_ids, rows, strict=True)])
    if not top_k:
        return TokenScores(logprobs)
    top_ids, top_logprobs = _tops(rows, top_k)
    return TokenScores(logprobs, top_ids=top_ids, top_logprobs=top_logprobs)
