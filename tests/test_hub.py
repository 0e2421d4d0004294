"""`train --push`: against a small stand-in of the hub's HTTP API on this machine, and against no hub at all."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import QUICKSTART, invoke, sets

from opdctl.errors import ExitCode


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits from whoever shows the token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/me/student"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            return {"commitUrl": f"{self.address}/me/student/commit/abc", "commitOid": "abc"}
        return {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or self._chunks()
        known = self.headers.get("Authorization") == "Bearer right"
        answer = self.server.answer(self.path.partition("?")[0], body) if known else {"error": "no such token"}
        content = json.dumps(answer).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def _chunks(self) -> bytes:
        found = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    path = tmp_path_factory.mktemp("push") / "run"
    done = invoke("train", "--recipe", QUICKSTART, *sets("train.steps=1"), "--output", path)
    assert done.code == 0, done.err
    return path


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the hub's library reads its environment once, when it is imported."""
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    settings = {"HF_HOME": "/nowhere", "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run([sys.executable, *words], env=clean | settings, capture_output=True, text=True, check=False)


def train(run: Path, repo: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "opdctl", "train", "--output", str(run), "--push", repo, "--json", **environment)


def test_the_student_arrives_whole_with_its_card_in_a_private_repository(run):
    hub = Hub()
    done = train(run, "me/student", HF_ENDPOINT=hub.address, HF_TOKEN="right")
    assert done.returncode == 0, done.stderr
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "student", "private")
    student = run / "student" / "step-00001"
    assert hub.files == {file.name: file.read_bytes() for file in student.iterdir()}
    assert "Distilled on-policy by opdctl" in hub.files["README.md"].decode()
    assert f"pushed {hub.address}/me/student/commit/abc" in done.stderr
    assert json.loads(done.stdout)["steps"] == 1


def test_a_push_that_fails_costs_nothing_but_the_push(run):
    before = {file: file.read_bytes() for file in (run / "student").rglob("*") if file.is_file()}
    done = train(run, "me/student", HF_HUB_OFFLINE="1", HF_TOKEN="right")
    assert done.returncode == ExitCode.UNAVAILABLE, done.stderr
    assert "error: --push me/student: the hub did not take it: Cannot reach" in done.stderr
    assert f"hint: the student is whole, {run}/student/step-00001; the same command tries again" in done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    assert {file: file.read_bytes() for file in (run / "student").rglob("*") if file.is_file()} == before


def test_a_hub_that_refuses_or_is_not_there_is_one_clear_error(tmp_path):
    hub = Hub()
    code = "from pathlib import Path; from opdctl.training import publish; publish.push_to_hub(Path('.'), 'me/student', 'step 1')"
    refused = python("-c", code, HF_ENDPOINT=hub.address, HF_TOKEN="wrong")
    hub.shutdown()
    hub.server_close()
    absent = python("-c", code, HF_ENDPOINT=hub.address, HF_TOKEN="right")
    for done, reason in ((refused, "401"), (absent, "Connection refused")):
        last = done.stderr.splitlines()[-1]
        assert last.startswith("opdctl.errors.OpdctlError: --push me/student: the hub did not take it: ")
        assert reason in last


@pytest.mark.parametrize(
    ("repo", "code", "text"),
    [
        ("student", ExitCode.USAGE, "whose repository?"),
        ("me/stu dent", ExitCode.USAGE, "--push me/stu dent: "),
        ("me/student", ExitCode.UNAVAILABLE, "there is no token for the hub"),
    ],
)
def test_what_cannot_succeed_is_said_before_training(tmp_path, repo, code, text):
    fresh = tmp_path / "fresh"
    words = ("train", "--recipe", str(QUICKSTART), "--output", str(fresh), "--push", repo)
    done = python("-m", "opdctl", *words)
    assert done.returncode == code
    assert text in done.stderr
    assert not fresh.exists()
