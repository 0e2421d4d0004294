"""`train --push` to a local stand-in of the hub's HTTP API, and without a hub."""

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
from helpers.commands import QUICKSTART, Result, contents

from opdctl.errors import ExitCode


class Hub(ThreadingHTTPServer):
    """A hub that accepts repositories and commits with the token `right`."""

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
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def log_message(self, *arguments: Any) -> None:
        pass


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a separate process: the hub's library reads its environment when it is imported."""
    clean = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    settings = {"HF_HOME": "/nowhere", "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run([sys.executable, *words], env=clean | settings, capture_output=True, text=True, check=False)


def train(run: Path, repo: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "opdctl", "train", "--output", str(run), "--push", repo, "--json", **environment)


def test_student_is_pushed_with_its_card_to_a_private_repository(finished_run):
    hub = Hub()
    done = train(finished_run, "me/student", HF_ENDPOINT=hub.address, HF_TOKEN="right")
    assert done.returncode == 0, done.stderr
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "student", "private")
    student = finished_run / "student" / "step-00002"
    assert hub.files == {file.name: file.read_bytes() for file in student.iterdir()}
    assert hub.files["README.md"].decode().startswith("---\n")
    assert f"pushed {hub.address}/me/student/commit/abc" in done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_failed_push_leaves_the_student_and_the_result(finished_run):
    before = contents(finished_run / "student")
    done = train(finished_run, "me/student", HF_HUB_OFFLINE="1", HF_TOKEN="right")
    assert done.returncode == ExitCode.UNAVAILABLE, done.stderr
    assert "error: Failed upload: --push me/student: Cannot reach" in done.stderr
    assert f"`hf upload me/student {finished_run}/student/step-00002`" in done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert contents(finished_run / "student") == before


def test_rejecting_or_unreachable_hub_is_one_error():
    hub = Hub()
    code = (
        "from pathlib import Path; from opdctl.training import publish;"
        "publish.push_to_hub(Path('.'), 'me/student', 'step 1')"
    )
    rejected = python("-c", code, HF_ENDPOINT=hub.address, HF_TOKEN="wrong")
    hub.shutdown()
    hub.server_close()
    unreachable = python("-c", code, HF_ENDPOINT=hub.address, HF_TOKEN="right")
    for done, reason in ((rejected, "401"), (unreachable, "Connection refused")):
        last = done.stderr.splitlines()[-1]
        assert last.startswith("opdctl.errors.OpdctlError: Failed upload: --push me/student: ")
        assert reason in last


@pytest.mark.parametrize(
    ("repo", "code", "kind"),
    [
        ("student", ExitCode.USAGE, "invalid_usage"),
        ("me/stu dent", ExitCode.USAGE, "invalid_usage"),
        ("me/student", ExitCode.UNAVAILABLE, "missing_token"),
    ],
)
def test_impossible_push_is_refused_before_training(tmp_path, repo, code, kind):
    output = tmp_path / "run"
    done = python("-m", "opdctl", "train", "--recipe", str(QUICKSTART), "--output", str(output), "--push", repo)
    assert (done.returncode, Result(done.returncode, done.stdout, done.stderr).kind) == (code, kind)
    assert f"--push {repo}: " in done.stderr
    assert not output.exists()
