"""An HTTP server and proxy with faults, and the engine `server` on it."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers.commands import QUICKSTART, Result, invoke, sets, small_recipe

from opdctl.engines.base import EngineContext
from opdctl.engines.server import ServerEngine
from opdctl.errors import EXIT_CODES
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import Model

KEY = "a-key-for-tests"


def ask(port: int, method: str, path: str, body: bytes = b"", key: str | None = None) -> "Answer":
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": key} if key else {})
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read())
    finally:
        connection.close()


@dataclass
class Answer:
    status: int
    body: bytes
    retry_after: str | None = None


@dataclass
class Received:
    """A request as the proxy receives it: number `number` on its path, from 0."""

    port: int
    method: str
    path: str
    key: str | None
    body: bytes
    number: int

    def forward(self) -> Answer:
        return ask(self.port, self.method, self.path, self.body, self.key)


Fault = Callable[[Received], Answer | None]


class Proxy(ThreadingHTTPServer):
    """Forwards requests to `port`. `fault` may return its own answer, or raise OSError to drop the connection."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.scheme, self._lock = port, "http", threading.Lock()
        self.set(lambda received: None)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def set(self, fault: Fault) -> None:
        self.fault, self.seen, self.times = fault, [], []
        self.under_way = self.most = 0

    def completions(self) -> list[float]:
        """Return the times at which completions were requested."""
        return [at for path, at in zip(self.seen, self.times, strict=True) if path == "/v1/completions"]

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, handler: "Handler") -> Answer:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        with self._lock:
            number = self.seen.count(handler.path)
            self.seen.append(handler.path)
            self.times.append(time.monotonic())
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        key = handler.headers.get("authorization")
        received = Received(self.port, handler.command, handler.path, key, body, number)
        try:
            return self.fault(received) or received.forward()
        finally:
            with self._lock:
                self.under_way -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # some tests make clients disconnect


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        try:
            answer = self.server.answer(self)
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.retry_after:
            self.send_header("Retry-After", answer.retry_after)
        self.end_headers()
        self.wfile.write(answer.body)

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


def at(first: int, answer: Answer | Callable[[Received], Answer], count: int = 1) -> Fault:
    """Return a fault that replaces `count` completions, from number `first` on."""

    def fault(received: Received) -> Answer | None:
        if received.path != "/v1/completions" or not first <= received.number < first + count:
            return None
        return answer if isinstance(answer, Answer) else answer(received)

    return fault


def always(answer: Answer | Callable[[Received], Answer], path: str = "/v1/completions") -> Fault:
    def fault(received: Received) -> Answer | None:
        if received.path != path:
            return None
        return answer if isinstance(answer, Answer) else answer(received)

    return fault


def edited(change: Callable[[Any], None]) -> Callable[[Received], Answer]:
    """Return a function that edits the server's answer."""

    def answer(received: Received) -> Answer:
        original = received.forward()
        content = json.loads(original.body)
        change(content)
        return Answer(original.status, json.dumps(content).encode())

    return answer


def drop(received: Received) -> Answer:
    raise ConnectionResetError


def hang(received: Received) -> Answer:
    time.sleep(2)
    raise ConnectionResetError


def truncated(received: Received) -> Answer:
    return Answer(200, received.forward().body[:-100])


def teacher() -> ModelDir:
    return ModelDir(find_or_download(Model(model="toy:teacher"), "model"), "float32")


def server_settings(url: str, *overrides: str) -> tuple[str, ...]:
    """Return recipe settings for the teacher at `url`."""
    return (f"teacher.server={url}", "score.engine=server", "server.max_retries=2", *overrides)


def engine_at(url: str, *overrides: str, vocab_size: int | None = None) -> ServerEngine:
    """Return an engine. With `vocab_size`, further rows of the teacher's output matrix are padding rows."""
    recipe = small_recipe(*server_settings(url, *overrides))
    assert recipe.teacher is not None
    model = replace(teacher(), path=find_or_download(recipe.teacher, "teacher.model"), shared_vocab_size=vocab_size)
    return ServerEngine(model, EngineContext(recipe, recipe.teacher, "cpu"))


def score(run: Path, url: str, *overrides: str) -> Result:
    """Score the run on the command line."""
    return invoke("score-teacher", "--recipe", QUICKSTART, *sets(*server_settings(url, *overrides)), "--output", run)


def parts(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "step-00000" / "teacher").glob("part-*"))}


def assert_reported(result: Result, kind: str, *parts: str) -> None:
    """Assert the kind of the error, exactly one error and one hint, and that the key is not printed."""
    assert result.kind == kind, result.err
    assert result.code == EXIT_CODES[kind]
    lines = result.err.splitlines()
    (error,) = (line for line in lines if line.startswith("error: "))
    (_,) = (line for line in lines if line.startswith("hint: "))
    assert all(line.startswith(("error: ", "hint: ", "warning: ")) for line in lines), result.err
    for part in parts:
        assert part in result.err
    assert "internal error" not in error
    assert KEY not in result.err
