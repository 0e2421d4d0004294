"""JSON over HTTP to one server: how many requests at once, how often each is tried, and what a failure means.

It knows no API: whether an answer says what it should is for the `read` of each request to find out.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import tenacity

from opdctl import console
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.schema import Server

FIRST_PAUSE, MAX_BACKOFF_SECONDS = 1.0, 60.0  # seconds before the second attempt, and between later ones at most
SHOWN = 300  # characters of a server's own words
RESUME_HINT = "run the same command again to go on: finished parts are kept"
Made = TypeVar("Made")
Read = Callable[[Any], Made]


class MalformedResponseError(Exception):
    """An answer is not what it should be: once may be a fault on the way, twice is not."""


class _RetryableError(Exception):
    """Another attempt may help, `pause` seconds from now at the earliest."""

    def __init__(self, what: str, pause: float = 0.0):
        super().__init__(what)
        self.pause = pause


class Client:
    """Speaks to the server whose address is the recipe's `key`."""

    def __init__(self, key: str, settings: Server):
        self._key, self._settings = key, settings
        self._secret = os.environ.get(settings.api_key_env, "").strip()
        if not (self._secret.isascii() and self._secret.isprintable()):  # the HTTP library would print it as it fails
            raise OpdctlError(f"{settings.api_key_env}: this API key has characters that no HTTP header may have")
        self._told = False
        # One loop for the client's whole life, since open connections belong to the loop that they were opened in. In a
        # thread of its own: a signal's exception would else come up anywhere in its tasks, to be lost there or wrapped.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        many = settings.concurrency
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._secret}"} if self._secret else {},
            limits=httpx.Limits(max_connections=many, max_keepalive_connections=many),
            timeout=None,  # each attempt has a limit as a whole: httpx' own are for every read
        )

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Made]) -> Made:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _end(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}  # some are under way if a signal ended the wait for them
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._http.aclose()

    def get(self, url: str, read: Read[Made]) -> Made:
        return self._run(self._ask("GET", url, None, read))

    def post(self, url: str, body: Mapping[str, Any], read: Read[Made], absent: Sequence[int] = ()) -> Made | None:
        """Return what `read` makes of the answer, or None for a status in `absent`."""
        return self._run(self._ask("POST", url, body, read, absent))

    def post_all(
        self, url: str, asked: Iterable[tuple[Mapping[str, Any], Read[Made]]], advance: Callable[[int], None]
    ) -> list[Made]:
        """Post every body, `concurrency` at once; the first error ends all that are under way."""
        made: dict[int, Made] = {}
        left = enumerate(asked)

        async def work() -> None:
            for i, (body, read) in left:
                made[i] = await self._ask("POST", url, body, read)
                advance(1)

        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._settings.concurrency):
                    group.create_task(work())

        try:
            self._run(together())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [made[i] for i in range(len(made))]

    async def _ask(self, method: str, url: str, body: Any, read: Read[Any], absent: Sequence[int] = ()) -> Any:
        broken = ""
        for _ in range(2):
            response = await self._send(method, url, body)
            if response.status_code in absent:
                return None
            self._refuse(response, url)
            try:
                return read(response.json())
            except (MalformedResponseError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                broken = str(error) if isinstance(error, MalformedResponseError) else f"{type(error).__name__}: {error}"
        broken = self._shown(broken)
        raise OpdctlError(
            f"{url}: the server's answer is broken, twice over: {broken}", hint=RESUME_HINT, code=ExitCode.BAD_DATA
        )

    async def _send(self, method: str, url: str, body: Any) -> httpx.Response:
        """Return an answer that is worth reading, after as many attempts as it takes and the recipe allows."""

        def tell(state: tenacity.RetryCallState) -> None:
            if not self._told:  # one request's word is enough, until one gets through
                self._told = True
                console.warn(f"{url}: {_failure(state)}; trying again, {self._settings.max_retries} times at most")

        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_RetryableError),
            stop=tenacity.stop_after_attempt(1 + self._settings.max_retries),
            wait=_pause,
            before_sleep=tell,
            reraise=True,
        )
        try:
            response: httpx.Response = await again(self._once, method, url, body)
        except _RetryableError as error:
            what = f"no answer in {1 + self._settings.max_retries} attempts, at last: {error}"
            raise OpdctlError(f"{url}: {what}", hint=RESUME_HINT, code=ExitCode.UNAVAILABLE) from None
        self._told = False
        return response

    async def _once(self, method: str, url: str, body: Any) -> httpx.Response:
        limit = self._settings.timeout_seconds
        try:
            async with asyncio.timeout(limit):
                response = await self._http.request(method, url, json=body)
        except TimeoutError:
            raise _RetryableError(f"no answer within {limit:g} seconds") from None
        except httpx.RequestError as error:
            what = self._shown(str(error) or type(error).__name__)
            if "CERTIFICATE_VERIFY_FAILED" in what:
                hint = "for a certificate of your own, name its authority's file in SSL_CERT_FILE"
                raise OpdctlError(f"{url}: {what}", hint=hint, code=ExitCode.UNAVAILABLE) from None
            raise _RetryableError(what) from None
        status, asked = response.status_code, response.headers.get("retry-after", "")
        if status in (408, 429) or (status >= 500 and status != 501):
            pause = float(asked) if asked.isdecimal() else 0.0
            raise _RetryableError(self._status(response), min(pause, MAX_BACKOFF_SECONDS))
        return response

    def _refuse(self, response: httpx.Response, url: str) -> None:
        """Raise OpdctlError for a status that no further attempt will change."""
        status, variable = response.status_code, self._settings.api_key_env
        if response.is_success:
            return
        if status in (401, 403):  # without the server's own words: some of them repeat the key
            what = "the API key is refused" if self._secret else "the server wants an API key"
            raise OpdctlError(f"{url}: HTTP {status}: {what}", hint=f"put the right key into {variable}")
        elsewhere = status == 404 or response.is_redirect  # no redirect is followed: it would take the key along
        hint = f"is {self._key} the whole address of a vLLM server, such as http://host:8000/v1?" if elsewhere else None
        raise OpdctlError(f"{url}: {self._status(response)}", hint=hint)

    def _status(self, response: httpx.Response) -> str:
        """Return the status and the server's own words."""
        try:
            answer = response.json()
            error = answer.get("error", answer)
            words = error["message"] if isinstance(error, dict) and "message" in error else str(error)
        except (ValueError, AttributeError):
            words = response.text
        return f"HTTP {response.status_code}: {self._shown(words) or response.reason_phrase}"

    def _shown(self, text: str) -> str:
        """Return a server's words as one short line, without the key and without control characters."""
        text = text.replace(self._secret, "***") if self._secret else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SHOWN]


def _pause(state: tenacity.RetryCallState) -> float:
    """Twice as long each time, never the same for two requests, and after the time that the server asks for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.pause if isinstance(error, _RetryableError) else 0.0
    growing = tenacity.wait_exponential(multiplier=FIRST_PAUSE, max=MAX_BACKOFF_SECONDS) + tenacity.wait_random(
        0, FIRST_PAUSE
    )
    return asked + growing(state)


def _failure(state: tenacity.RetryCallState) -> str:
    return str(state.outcome.exception()) if state.outcome else ""
