"""The HTTP client: concurrency, retries, errors and cancellation, with a local server."""

import base64
import contextlib
import gzip
import itertools
import json
import signal
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.servers import KEY, Answer, Proxy, Received, drop

from opdctl import console
from opdctl.engines import http
from opdctl.engines.http import Client, MalformedResponseError
from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Server


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(http, "MAX_RETRY_PAUSE_SECONDS", 2.0)
    monkeypatch.setenv("OPDCTL_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[Proxy]:
    server = Proxy()
    server.set(echo)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(console, "warn", messages.append)
    return messages


def echo(received: Received) -> Answer:
    return Answer(200, received.body or b"{}")


def client(**settings: Any) -> Client:
    return Client("teacher.server", Server(**{"max_retries": 2, "timeout_seconds": 5.0} | settings))


def in_order(connection: Client, server: Proxy, requests: Any, on_progress=lambda n: None) -> list[int]:
    """Post requests and return their results in order."""
    results = {}
    for number, result in connection.post_all(server.url, requests):
        results[number] = result
        on_progress(1)
    return [results[number] for number in range(len(results))]


def post_all(server: Proxy, count: int, on_progress=lambda n: None, **settings: Any) -> list[int]:
    """Post the numbers up to `count` and return those in the responses."""
    requests = (({"number": number}, lambda content: content["number"], 1000) for number in range(count))
    connection = client(**settings)
    try:
        return in_order(connection, server, requests, on_progress)
    finally:
        connection.close()


def get(server: Proxy, parse=lambda content: content, **settings: Any) -> Any:
    connection = client(**settings)
    try:
        return connection.get(server.url, parse)
    finally:
        connection.close()


def failure(server: Proxy, parse=lambda content: content, **settings: Any) -> OpdctlError:
    """Return the error of one request, which must name the address and not the key."""
    with pytest.raises(OpdctlError) as error:
        get(server, parse, **settings)
    assert server.url in error.value.message
    assert KEY not in error.value.message
    return error.value


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


# ── Concurrency ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_keep_the_order_of_requests(server):
    def reversed_latency(received: Received) -> Answer:
        time.sleep(0.02 * (4 - json.loads(received.body)["number"] % 4))
        return echo(received)

    server.set(reversed_latency)
    progress: list[int] = []
    assert post_all(server, 16, progress.append, concurrency=4) == list(range(16))
    assert sum(progress) == 16
    assert server.most == 4


def test_no_requests_give_no_results(server):
    assert post_all(server, 0) == []


def test_requests_are_built_as_they_are_sent(server):
    built: list[int] = []

    def requests() -> Iterator[tuple[dict[str, int], Any, int]]:
        for number in range(20):
            built.append(number)
            yield {"number": number}, lambda content: content["number"], 1000

    unfinished: list[int] = []
    finished: list[int] = []

    def on_progress(count: int) -> None:
        finished.append(count)
        unfinished.append(len(built) - sum(finished))

    connection = client(concurrency=3)
    assert in_order(connection, server, requests(), on_progress) == list(range(20))
    connection.close()
    assert max(unfinished) <= 3


# ── Temporary failures ───────────────────────────────────────────────────────────────────────────────────────────────


def first(answer: Any, count: int = 1) -> Any:
    """Replace the first `count` answers."""

    def fault(received: Received) -> Answer:
        if received.number >= count:
            return echo(received)
        return answer if isinstance(answer, Answer) else answer(received)

    return fault


def hang(received: Received) -> Answer:
    time.sleep(1)
    raise ConnectionResetError


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_temporary_status_is_retried(server, warnings, status):
    server.set(first(Answer(status, b"")))
    assert get(server) == {}
    assert len(server.seen) == 2
    assert len(warnings) == 1


@pytest.mark.parametrize("fault", [drop, hang], ids=["lost connection", "timeout"])
def test_lost_connection_and_timeout_are_retried(server, warnings, fault):
    server.set(first(fault))
    assert get(server, timeout_seconds=0.3) == {}
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("retry_after", "waits"), [("1", True), (None, False), ("Tue, 24 Nov 2026 02:00:00 GMT", False)]
)
def test_retry_after_in_seconds_is_respected(server, warnings, retry_after, waits):
    server.set(first(Answer(429, b"", retry_after)))
    get(server)
    assert (server.times[1] - server.times[0] >= 1) == waits


def test_retry_pauses_grow_up_to_a_maximum(monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(http, "MAX_RETRY_PAUSE_SECONDS", 60.0)
    for attempt, seconds in enumerate([1, 2, 4, 8, 16, 32, 60, 60], 1):
        pauses = [http._retry_pause(attempt) for _ in range(50)]
        assert seconds <= min(pauses) < max(pauses) <= seconds + 1


def test_an_outage_is_one_warning(server, warnings, monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_PAUSE_SECONDS", 0.5)  # all requests fail before one succeeds again
    server.set(first(Answer(503, b""), count=8))
    assert post_all(server, 8, concurrency=8) == list(range(8))
    assert len(warnings) == 1
    assert server.url in warnings[0]


def test_each_outage_is_warned_about(server, warnings):
    server.set(lambda received: Answer(503, b"") if received.number in (0, 2) else echo(received))
    connection = client()
    for _ in range(2):
        connection.get(server.url, lambda content: content)
    connection.close()
    assert len(warnings) == 2


# ── Permanent failures ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (Answer(429, b'{"error": {"message": "slow\\ndown"}}'), "HTTP 429: slow down"),
        (Answer(503, b"<html>\nno upstream</html>"), "HTTP 503: <html> no upstream"),
        (Answer(500, b"\x1b[31mred"), "HTTP 500: [31mred"),
        (Answer(500, b"[1]"), "HTTP 500: [1]"),
        (Answer(500, b'{"error": {"message": {"text": 1}}}'), "HTTP 500: {'text': 1}"),
        (Answer(500, b"[" * 1000), "HTTP 500: [[["),
        (Answer(500, b"x" * 10**6), "HTTP 500: xxx"),
        (drop, ""),
        (hang, "within 0.3 seconds"),
    ],
)
def test_permanent_failure_is_an_unavailable_server(server, warnings, answer, part):
    server.set(first(answer, count=99))
    error = failure(server, timeout_seconds=0.3)
    assert error.kind == "unavailable_server"
    assert "3 attempts" in error.message
    assert part in error.message
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"a: b\r\n"),
        (b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["body", "headers", "interim responses", "trailers", "body of an error"],
)
def test_response_that_trickles_past_the_deadline_is_a_timeout(server, warnings, monkeypatch, start, piece):
    def trickle(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client disconnects
            self.wfile.write(start)
            while True:
                self.wfile.write(piece)
                time.sleep(0.05)

    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", trickle)
    begin = time.monotonic()
    error = failure(server, timeout_seconds=0.3, max_retries=1)
    assert error.kind == "unavailable_server"
    assert "no response within 0.3 seconds" in error.message
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 501, 302])
def test_other_statuses_are_rejected_at_once(server, warnings, status):
    server.set(lambda received: Answer(status, f'{{"error": "no {received.key}"}}'.encode()))
    error = failure(server)
    assert error.kind == "rejected_request"
    assert f"HTTP {status}" in error.message
    assert len(server.seen) == 1
    assert not warnings
    hints = {401: "OPDCTL_API_KEY", 403: "OPDCTL_API_KEY", 404: "teacher.server", 302: "teacher.server"}
    assert hints.get(status, "") in (error.hint or "")


@pytest.mark.parametrize("key", ["", KEY])
def test_key_is_sent_only_if_there_is_one(server, monkeypatch, key):
    monkeypatch.setenv("OPDCTL_API_KEY", key)
    keys: list[str | None] = []
    server.set(lambda received: keys.append(received.key) or echo(received))
    get(server)
    assert keys == [f"Bearer {KEY}" if key else None]


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_key_that_no_header_can_contain_is_rejected(monkeypatch, key):
    monkeypatch.setenv("OPDCTL_API_KEY", key)
    with pytest.raises(OpdctlError) as error:
        client()
    assert error.value.kind == "invalid_usage"
    assert "OPDCTL_API_KEY" in error.value.message
    assert key not in error.value.message


def test_absent_status_is_none(server):
    server.set(lambda received: Answer(404, b""))
    connection = client()
    assert connection.post(server.url, {}, lambda content: content, absent=(404, 405)) is None
    connection.close()


# ── Malformed responses ──────────────────────────────────────────────────────────────────────────────────────────────


def test_malformed_response_is_requested_once_more(server, warnings):
    server.set(first(Answer(200, b'{"trunc')))
    assert get(server) == {}
    assert len(server.seen) == 2


def reject(content: Any) -> None:
    raise MalformedResponseError(f"no {KEY}")


@pytest.mark.parametrize(
    ("parse", "part"),
    [
        (reject, "not shown"),
        (lambda content: 1 / 0, "ZeroDivisionError"),
        (lambda content: float(10**400), "OverflowError"),
        (lambda content: content["missing"], "KeyError"),
        (lambda content: content + 1, "TypeError"),
        (lambda content: [][1], "IndexError"),
        (lambda content: content.name, "AttributeError"),
        (lambda content: int("x"), "ValueError"),
    ],
)
def test_response_that_stays_malformed_is_reported(server, parse, part):
    error = failure(server, parse=parse)
    assert error.kind == "malformed_response"
    assert part in error.message
    assert len(server.seen) == 2


def test_an_error_of_opdctl_in_parse_is_not_retried(server):
    def parse(content: Any) -> None:
        raise OpdctlError("unsupported_setting", server.url)

    assert failure(server, parse=parse).kind == "unsupported_setting"
    assert len(server.seen) == 1


# ── Bounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def send(handler: Any, chunks: Iterator[bytes], *headers: tuple[str, str]) -> None:
    """Answer with the chunks, until the client disconnects."""
    handler.send_response(200)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    with contextlib.suppress(OSError):
        for chunk in chunks:
            handler.wfile.write(chunk)


def bomb() -> Iterator[bytes]:
    """Yield 4 GiB of blanks in 4 MiB of gzip."""
    compressor = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    for _ in range(2**12):
        yield compressor.compress(b" " * 2**20)


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [
        (lambda: itertools.repeat(b" " * 2**20), []),
        (bomb, [("Content-Encoding", "gzip")]),
        (lambda: iter([b"{}"]), [("Content-Encoding", "br")]),
        (lambda: iter([b"{}"]), [("Content-Encoding", "gzip")]),
    ],
    ids=["endless", "gzip bomb", "other encoding", "no gzip"],
)
def test_response_beyond_the_bound_is_malformed(server, monkeypatch, chunks, headers):
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", lambda self: send(self, chunks(), *headers))
    tracemalloc.start()
    error = failure(server, timeout_seconds=30)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.kind == "malformed_response"
    assert most < 10 * http.MAX_RESPONSE_BYTES


def test_bound_is_that_of_the_request(server):
    server.set(lambda received: Answer(200, b'{"number": 1}' + b" " * 3000))
    parse = lambda content: content["number"]  # noqa: E731
    connection = client()
    assert dict(connection.post_all(server.url, [({}, parse, 4000)])) == {0: 1}
    with pytest.raises(OpdctlError, match="2,000 bytes") as error:
        list(connection.post_all(server.url, [({}, parse, 2000)]))
    assert error.value.kind == "malformed_response"
    connection.close()


def test_compressed_response_is_read(server, monkeypatch):
    content = gzip.compress(b'{"number": 1}')
    monkeypatch.setattr(
        server.RequestHandlerClass, "do_GET", lambda self: send(self, iter([content]), ("Content-Encoding", "gzip"))
    )
    assert get(server) == {"number": 1}


# ── The key ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SECRET = "sk-Proj4f9Q7xLm2Zt8"
ECHOES = {
    "whole": SECRET,
    "without its last letter": SECRET[:-1],
    "end": SECRET[-6:],
    "middle": SECRET[7:13],
    "lower case": SECRET.lower(),
    "backwards": SECRET[::-1],
    "spaced": " ".join(SECRET),
    "cut by lines": "\n".join(SECRET[i : i + 3] for i in range(0, len(SECRET), 3)),
    "hexadecimal": SECRET.encode().hex(),
    "base64": base64.b64encode(b"Bearer " + SECRET.encode()).decode(),
    "escaped": "".join(f"\\u{ord(letter):04x}" for letter in SECRET),
    "percent": "".join(f"%{byte:02x}" for byte in SECRET.encode()),
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [400, 500, 200])
def test_no_part_of_the_key_is_shown(server, warnings, monkeypatch, echo, status):
    monkeypatch.setenv("OPDCTL_API_KEY", SECRET)
    server.set(lambda received: Answer(status, json.dumps({"error": f"invalid key {echo}, sorry"}).encode()))
    error = failure(server, parse=lambda content: {}[content["error"]], max_retries=1)
    for text in (error.message, *warnings):
        assert "sorry" not in text
        assert "not shown" in text


def test_text_beside_the_key_is_shown(server, monkeypatch):
    monkeypatch.setenv("OPDCTL_API_KEY", SECRET)
    server.set(lambda received: Answer(400, b"the project has no quota"))
    assert "no quota" in failure(server).message


# ── Cancellation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def slow(received: Received) -> Answer:
    time.sleep(20)
    return echo(received)


def test_first_error_cancels_the_other_requests(server):
    server.set(lambda received: Answer(400, b"") if received.number == 3 else slow(received))
    start = time.monotonic()
    with pytest.raises(OpdctlError) as error:
        post_all(server, 50, concurrency=4, timeout_seconds=60)
    assert error.value.kind == "rejected_request"
    assert time.monotonic() - start < 5
    assert len(server.seen) == 4
    assert not workers()


class Stop(BaseException):
    pass


@pytest.fixture
def stop_after() -> Iterator[Any]:
    """A function that returns a fault with a signal: soon after the server has received `count` requests, it raises
    Stop in the main thread, as a signal handler of the command line does."""

    def stop(number: int, frame: Any) -> None:
        raise Stop

    def stop_after(count: int, fault: Any) -> Any:
        def answer(received: Received) -> Answer:
            if received.number == count - 1:
                signal.setitimer(signal.ITIMER_REAL, 0.3)
            return fault(received)

        return answer

    previous = signal.signal(signal.SIGALRM, stop)
    yield stop_after
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("fault", "unanswered"), [(slow, 4), (lambda received: Answer(429, b"", "20"), 0)], ids=["response", "retry pause"]
)
def test_signal_cancels_all_requests(server, warnings, monkeypatch, stop_after, fault, unanswered):
    monkeypatch.setattr(http, "MAX_RETRY_PAUSE_SECONDS", 60.0)
    server.set(stop_after(4, fault))
    with pytest.raises(Stop):
        post_all(server, 50, concurrency=4, timeout_seconds=60)
    assert len(server.seen) == 4
    assert server.under_way == unanswered
    assert not workers()


@pytest.mark.parametrize(
    ("fault", "unanswered"), [(slow, 1), (lambda received: Answer(429, b"", "20"), 0)], ids=["response", "retry pause"]
)
def test_signal_ends_a_single_request(server, warnings, monkeypatch, stop_after, fault, unanswered):
    monkeypatch.setattr(http, "MAX_RETRY_PAUSE_SECONDS", 60.0)
    server.set(stop_after(1, fault))
    with pytest.raises(Stop):
        get(server, timeout_seconds=60)
    assert len(server.seen) == 1
    assert server.under_way == unanswered


def test_client_works_after_a_cancelled_call(server, stop_after):
    server.set(stop_after(4, lambda received: slow(received) if received.number < 4 else echo(received)))
    connection = client(concurrency=4, timeout_seconds=60)
    requests = [({"number": number}, lambda content: content["number"], 1000) for number in range(4)]
    with pytest.raises(Stop):
        in_order(connection, server, requests)
    assert in_order(connection, server, requests) == [0, 1, 2, 3]
    connection.close()
