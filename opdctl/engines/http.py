"""JSON over HTTP to one server: concurrency, retries, bounds, and the error that each failure means.

This module knows no API. The `parse` function of a request checks the content of the response. A server is not trusted:
a response has a maximum size, and its text is shown in one short line without any part of the API key.
"""

import base64
import contextlib
import itertools
import os
import random
import re
import socket
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx
from pydantic_core import from_json

from opdctl import console
from opdctl.engines.base import RESUME_HINT
from opdctl.errors import OpdctlError, summarize_exception
from opdctl.recipe.schema import Server

FIRST_RETRY_PAUSE_SECONDS = 1.0
MAX_RETRY_PAUSE_SECONDS = 60.0
CONNECT_TIMEOUT_SECONDS = 10.0  # a connection attempt is the one thing that cannot be interrupted
MAX_SERVER_MESSAGE_CHARS = 300
MAX_RESPONSE_BYTES = 2**22
"""Maximum size of a response, after decompression, unless the request allows more."""
MAX_ERROR_BYTES = 2**16  # more of the body of an error status is not read
MIN_COMMON_KEY_CHARS = 6
ESCAPE_PATTERN = re.compile(r"\\+(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|.)")
WITHHELD_MESSAGE = "a message that is not shown, because it contains a part of the API key"
Parsed = TypeVar("Parsed")
Parse = Callable[[Any], Parsed]


class MalformedResponseError(Exception):
    """The response is not as the API defines it. The request is repeated once, in case of a transport error."""


class _RetryableError(Exception):
    """The attempt failed, another one may succeed, `pause` seconds from now at the earliest."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Client:
    """A client of the server whose address is the recipe's `key`."""

    def __init__(self, key: str, settings: Server):
        self._key, self._settings = key, settings
        self._api_key = os.environ.get(settings.api_key_env, "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):  # httpx would print the key in its error
            raise OpdctlError(
                "invalid_usage",
                f"{settings.api_key_env}: the API key contains characters that an HTTP header cannot contain",
            )
        self._key_parts = _parts_of_key(self._api_key)
        self._warned, self._cancelled, self._lock = False, threading.Event(), threading.Lock()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        concurrency, limit = settings.concurrency, settings.timeout_seconds
        self._http = httpx.Client(
            headers={"Accept-Encoding": "gzip"}
            | ({"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            timeout=httpx.Timeout(limit, connect=min(limit, CONNECT_TIMEOUT_SECONDS)),
        )

    def close(self) -> None:
        self._http.close()

    def get(self, url: str, parse: Parse[Parsed]) -> Parsed:
        return self._request("GET", url, None, parse, MAX_RESPONSE_BYTES)

    def post(
        self, url: str, body: Mapping[str, Any], parse: Parse[Parsed], absent: Sequence[int] = ()
    ) -> Parsed | None:
        """Return the parsed response, or None for an HTTP status in `absent`."""
        return self._request("POST", url, body, parse, MAX_RESPONSE_BYTES, absent)

    def post_all(
        self, url: str, requests: Iterable[tuple[Mapping[str, Any], Parse[Parsed], int]]
    ) -> Generator[tuple[int, Parsed]]:
        """Post every body, `concurrency` at a time; yield the number and the parsed response of each as it arrives.

        requests: body, parser, and maximum size of the response in bytes. The first error, or a signal's exception in
        this thread, cancels all outstanding requests.
        """
        numbered = enumerate(requests)
        pending: dict[Future[Parsed], int] = {}
        with self._workers() as workers:
            while True:
                for index, request in itertools.islice(numbered, self._settings.concurrency - len(pending)):
                    pending[workers.submit(self._request, "POST", url, *request)] = index
                if not pending:
                    return
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield pending.pop(future), future.result()

    @contextlib.contextmanager
    def _workers(self) -> Iterator[ThreadPoolExecutor]:
        workers = ThreadPoolExecutor(self._settings.concurrency)
        try:
            yield workers
        except BaseException:
            self._cancelled.set()
            self._shut_down_connections()
            raise
        finally:
            workers.shutdown(cancel_futures=True)
            self._cancelled.clear()

    def _shut_down_connections(self) -> None:
        with self._lock:
            for connected in self._sockets:
                _shut_down(connected)

    def _track_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Record each new connection: shutting its socket down ends a read that waits in a worker."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connected = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connected)
                if self._cancelled.is_set():
                    _shut_down(connected)

    def _request(
        self, method: str, url: str, body: Any, parse: Parse[Any], max_bytes: int, absent: Sequence[int] = ()
    ) -> Any:
        reason = ""
        for _ in range(2):
            try:
                response = self._send(method, url, body, max_bytes)
                if response.status_code in absent:
                    return None
                self._check_status(response, url)
                return parse(_decode_json(response.content))
            except MalformedResponseError as error:
                reason = self.printable(str(error))
            except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
                reason = self.printable(f"{type(error).__name__}: {error}")
        raise OpdctlError("malformed_response", f"{url}: {reason} (after one retry)", hint=RESUME_HINT)

    def _send(self, method: str, url: str, body: Any, max_bytes: int) -> httpx.Response:
        """Return the first response that is not a temporary failure."""
        attempts = 1 + self._settings.max_retries
        for attempt in itertools.count(1):
            if self._cancelled.is_set():
                break
            try:
                response = self._attempt(method, url, body, max_bytes)
                self._warned = False
                return response
            except _RetryableError as error:
                if attempt == attempts:
                    reason = f"{url}: no response in {attempts} attempts; the last error: {error}"
                    raise OpdctlError("unavailable_server", reason, hint=RESUME_HINT) from None
                self._warn_once(f"{url}: {error}; retrying up to {self._settings.max_retries} times")
                self._cancelled.wait(error.pause + _retry_pause(attempt))
        raise CancelledError

    def _attempt(self, method: str, url: str, body: Any, max_bytes: int) -> httpx.Response:
        limit = self._settings.timeout_seconds
        deadline = time.monotonic() + limit
        # httpx limits each read: headers, interim responses and trailers may come without end.
        watchdog = threading.Timer(limit + min(limit, CONNECT_TIMEOUT_SECONDS), self._shut_down_connections)
        watchdog.daemon = True
        watchdog.start()
        try:
            with self._http.stream(method, url, json=body, extensions={"trace": self._track_socket}) as stream:
                content = _read_body(stream, deadline, max_bytes)
            retry_after = {"retry-after": stream.headers.get("retry-after", "")}
            response = httpx.Response(stream.status_code, headers=retry_after, content=content)
        except httpx.ConnectTimeout:
            raise _RetryableError("the connection attempt timed out") from None
        except httpx.RequestError as error:
            if isinstance(error, httpx.TimeoutException) or time.monotonic() > deadline:
                raise _RetryableError(f"no response within {limit:g} seconds") from None
            reason = self.printable(summarize_exception(error))
            if "CERTIFICATE_VERIFY_FAILED" in reason:
                hint = "set SSL_CERT_FILE to the certificate file of the server's private authority"
                raise OpdctlError("unavailable_server", f"{url}: {reason}", hint=hint) from None
            raise _RetryableError(reason) from None
        finally:
            watchdog.cancel()
        if response.status_code in (408, 429) or (response.status_code >= 500 and response.status_code != 501):
            retry_after = response.headers.get("retry-after", "")
            pause = float(retry_after) if retry_after.isdecimal() else 0.0
            raise _RetryableError(self._describe_status(response), min(pause, MAX_RETRY_PAUSE_SECONDS))
        return response

    def _warn_once(self, message: str) -> None:
        """Warn once per outage, although all concurrent requests fail."""
        with self._lock:
            warned, self._warned = self._warned, True
        if not (warned or self._cancelled.is_set()):
            console.warn(message)

    def _check_status(self, response: httpx.Response, url: str) -> None:
        """Raise OpdctlError for a status that a retry would not change."""
        status = response.status_code
        if response.is_success:
            return
        if status in (401, 403):  # without the server's message, which may contain the key
            reason = "the server rejects the API key" if self._api_key else "the server requires an API key"
            hint = f"set the environment variable {self._settings.api_key_env} to a valid key"
            raise OpdctlError("rejected_request", f"{url}: HTTP {status}: {reason}", hint=hint)
        address_hint = None
        if status == 404 or response.is_redirect:  # a redirect is not followed: it would leak the key
            address_hint = f"set {self._key} to the full address of a vLLM server, such as http://host:8000/v1"
        raise OpdctlError("rejected_request", f"{url}: {self._describe_status(response)}", hint=address_hint)

    def _describe_status(self, response: httpx.Response) -> str:
        """Return the status and the server's error message."""
        try:
            content = from_json(response.content)
            error = content.get("error", content)
            message = str(error["message"] if isinstance(error, dict) and "message" in error else error)
        except (ValueError, AttributeError):
            message = response.text
        return f"HTTP {response.status_code}: {self.printable(message) or response.reason_phrase}"

    def printable(self, text: str) -> str:
        """Return the server's text as one short line without control characters.

        If it has six characters in a row in common with the key, whatever their case and what is between them, none of
        it is returned.
        """
        readings = _letters_and_digits(text), _letters_and_digits(_unescape(text))
        if any(part in reading for part in self._key_parts for reading in readings):
            return WITHHELD_MESSAGE
        if self._api_key and self._api_key in text:  # shorter than six characters
            text = text.replace(self._api_key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_SERVER_MESSAGE_CHARS]


def _read_body(stream: httpx.Response, deadline: float, max_bytes: int) -> bytes:
    """Read a response piece by piece, of an error status its start.

    Raises:
        MalformedResponseError: it has more than `max_bytes` after decompression.
        httpx.ReadTimeout: it does not end before `deadline`.
    """
    encoding = stream.headers.get("content-encoding", "identity")
    is_success = stream.is_success
    if encoding not in ("identity", "gzip") and is_success:
        raise MalformedResponseError(f"the content encoding {encoding}, which was not requested")
    most = max_bytes if is_success else MAX_ERROR_BYTES
    gzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
    content = bytearray()
    try:
        for chunk in stream.iter_raw():
            # A small chunk may inflate a thousandfold.
            content += gzip.decompress(chunk, most + 1 - len(content)) if encoding == "gzip" else chunk
            if len(content) > most:
                break
            if time.monotonic() > deadline:  # httpx limits each read, not their sum
                raise httpx.ReadTimeout("")
    except zlib.error as error:
        raise MalformedResponseError(f"not gzip: {error}") from None
    if is_success and len(content) > most:
        raise MalformedResponseError(f"more than {most:,} bytes, although the request allows no longer response")
    return bytes(content[:most])


def _parts_of_key(key: str) -> set[str]:
    """Return what no text that is shown contains: all runs of six characters of the key and of its usual encodings."""
    data = key.encode()
    forms = [key, key[::-1], data.hex(), *(base64.b64encode(data[start:]).decode() for start in range(3))]
    texts = map(_letters_and_digits, forms)
    return {
        text[start : start + MIN_COMMON_KEY_CHARS]
        for text in texts
        for start in range(len(text) - MIN_COMMON_KEY_CHARS + 1)
    }


def _unescape(text: str) -> str:
    """Return the text without the escapes of Python and JSON, in which an error may quote it."""
    return ESCAPE_PATTERN.sub(lambda escape: chr(int(escape[1] or escape[2] or "20", 16)), text)


def _letters_and_digits(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def _decode_json(content: bytes) -> Any:
    """Decode a response. The standard library takes 1.5 times as long: one with top-k log-probs has tens of MB."""
    try:
        return from_json(content, cache_strings="keys")
    except ValueError as error:
        raise MalformedResponseError(f"not JSON: {error}") from error


def _shut_down(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already closed
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # an SSLSocket's method would drop its state


def _retry_pause(attempt: int) -> float:
    """Return exponentially growing seconds, with jitter so that concurrent requests do not retry together."""
    growing = FIRST_RETRY_PAUSE_SECONDS * 2 ** min(attempt - 1, 30)
    return min(growing, MAX_RETRY_PAUSE_SECONDS) + random.uniform(0, FIRST_RETRY_PAUSE_SECONDS)
