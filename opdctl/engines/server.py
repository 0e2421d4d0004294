"""The engine for a vLLM server that runs elsewhere: requests over HTTP, and everything that can go wrong with them.

It knows vLLM's completions API and speaks token ids only. Of the model it knows the tokenizer and nothing else: which
weights the server holds, and whether its log-probs at a temperature other than 1 are raw or processed, cannot be seen
from outside. What it cannot see it checks as far as it can: name, tokenizer, context length, and every answer's form.
The server's distribution is over all rows of the output matrix, the few beyond the tokenizer's ids included.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar

import httpx
import numpy as np
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity import wait_exponential_jitter as growing

from opdctl import log
from opdctl.config import Sampling, Score, model_key
from opdctl.engines import Answered, Completion, Place, Request
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.model import ModelDir
from opdctl.records import Ids, Logprobs, Scores

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second attempt, and between later ones at most
IMPOSSIBLE = -9999.0  # what vLLM writes for minus infinity, which JSON lacks
# Each of these the server would else take from the model's generation config.
PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": 0, "min_p": 0.0}
GO_ON = "run the same command again to go on: finished parts are kept"
NO_ENDPOINT = (404, 405, 501)

Item, Made = TypeVar("Item"), TypeVar("Made")


class _Again(Exception):
    """Another attempt may help; not before `asked` seconds have passed, if the server asks for that."""

    def __init__(self, what: str, asked: float = 0.0):
        super().__init__(what)
        self.asked = asked


class _Broken(Exception):
    """The answer is complete and yet not what it should be: once may be a fault of the transfer, twice is not."""


class ServerEngine:
    """Generates and scores with the model of one server, many requests at once."""

    def __init__(self, model: ModelDir, place: Place):
        self._model, self._settings, self._key = model, place.recipe.server, _own_key(place)
        self._url = _address(place.settings.server, self._key)
        self._secret = os.environ.get(self._settings.api_key_env, "").strip()
        if not (self._secret.isascii() and self._secret.isprintable()):  # the HTTP library would print it as it fails
            raise OpdctlError(f"{self._settings.api_key_env}: this API key has characters that no HTTP header may have")
        # One loop for the engine's whole life: open connections belong to the loop that they were opened in.
        self._loop = asyncio.Runner()
        many = self._settings.concurrency
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._secret}"} if self._secret else {},
            limits=httpx.Limits(max_connections=many, max_keepalive_connections=many),
            timeout=None,  # a limit a request is set in _once: httpx' own are for each read
        )
        self._waiting = False
        try:
            self._name, self._longest = self._served(place.settings.served_name)
            self._check_tokenizer()
        except BaseException:
            self.close()
            raise
        rollout = place.recipe.rollout
        kind = "processed" if _is_plain(rollout) else "raw or processed, as the server was started"
        self.meaning = {"engine": "server", "dtype": model.dtype, "logprobs": f"{kind}, float32, nats"}

    def load_weights(self, model: ModelDir) -> None:
        """Take the directory if it is the same model. Raises OpdctlError for any other."""
        if model.path != self._model.path and model.digest() != self._model.digest():
            raise OpdctlError(
                f"{self._url}: a server keeps the weights it was started with, so it cannot become {model.path}",
                hint="rollouts of a student in training need an engine of their own: "
                'rollout.engine = "vllm" or "transformers"',
            )

    def close(self) -> None:
        self._loop.run(self._client.aclose())
        self._loop.close()

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
        if top_k and not _is_plain(sampling):
            raise OpdctlError(
                "at a temperature or top-p other than 1 a server's most probable tokens are of unknown kind",
                hint='set rollout.engine = "transformers"',
            )
        self._check_length(max((len(request.prompt_ids) for request in requests), default=0), sampling.max_tokens)
        eos_ids = list(self._model.eos_ids)

        async def answer(request: Request) -> Completion:
            body = self._body(request.prompt_ids, sampling) | {
                "seed": request.seed,
                "logprobs": top_k,
                "stop_token_ids": eos_ids,
            }
            return await self._completion(body, lambda choice: _read_completion(choice, sampling, eos_ids, top_k))

        return self._loop.run(self._all(requests, answer, advance))

    def score(self, answered: Sequence[Answered], settings: Score, advance: Callable[[int], None]) -> list[Scores]:
        for name in ("entropy", "student_top_k", "hidden_states"):
            if getattr(settings, name):
                raise OpdctlError(
                    f"score.{name}: a server does not give it; weight or objective need it, or the recipe asks for it",
                    hint='set score.engine = "transformers"',
                )
        lengths = [len(each.prompt_ids) + len(each.response_ids) for each in answered]
        self._check_length(max(lengths, default=0), 1)

        async def read(each: Answered) -> Scores:
            ids = np.concatenate([each.prompt_ids, each.response_ids])
            body = self._body(ids, Sampling(max_tokens=1)) | {"prompt_logprobs": settings.top_k}
            return await self._completion(body, lambda choice: _read_scores(choice, each, settings.top_k))

        return self._loop.run(self._all(answered, read, advance))

    def _body(self, ids: Ids, sampling: Sampling) -> dict[str, Any]:
        return PLAIN | {
            "model": self._name,
            "prompt": ids.tolist(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }

    async def _all(
        self, items: Sequence[Item], ask: Callable[[Item], Awaitable[Made]], advance: Callable[[int], None]
    ) -> list[Made]:
        """Ask for every item, `concurrency` at once; the first error ends all that are under way."""
        made: list[Any] = [None] * len(items)
        left = iter(enumerate(items))

        async def work() -> None:
            for i, item in left:
                made[i] = await ask(item)
                advance(1)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._settings.concurrency, len(items))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return made

    async def _completion(self, body: dict[str, Any], read: Callable[[Any], Made]) -> Made:
        def choice(answer: Any) -> Made:
            (only,) = answer["choices"]
            sent, got = body["prompt"], only.get("prompt_token_ids")
            if got is None or only["token_ids"] is None:
                raise OpdctlError(
                    f"{self._url}: the server returns no token ids, and text is never tokenised again",
                    hint="serve with a vLLM that knows `return_token_ids` (0.10.2 or newer), without a gateway that "
                    "drops fields",
                )
            if got != sent:
                raise _Broken(f"it read {len(got)} prompt tokens that are not the {len(sent)} sent")
            return read(only)

        return await self._ask("POST", f"{self._url}/completions", body, choice)

    def _served(self, wanted: str | None) -> tuple[str, int | None]:
        """Return the model's name at the server and the longest sequence that it takes, if the server says."""

        def read(answer: Any) -> dict[str, dict[str, Any]]:
            return {card["id"]: card for card in answer["data"] if not card.get("parent")}  # those are adapters

        cards = self._loop.run(self._ask("GET", f"{self._url}/models", None, read))
        if wanted is None and len(cards) == 1:
            wanted = next(iter(cards))
        if wanted not in cards:
            served = ", ".join(f"`{name}`" for name in sorted(cards)) or "nothing"
            asked = f"no model `{wanted}`{did_you_mean(wanted, cards)}" if wanted else "no single model"
            raise OpdctlError(
                f"{self._url}: {asked}; it serves {served}",
                hint=f"set {self._key}.served_name to the name under which the server serves {self._model.path.name}",
            )
        return wanted, cards[wanted].get("max_model_len")

    def _check_length(self, prompt: int, response: int) -> None:
        if self._longest is not None and prompt + response > self._longest:
            raise OpdctlError(
                f"{self._url}: the server takes {self._longest} tokens, but {prompt} + {response} are needed",
                hint=f"start it with --max-model-len {prompt + response} or more",
            )

    def _check_tokenizer(self) -> None:
        """Raise OpdctlError unless the server makes the same ids of a few texts."""
        url = self._url.removesuffix("/v1") + "/tokenize"
        for text in _probes(self._model):
            body = {"model": self._name, "prompt": text, "add_special_tokens": False}
            theirs = self._loop.run(self._ask("POST", url, body, lambda answer: list(answer["tokens"]), NO_ENDPOINT))
            if theirs is None:
                log.warn(f"{url}: there is no such endpoint: whether the server's tokenizer fits is not checked")
                return
            ours = self._model.tokenizer.encode(text, add_special_tokens=False)
            if ours != theirs:
                raise OpdctlError(
                    f"{self._url}: the server's tokenizer is not that of {self._model.path}: of {text[:40]!r} it makes "
                    f"{theirs[:8]} …, not {ours[:8]} …",
                    hint=f"serve the very model that {self._key}.model names",
                )

    async def _ask(
        self, method: str, url: str, body: Any, read: Callable[[Any], Made], none_for: Sequence[int] = ()
    ) -> Any:
        """Return what `read` makes of the answer, or None for a status in `none_for`."""
        broken = ""
        for _ in range(2):
            response = await self._send(method, url, body)
            if response.status_code in none_for:
                return None
            self._refuse(response, url)
            try:
                return read(response.json())
            except (_Broken, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                broken = str(error) if isinstance(error, _Broken) else f"{type(error).__name__}: {error}"
        raise OpdctlError(
            f"{url}: the server's answer is broken, twice over: {_shown(broken)}", hint=GO_ON, code=ExitCode.DATA
        )

    async def _send(self, method: str, url: str, body: Any) -> httpx.Response:
        """Return an answer that is worth reading, after as many attempts as it takes and the recipe allows."""

        def tell(state: RetryCallState) -> None:
            if not self._waiting:  # one request's word is enough
                self._waiting = True
                log.warn(f"{url}: {_failure(state)}; trying again, {self._settings.retries} times at most")

        again = AsyncRetrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(1 + self._settings.retries),
            wait=_pause,
            before_sleep=tell,
            reraise=True,
        )
        try:
            response = await again(self._once, method, url, body)
        except _Again as error:
            what = f"no answer in {1 + self._settings.retries} attempts, at last: {error}"
            raise OpdctlError(f"{url}: {what}", hint=GO_ON, code=ExitCode.REACH) from None
        self._waiting = False
        return response

    async def _once(self, method: str, url: str, body: Any) -> httpx.Response:
        limit = self._settings.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                response = await self._client.request(method, url, json=body)
        except TimeoutError:
            raise _Again(f"no answer within {limit:g} seconds") from None
        except httpx.RequestError as error:
            what = self._hidden(f"{error}" or type(error).__name__)
            if "CERTIFICATE_VERIFY_FAILED" in what:
                hint = "for a certificate of your own, name its authority's file in SSL_CERT_FILE"
                raise OpdctlError(f"{url}: {what}", hint=hint, code=ExitCode.REACH) from None
            raise _Again(what) from None
        status = response.status_code
        if status in (408, 429) or (status >= 500 and status != 501):
            asked = _retry_after(response)
            what = f"HTTP {status}: {self._reason(response)}"
            if asked > limit:
                what = f"{url}: {what}; it asks to come back in {asked:.0f} seconds"
                raise OpdctlError(what, hint=GO_ON, code=ExitCode.REACH)
            raise _Again(what, asked)
        return response

    def _refuse(self, response: httpx.Response, url: str) -> None:
        """Raise OpdctlError for a status that no further attempt will change."""
        status, variable = response.status_code, self._settings.api_key_env
        if response.is_success:
            return
        if status in (401, 403):  # without the server's own words: some of them repeat the key
            state = "its API key is refused" if self._secret else "the server wants an API key"
            raise OpdctlError(f"{url}: HTTP {status}: {state}", hint=f"put the right key into {variable}")
        what = f"{url}: HTTP {status}: {self._reason(response)}"
        if status == 404:
            raise OpdctlError(what, hint=f"is {self._key}.server the whole address, such as http://host:8000/v1?")
        if response.is_redirect:
            raise OpdctlError(what, hint=f"redirects are not followed: set {self._key}.server to where it leads")
        long = any(word in what for word in ("context length", "max_model_len", "max-model-len"))
        raise OpdctlError(what, hint="start the server with a greater --max-model-len" if long else None)

    def _reason(self, response: httpx.Response) -> str:
        """Return the server's own words."""
        try:
            answer = response.json()
            error = answer.get("error", answer)
            text = error["message"] if isinstance(error, dict) and "message" in error else str(error)
        except (ValueError, AttributeError):
            text = response.text
        return _shown(self._hidden(str(text))) or response.reason_phrase

    def _hidden(self, text: str) -> str:
        return text.replace(self._secret, "***") if self._secret else text


def _own_key(place: Place) -> str:
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
        parsed = httpx.URL(server)
    except httpx.InvalidURL as error:
        raise OpdctlError(f"{key}.server: no address: {error}") from None
    if parsed.userinfo or parsed.query:  # both would be shown and stored with the recipe
        raise OpdctlError(f"{key}.server: an address has no password or query in it", hint="see server.api_key_env")
    return str(parsed).rstrip("/")


def _is_plain(sampling: Sampling) -> bool:
    """Whether raw and processed log-probs are the same."""
    return sampling.temperature == 1 and sampling.top_p == 1


def _probes(model: ModelDir) -> list[str]:
    """Return texts made of tokens from the whole vocabulary: another tokenizer cuts or numbers them differently."""
    stride = max(1, model.vocab_size // 128)
    return [model.tokenizer.decode(list(range(start, model.vocab_size, stride))) for start in {0, stride // 2}]


def _pause(state: RetryCallState) -> float:
    """Twice as long each time, never the same for two requests, and what the server asks for besides."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.asked if isinstance(error, _Again) else 0.0
    return asked + growing(initial=FIRST_PAUSE, max=LONGEST_PAUSE, jitter=FIRST_PAUSE)(state)


def _failure(state: RetryCallState) -> str:
    return str(state.outcome.exception()) if state.outcome else ""


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds that the server asks to wait, given as a number or as a date."""
    given = response.headers.get("retry-after", "")
    try:
        return float(given) if given.isdigit() else max(0.0, parsedate_to_datetime(given).timestamp() - time())
    except (ValueError, TypeError):
        return 0.0


def _shown(text: str) -> str:
    """Return a stranger's text as one short line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def _checked(values: list[Any]) -> Logprobs:
    """Return log-probs as float32. Raises _Broken for any that is none."""
    for value in values:
        if not (isinstance(value, (int, float)) and math.isfinite(value) and IMPOSSIBLE < value < 1e-3):
            raise _Broken(f"a log-prob is {value!r}")
    return np.array(values, np.float32)


def _top(entries: dict[int, float], k: int) -> list[tuple[int, float]]:
    """Return the k most probable; the server adds the token itself to them where it is not one of them."""
    if len(entries) < k:
        raise _Broken(f"{len(entries)} most probable tokens, not {k}")
    return sorted(entries.items(), key=lambda entry: (-entry[1], entry[0]))[:k]


def _tops(rows: list[dict[int, float]], k: int) -> tuple[Ids, Logprobs]:
    """Return ids and log-probs of each row's k most probable tokens, [T, K]."""
    kept = [_top(row, k) for row in rows]
    ids = np.array([[id_ for id_, _ in row] for row in kept], np.int32).reshape(len(rows), k)
    return ids, _checked([value for row in kept for _, value in row]).reshape(len(rows), k)


def _read_completion(choice: Any, sampling: Sampling, eos_ids: list[int], top_k: int) -> Completion:
    ids, reason, said = choice["token_ids"], choice["finish_reason"], choice["logprobs"]
    if len(said["token_logprobs"]) != len(ids) or not ids:
        raise _Broken(f"{len(said['token_logprobs'])} log-probs of {len(ids)} tokens")
    if not (ids[-1] in eos_ids if reason == "stop" else reason == "length" and len(ids) == sampling.max_tokens):
        raise _Broken(f"the response ends for `{reason}` with token {ids[-1]} after {len(ids)} tokens")
    found: dict[str, Any] = {}
    if top_k:
        rows = [{int(k.removeprefix("token_id:")): v for k, v in row.items()} for row in said["top_logprobs"]]
        found["top_ids"], found["top_logprobs"] = _tops(rows, top_k)
    return Completion(np.array(ids, np.int32), _checked(said["token_logprobs"]), reason, **found)


def _read_scores(choice: Any, each: Answered, top_k: int) -> Scores:
    entries = choice["prompt_logprobs"]
    if len(entries) != len(each.prompt_ids) + len(each.response_ids):
        raise _Broken(f"{len(entries)} log-probs of {len(each.prompt_ids)} + {len(each.response_ids)} tokens")
    rows = [{int(k): v["logprob"] for k, v in row.items()} for row in entries[len(each.prompt_ids) :]]
    logprobs = _checked([row[int(id_)] for id_, row in zip(each.response_ids, rows, strict=True)])
    if not top_k:
        return Scores(logprobs)
    top_ids, top_logprobs = _tops(rows, top_k)
    return Scores(logprobs, top_ids=top_ids, top_logprobs=top_logprobs)
