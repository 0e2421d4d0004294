"""The HTTP server between the episodes of a rollout and the student. Each episode has an address that nobody guesses.

It listens on this machine only. An address ends with its episode.
"""

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opdctl.agents.api import ApiError
from opdctl.artifacts import parsing

HOST = "127.0.0.1"
TOKEN_BYTES = 16
MAX_BODY_BYTES = 2**26
QUEUED_CONNECTIONS = 1024
"""That may wait to be accepted, when many episodes call at once."""
Respond = Callable[[str, Any], dict[str, Any]]
"""The endpoint below /v1/, and the body of the request in JSON, None of GET → the body of the answer."""


class Gateway:
    """The addresses of the running episodes."""

    def __init__(self) -> None:
        self._responders: dict[str, Respond] = {}
        self._server = _Server((HOST, 0), self._respond)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def open(self, respond: Respond) -> str:
        """Return a new address, whose requests `respond` answers in threads of the server."""
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._responders[token] = respond
        return f"http://{HOST}:{self._server.server_address[1]}/{token}/v1"

    def close_address(self, address: str) -> None:
        """Refuse the further requests to an address."""
        self._responders.pop(address.split("/")[-2], None)

    def close(self) -> None:
        self._responders.clear()
        self._server.shutdown()
        self._server.server_close()

    def _respond(self, path: str, body: Any) -> dict[str, Any]:
        token, _, endpoint = path.removeprefix("/").partition("/v1/")
        respond = self._responders.get(token)
        if respond is None:
            raise ApiError("there is no such episode, or it has ended", "not_found", 404)
        return respond(endpoint, body)


@contextlib.contextmanager
def open_gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    try:
        yield gateway
    finally:
        gateway.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # an episode may hang
    block_on_close = False
    request_queue_size = QUEUED_CONNECTIONS

    def __init__(self, address: tuple[str, int], respond: Respond):
        self.respond = respond
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report nothing: a client may end its connection at any time."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"  # a connection takes several requests
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(lambda: None)

    def do_POST(self) -> None:
        self._answer(self._read_body)

    def _read_body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise ApiError(f"a request needs a Content-Length of at most {MAX_BODY_BYTES}")
        try:
            return parsing.parse_json(self.rfile.read(int(length)))
        except ValueError as error:
            raise ApiError(f"the body is no JSON: {error}") from None

    def _answer(self, read_body: Callable[[], Any]) -> None:
        status = 200
        try:
            body = read_body()
            answer = self.server.respond(self.path.partition("?")[0], body)
        except ApiError as error:
            status, answer = error.status, error.to_json()
        except Exception as error:
            internal = ApiError(f"{type(error).__name__}: {error}", "internal_error", 500)
            status, answer = internal.status, internal.to_json()
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
