"""Addresses of servers that are wrong, on the command line. Needs no vLLM."""

import shutil
import socket
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, invoke, sets, small_recipe
from helpers.servers import KEY, Answer, Proxy, assert_reported, parts, score

from opdctl.engines import http


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("OPDCTL_API_KEY", KEY)


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory) -> Path:
    """A run whose first step has eight responses in two parts."""
    path = tmp_path_factory.mktemp("rolled-out") / "run"
    assert invoke("rollout", "--recipe", QUICKSTART, *sets("score.engine=server"), "--output", path).code == 0
    return path


@pytest.fixture
def run(rolled_out, tmp_path) -> Path:
    return Path(shutil.copytree(rolled_out, tmp_path / "run"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("teacher.server='https://me:hunter2@host/v1'", "server.api_key_env"),
        ("teacher.server=https://hunter2@host/v1", "server.api_key_env"),
        ("teacher.server='http://me:hunter2%40host/v1'", "server.api_key_env"),
        ("teacher.server='http://host/v1?key=hunter2'", "server.api_key_env"),
        ("teacher.server=['https://me:hunter2@host/v1']", "must be a string"),
        ("server='https://me:hunter2@host/v1'", "must be a table"),
        ("server.api_key_env='hunter2'", "not the key itself"),
    ],
)
def test_secret_in_the_recipe_is_rejected_and_not_shown(tmp_path, override, part):
    common = ["--recipe", QUICKSTART, *sets("score.engine=server", override), "--output", tmp_path / "run"]
    for command in ("train", "score-teacher"):
        result = invoke(command, *common)
        assert result.kind == "invalid_recipe"
        assert part in result.err
        assert "hunter2" not in result.out + result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["http://host", "https://a-b.example.org:8000/v1/", "http://[::1]:8000/v1"])
def test_address_of_a_server_is_accepted(address):
    assert small_recipe(f"teacher.server='{address}'").teacher.server == address


def test_server_that_is_not_vllm_is_rejected(run):
    stranger = Proxy()
    try:
        stranger.set(lambda received: Answer(404, b"<html>not found</html>"))
        result = score(run, stranger.url)
        assert_reported(result, "rejected_request", "HTTP 404", "not found", "teacher.server")
        assert stranger.seen == ["/v1/models"]
        stranger.set(lambda received: Answer(200, b"<html>welcome</html>"))
        assert_reported(score(run, stranger.url), "malformed_response", stranger.url)
        stranger.set(lambda received: Answer(302, b"moved"))
        assert_reported(score(run, stranger.url), "rejected_request", "HTTP 302", "teacher.server")
    finally:
        stranger.server_close()


def test_missing_server_is_unavailable(run):
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert_reported(score(run, url), "unavailable_server", url, "3 attempts", "run the same command again")
    assert not parts(run)


def test_missing_address_is_reported(run):
    common = ["--recipe", QUICKSTART, *sets("score.engine=server"), "--output", run]
    assert_reported(invoke("score-teacher", *common), "invalid_recipe", "teacher.server", "http://host:8000/v1")
    assert "teacher.server" in invoke("score-teacher", *common, "--set", "teacher.server=host:8000").err
