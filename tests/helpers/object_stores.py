"""An S3 server on this machine (moto's), and a proxy before it that counts requests and makes faults."""

import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
import pytest

BUCKET = "bucket"
SECRET = "a-secret-for-tests"
SERVE = (
    "import sys\n"
    "from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)\n"
    "server.start()\n"
    "print(server.get_host_and_port()[1], flush=True)\n"
    "sys.stdin.read()\n"
)
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """A request to the proxy. name: the key in the bucket, "" if it is about the bucket. query: undecoded."""

    method: str
    name: str
    query: str

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and not self.name


@dataclass
class Answer:
    """The answer of the proxy. keep: the bytes of the body after which it closes the connection, None for all."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    keep: int | None = None


Fault = Callable[[Request, Callable[[], Answer]], Answer]
"""The answer to a request. The function gets the answer of the server; OSError drops the connection."""


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the S3 server at `port`, and records those that were answered in full."""

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self._lock = port, threading.Lock()
        self.set()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def set(self, fault: Fault | None = None) -> None:
        """Use a fault from now on, and forget the requests until now."""
        self.fault = fault or (lambda request, forward: forward())
        self.seen: list[Request] = []

    def sent(self) -> list[str]:
        """Return the names of the objects that were written by one request, in order."""
        return [each.name for each in self.seen if each.method == "PUT" and not each.query]

    def fetched(self) -> list[str]:
        return [each.name for each in self.seen if each.method == "GET" and each.name]

    def record(self, request: Request) -> None:
        with self._lock:
            self.seen.append(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients disconnect


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = re.sub(r"(^|&)x-id=\w+", "", parts.query)
        request = Request(self.command, unquote(parts.path).strip("/").partition("/")[2], query)
        try:
            body = self._read_body()
            answer = self.server.fault(request, lambda: self._forward(body))
        except OSError:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.keep])
        if answer.keep is not None:
            self.close_connection = True
        elif answer.status < 300:
            self.server.record(request)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _read_body(self) -> bytes:
        """Return the body of the request.

        Raises:
            ConnectionError: the client was killed while it sent it. S3 keeps nothing of such an object.
        """
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self._read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self._read_line(), 16):
            body += self._read(size)
            self._read_line()
        self._read_line()
        return body

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError
        return data

    def _read_line(self) -> bytes:
        line = self.rfile.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError
        return line

    def _forward(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        dropped = ("host", "content-length", "connection", "transfer-encoding", "expect")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            length = answer.getheader("Content-Length")
            if self.command == "HEAD":
                content = bytes(int(length or 0))
            kept = [each for each in answer.getheaders() if each[0].lower() not in (*dropped, "date", "server")]
            return Answer(answer.status, kept, content)
        finally:
            connection.close()

    def log_message(self, *arguments: Any) -> None:
        pass


class Store:
    """The S3 server with an empty bucket, and the proxy before it, which commands use."""

    def __init__(self, port: int):
        self.proxy, self.direct_url = Proxy(port), f"http://127.0.0.1:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.direct_url,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key=SECRET,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",  # of botocore, for tests of stores that do not answer
        }

    def empty(self) -> None:
        """Start with an empty bucket."""
        if BUCKET in [bucket["Name"] for bucket in self.client.list_buckets()["Buckets"]]:
            if names := self.names():
                self.client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": name} for name in names]})
        else:
            self.client.create_bucket(Bucket=BUCKET)
        self.proxy.set()

    def names(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return the bytes of the objects below a prefix, by relative name."""
        return {name.removeprefix(prefix): self.get(name) for name in self.names() if name.startswith(prefix)}

    def get(self, name: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return data

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data)


@contextmanager
def serve_s3() -> Iterator[Store]:
    """Yield an S3 server in a process that ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    store = Store(int(process.stdout.readline()))
    try:
        yield store
    finally:
        store.proxy.shutdown()
        store.proxy.server_close()
        process.stdin.close()
        process.terminate()
        process.wait()
        process.stdout.close()


def use(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Let commands use the store, which is emptied."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    store.empty()
    return store


def first(count: int, method: str, answer: Fault) -> Fault:
    """Return a fault of the first `count` requests of a method for objects."""
    left, lock = [count], threading.Lock()

    def fault(request: Request, forward: Callable[[], Answer]) -> Answer:
        with lock:
            is_faulty = request.method == method and request.name != "" and left[0] > 0
            left[0] -= is_faulty
        return answer(request, forward) if is_faulty else forward()

    return fault


def slow_down(request: Request, forward: Callable[[], Answer]) -> Answer:
    return Answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)


def drop(request: Request, forward: Callable[[], Answer]) -> Answer:
    raise ConnectionResetError


def cut(request: Request, forward: Callable[[], Answer]) -> Answer:
    """Close the connection in the middle of the body."""
    answer = forward()
    return Answer(answer.status, answer.headers, answer.body, keep=len(answer.body) // 2)
