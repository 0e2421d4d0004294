"""The engine `server` against a real vLLM server on this machine, with a proxy in front of it for the faults."""

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import QUICKSTART, Result, invoke, sets, small_recipe

from opdctl.artifacts.records import GradedResponse, Response, sample_seed
from opdctl.artifacts.tables import read_rows
from opdctl.engines import http
from opdctl.engines.base import EngineContext, Request, ScoreRequest
from opdctl.engines.server import ServerEngine
from opdctl.engines.transformers import TransformersEngine
from opdctl.environment import has_vllm
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.dependencies import STAGE_DEPENDENCIES, fingerprint_settings
from opdctl.recipe.schema import Model, Sampling, Score
from opdctl.runs.run import load_run
from opdctl.runs.scored_responses import read_scored

pytestmark = pytest.mark.skipif(not has_vllm(), reason="needs vLLM, which `make test` installs where it can")

KEY = "a-key-for-tests"
CONTEXT = 256


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Vllm:
    """A vLLM server with the embedded teacher, in a process group of its own."""

    def __init__(self, folder: Path):
        # Without the chat template: the server tries it out as it starts, on words that this tokenizer does not know.
        shutil.copytree(teacher().path, folder / "teacher", ignore=shutil.ignore_patterns("chat_template.jinja"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._folder = folder
        self._log = (folder / "log").open("wb")

    def start(self) -> None:
        options = {
            "--model": self._folder / "teacher",
            "--served-model-name": "teacher",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--api-key": KEY,
            "--dtype": "float32",
            "--max-model-len": CONTEXT,
            "--max-num-seqs": 16,
        }
        words = [str(word) for option in options.items() for word in option]
        self._process = subprocess.Popen(
            # What `vllm serve` runs. That command itself misses its own version in the CPU's build.
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait(self) -> None:
        """Return once it answers."""
        end = time.monotonic() + 300
        while time.monotonic() < end and self._process.poll() is None:
            try:
                ask(self.port, "GET", "/health")
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"vLLM does not start: {(self._folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def ask(port: int, method: str, path: str, body: bytes = b"", key: str | None = None) -> "Answer":
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": key} if key else {})
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read())
    finally:
        connection.close()


# ── The proxy ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Answer:
    status: int
    body: bytes
    retry_after: str | None = None


@dataclass
class Asked:
    """A request as the proxy sees it: the `number`-th on its path, from 0."""

    port: int
    method: str
    path: str
    key: str | None
    body: bytes
    number: int

    def forward(self) -> Answer:
        return ask(self.port, self.method, self.path, self.body, self.key)


Fault = Callable[[Asked], Answer | None]


class Proxy(ThreadingHTTPServer):
    """Passes requests on. `fault` may answer one itself, and drops the connection by an OSError."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.scheme, self._lock = port, "http", threading.Lock()
        self.set(lambda asked: None)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def set(self, fault: Fault) -> None:
        self.fault, self.seen, self.times = fault, [], []
        self.under_way = self.most = 0

    def completions(self) -> list[float]:
        """Return when each completion was asked for."""
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
        asked = Asked(self.port, handler.command, handler.path, key, body, number)
        try:
            return self.fault(asked) or asked.forward()
        finally:
            with self._lock:
                self.under_way -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is what some tests are about


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


def at(first: int, answer: Answer | Callable[[Asked], Answer], count: int = 1) -> Fault:
    """A fault in place of `count` completions from the `first`, 0 on."""

    def fault(asked: Asked) -> Answer | None:
        if asked.path != "/v1/completions" or not first <= asked.number < first + count:
            return None
        return answer if isinstance(answer, Answer) else answer(asked)

    return fault


def always(answer: Answer | Callable[[Asked], Answer], path: str = "/v1/completions") -> Fault:
    return lambda asked: None if asked.path != path else answer if isinstance(answer, Answer) else answer(asked)


def edited(change: Callable[[Any], None]) -> Callable[[Asked], Answer]:
    """The server's own answer, changed."""

    def answer(asked: Asked) -> Answer:
        own = asked.forward()
        content = json.loads(own.body)
        change(content)
        return Answer(own.status, json.dumps(content).encode())

    return answer


def drop(asked: Asked) -> Answer:
    raise ConnectionResetError


def hang(asked: Asked) -> Answer:
    time.sleep(2)
    raise ConnectionResetError


def truncated(asked: Asked) -> Answer:
    return Answer(200, asked.forward().body[:-100])


# ── What the tests share ─────────────────────────────────────────────────────────────────────────────────────────────


def teacher() -> ModelDir:
    return ModelDir(find_or_download(Model(model="toy:teacher"), "model"), "float32")


def served(url: str, *overrides: str) -> tuple[str, ...]:
    """Settings for the teacher at `url`."""
    return (f"teacher.server={url}", "score.engine=server", "server.max_retries=2", *overrides)


def engine_at(url: str, *overrides: str) -> ServerEngine:
    recipe = small_recipe(*served(url, *overrides))
    assert recipe.teacher is not None
    model = ModelDir(find_or_download(recipe.teacher, "teacher.model"), "float32")
    return ServerEngine(model, EngineContext(recipe, recipe.teacher, "cpu"))


def score(run: Path, url: str, *overrides: str) -> Result:
    """Score a copy of the run by the command line."""
    return invoke("score-teacher", "--recipe", QUICKSTART, *sets(*served(url, *overrides)), "--output", run)


def parts(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "step-00000" / "teacher").glob("part-*"))}


def assert_clear(result: Result, code: ExitCode, *words: str) -> None:
    """The documented exit code, and one line that says what is wrong, with one that says what to do."""
    assert result.code == code, result.err
    lines = result.err.splitlines()
    (error,) = (line for line in lines if line.startswith("error: "))
    (_,) = (line for line in lines if line.startswith("hint: "))
    assert all(line.startswith(("error: ", "hint: ", "warning: ")) for line in lines), result.err
    for word in words:
        assert word in result.err
    assert "internal error" not in error
    assert KEY not in result.err


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(http, "MAX_BACKOFF_SECONDS", 2.0)
    monkeypatch.setenv("OPDCTL_API_KEY", KEY)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Vllm(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def _proxy(server):
    proxy = Proxy(server.port)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def proxy(_proxy):
    _proxy.set(lambda asked: None)
    return _proxy


@pytest.fixture
def engine(proxy):
    engine = engine_at(proxy.url)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory) -> Path:
    """A run whose first step has its eight responses, in two parts."""
    path = tmp_path_factory.mktemp("rolled-out") / "run"
    assert invoke("rollout", "--recipe", QUICKSTART, *sets("score.engine=server"), "--output", path).code == 0
    return path


@pytest.fixture
def run(rolled_out, tmp_path) -> Path:
    return Path(shutil.copytree(rolled_out, tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(rolled_out, server, tmp_path_factory) -> Path:
    """The same run, scored without a fault, one request at a time."""
    path = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("undisturbed") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPDCTL_API_KEY", KEY)
        result = score(path, f"http://127.0.0.1:{server.port}/v1", "server.concurrency=1")
    assert result.code == 0, result.err
    return path


def answered(run: Path) -> list[ScoreRequest]:
    rows = [row for i in range(2) for row in read_rows(load_run(run).rollout_stage(0).verify(i), Response)]
    return [ScoreRequest(row.prompt_ids, row.response_ids) for row in rows]


# ── What it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_those_of_the_transformers_engine(engine, rolled_out):
    wanted = TransformersEngine(teacher(), "cpu").score(answered(rolled_out), Score(top_k=5), lambda n: None)
    told = []
    found = engine.score(answered(rolled_out), Score(top_k=5), told.append)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, rtol=0, atol=1e-3)
        assert np.mean(ours.top_ids == theirs.top_ids) > 0.99  # the rest are ties
    assert sum(told) == 8


def test_the_same_seeds_give_the_same_responses_and_their_own_logprobs(engine):
    rng = np.random.default_rng(7)  # nothing that it was trained on: of those it is so sure that every seed is the same
    prompts = [rng.choice(np.arange(2, 28), 13, replace=False).astype(np.int32) for _ in range(8)]
    requests = [Request(prompt, sample_seed(0, f"sample {i}")) for i, prompt in enumerate(prompts)]
    once, again = (engine.generate(requests, Sampling(max_tokens=120), 256, lambda n: None, top_k=k) for k in (3, 0))
    responses = [ScoreRequest(prompt, each.response_ids) for prompt, each in zip(prompts, once, strict=True)]
    scores = TransformersEngine(teacher(), "cpu").score(responses, Score(top_k=3), lambda n: None)
    for first, second, scored in zip(once, again, scores, strict=True):
        np.testing.assert_array_equal(first.response_ids, second.response_ids)
        np.testing.assert_allclose(first.logprobs, scored.logprobs, rtol=0, atol=1e-3)
        np.testing.assert_allclose(first.top_logprobs, scored.top_logprobs, rtol=0, atol=1e-3)
        assert second.top_ids is None
    other = engine.generate([Request(r.prompt_ids, r.seed + 1) for r in requests], Sampling(max_tokens=120), 256, print)
    assert any(a.response_ids.tobytes() != b.response_ids.tobytes() for a, b in zip(once, other, strict=True))


def test_finish_reasons_and_the_end_of_sequence(engine, rolled_out):
    request = Request(answered(rolled_out)[0].prompt_ids, 1)
    (whole,) = engine.generate([request], Sampling(max_tokens=200), 256, lambda n: None)
    length = len(whole.response_ids)
    assert length < 200
    for longest, reason in ((200, "stop"), (length, "stop"), (length - 1, "length")):
        (completion,) = engine.generate([request], Sampling(max_tokens=longest), 256, lambda n: None)
        assert completion.finish_reason == reason
        np.testing.assert_array_equal(completion.response_ids, whole.response_ids[:longest])
        assert len(completion.logprobs) == len(completion.response_ids)
    assert (whole.response_ids == 1).nonzero()[0].tolist() == [length - 1]


def test_what_a_server_cannot_give_is_refused_with_the_engine_that_can(engine, rolled_out):
    for name in ("entropy", "student_top_k", "hidden_states"):
        with pytest.raises(OpdctlError, match=f"score.{name}") as caught:
            engine.score(answered(rolled_out), Score(**{name: True}), print)
        assert "transformers" in caught.value.hint
    with pytest.raises(OpdctlError, match="entropies"):
        engine.generate([], Sampling(), 1, print, entropy=True)
    with pytest.raises(OpdctlError, match="unknown kind"):
        engine.generate([], Sampling(temperature=0.5), 1, print, top_k=2)


def test_another_model_s_weights_are_refused(engine):
    engine.load_weights(teacher())
    with pytest.raises(OpdctlError, match="keeps the weights it was started with") as caught:
        engine.load_weights(ModelDir(find_or_download(Model(model="toy:student"), "model"), "float32"))
    assert "rollout.engine" in caught.value.hint


def test_a_served_student_draws_and_is_evaluated_but_cannot_be_trained(proxy, tmp_path):
    student = ("student.model=toy:teacher", f"student.server={proxy.url}", "rollout.engine=server")
    common = ["--recipe", QUICKSTART, *sets(*student), "--output", tmp_path / "run"]
    for command in ("rollout", "eval"):
        result = invoke(command, *common)
        assert result.code == 0, result.err
    for command in (["train"], ["rollout"], ["eval", "--model", teacher().path.parent / "student"]):
        result = invoke(*command, *common)
        assert result.code == ExitCode.USAGE, command  # `rollout` is now one of step 1
        assert "keeps the weights it was started with" in result.err
    run = load_run(tmp_path / "run")
    graded = read_rows(run.path / "eval/sort12/step-00000/part-00000-of-00001.parquet", GradedResponse)
    assert len(graded) == 8
    assert np.mean([row.correct for row in graded]) > 0.5
    assert run.rollout_stage(0).manifest()["logprob_metadata"]["engine"] == "server"
    for sample in read_scored(run, 0):  # scored by the transformers engine with the same model
        np.testing.assert_allclose(sample.response.logprobs, sample.teacher.logprobs, rtol=0, atol=1e-3)


def test_the_server_s_settings_do_not_change_what_a_run_is(proxy, run, undisturbed):
    assert score(run, proxy.url, "server.concurrency=5", "teacher.served_name=teacher").code == 0
    assert parts(run) == parts(undisturbed)
    recipes = (small_recipe(), small_recipe(*served(proxy.url, "server.api_key_env=ELSE", "teacher.served_name=x")))
    for stage in STAGE_DEPENDENCIES:
        first, second = (fingerprint_settings(recipe, stage) for recipe in recipes)
        assert {key for key in first if first[key] != second.get(key)} <= {"score.engine"}
    result = score(run, "http://127.0.0.1:1/v1", "server.api_key_env=ELSE", "server.timeout_seconds=7")
    assert result.code == 0
    assert "nothing to do" in result.err


def test_no_more_requests_are_under_way_than_asked_for(proxy, rolled_out):
    def slow(asked: Asked) -> None:
        time.sleep(0.1)

    engine = engine_at(proxy.url, "server.concurrency=3")
    proxy.set(slow)
    engine.score(answered(rolled_out), Score(), lambda n: None)
    engine.close()
    assert proxy.most == 3


# ── Faults that pass ─────────────────────────────────────────────────────────────────────────────────────────────────


PASSING = {
    "429": Answer(429, b'{"error": {"message": "slow down"}}'),
    "429, to come back in a second": Answer(429, b"", retry_after="1"),
    "429, to come back at a date": Answer(429, b"", retry_after="Tue, 24 Nov 2026 02:00:00 GMT"),
    "500": Answer(500, b"Internal Server Error"),
    "503": Answer(503, b"<html>no upstream</html>"),
    "a lost connection": drop,
    "a hang": hang,
    "a truncated answer": truncated,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_leaves_no_trace_in_the_result(proxy, run, undisturbed, fault):
    proxy.set(at(2, fault))
    result = score(run, proxy.url, "server.timeout_seconds=1")
    assert result.code == 0, result.err
    assert len(proxy.completions()) == 9
    assert parts(run) == parts(undisturbed)
    assert ("trying again" in result.err) == (fault is not truncated)


@pytest.mark.parametrize("asked_for", [None, "1"])
def test_it_waits_as_long_as_the_server_asks(proxy, rolled_out, asked_for):
    engine = engine_at(proxy.url)
    proxy.set(at(0, Answer(429, b"", asked_for)))
    engine.score(answered(rolled_out)[:1], Score(), lambda n: None)
    engine.close()
    first, second = proxy.completions()
    assert (second - first >= 1) == (asked_for == "1")


def test_a_server_without_tokenize_is_taken_with_a_warning(proxy, run):
    proxy.set(always(Answer(404, b""), "/tokenize"))
    result = score(run, proxy.url)
    assert result.code == 0
    assert "whether the server's tokenizer fits is not checked" in result.err


# ── Faults that stay ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_killed_in_the_middle_and_started_again_the_same_command_ends_the_same(server, proxy, run, undisturbed):
    def kill(asked: Asked) -> Answer:
        if asked.number == 6:
            server.kill()
            server.start()
        return asked.forward()

    proxy.set(always(kill))
    stopped = score(run, proxy.url, "server.concurrency=1")
    assert_clear(stopped, ExitCode.UNAVAILABLE, "no answer in 3 attempts", "run the same command again")
    first, second = parts(undisturbed).items()
    assert parts(run).keys() == {first[0], f"{first[0]}.receipt.json"}
    assert parts(run)[first[0]] == first[1]
    assert sorted(path.name for path in (run / "step-00000/teacher").iterdir()) == sorted(
        [*parts(run), "in_progress.json"]
    )
    server.wait()
    proxy.set(lambda asked: None)
    assert score(run, proxy.url, "server.concurrency=1").code == 0
    assert len(proxy.completions()) == 4  # the second part's alone
    assert dict([first, second]) == parts(run)
    manifests = [path / "step-00000/teacher/manifest.json" for path in (run, undisturbed)]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


STAYING = {
    "429": (Answer(429, b'{"error": {"message": "slow\\ndown"}}'), 3, ["3 attempts", "HTTP 429: slow down"]),
    "503": (Answer(503, b"<html>\nno upstream</html>"), 3, ["3 attempts", "HTTP 503: <html> no upstream"]),
    "an error that shows the key": (Answer(500, f"Bearer {KEY} \x1b[31m".encode()), 3, ["HTTP 500: Bearer ***"]),
    "lost connections": (drop, 3, ["3 attempts"]),
    "a hang": (hang, 3, ["3 attempts", "no answer within 0.3 seconds"]),
}


@pytest.mark.parametrize("name", STAYING)
def test_a_fault_that_stays_ends_as_out_of_reach_after_all_attempts(proxy, run, name):
    fault, count, words = STAYING[name]
    proxy.set(always(fault))
    result = score(run, proxy.url, "server.concurrency=1", "server.timeout_seconds=0.3")
    assert_clear(result, ExitCode.UNAVAILABLE, proxy.url, "trying again, 2 times at most", *words)
    assert len(proxy.completions()) == count
    assert not parts(run)


def choice(change: Callable[[Any], Any]) -> Callable[[Asked], Answer]:
    return edited(lambda content: change(content["choices"][0]))


def last_entry(content: Any) -> dict[str, Any]:
    return next(iter(content["prompt_logprobs"][-1].values()))


BROKEN = {
    "truncated": (truncated, "JSON"),
    "no JSON": (Answer(200, b"<html></html>"), "JSON"),
    "another prompt": (choice(lambda c: c["prompt_token_ids"].reverse()), "other prompt tokens"),
    "log-probs of other ids": (choice(lambda c: c["prompt_logprobs"].append(c["prompt_logprobs"].pop(-2))), "KeyError"),
    "too few log-probs": (choice(lambda c: c["prompt_logprobs"].pop()), "log-probs of 13 +"),
    "no log-probs": (choice(lambda c: c.update(prompt_logprobs=None)), "TypeError"),
    "NaN": (choice(lambda c: last_entry(c).update(logprob=float("nan"))), "a log-prob is nan"),
    "null": (choice(lambda c: last_entry(c).update(logprob=None)), "a log-prob is None"),
    "minus infinity": (choice(lambda c: last_entry(c).update(logprob=-9999.0)), "a log-prob is -9999.0"),
    "a positive log-prob": (choice(lambda c: last_entry(c).update(logprob=0.5)), "a log-prob is 0.5"),
    "two choices": (edited(lambda content: content.update(choices=content["choices"] * 2)), "ValueError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_asked_for_once_more_and_then_refused(proxy, run, name):
    fault, word = BROKEN[name]
    proxy.set(always(fault))
    result = score(run, proxy.url, "server.concurrency=1")
    assert_clear(result, ExitCode.BAD_DATA, "the server's answer is broken, twice over", word)
    assert len(proxy.completions()) == 2
    assert not parts(run)


BROKEN_RESPONSES = {
    "log-probs of other ids": (lambda c: c["token_ids"].reverse(), "log-probs are not those"),
    "too few log-probs": (lambda c: c["logprobs"]["token_logprobs"].pop(), "log-probs are not those"),
    "NaN": (lambda c: c["logprobs"]["token_logprobs"].append(c["logprobs"]["token_logprobs"].pop() * np.nan), "nan"),
    "another reason": (lambda c: c.update(finish_reason="abort"), "ends for `abort`"),
    "ended too early": (lambda c: c.update(finish_reason="stop"), "ends for `stop`"),
}


@pytest.mark.parametrize("name", BROKEN_RESPONSES)
def test_a_broken_response_is_refused(proxy, engine, rolled_out, name):
    change, word = BROKEN_RESPONSES[name]
    proxy.set(always(choice(change)))
    prompt = answered(rolled_out)[0].prompt_ids
    with pytest.raises(OpdctlError, match=f"broken, twice over: .*{word}") as caught:
        engine.generate([Request(prompt, 1)], Sampling(max_tokens=10), 1, print)
    assert caught.value.code == ExitCode.BAD_DATA


def test_a_server_that_gives_no_token_ids_is_refused_at_once(proxy, run):
    proxy.set(always(choice(lambda c: c.pop("prompt_token_ids"))))
    result = score(run, proxy.url, "server.concurrency=1")
    assert_clear(result, ExitCode.USAGE, "no token ids", "0.10.2")
    assert len(proxy.completions()) == 1


# ── What stops at once ───────────────────────────────────────────────────────────────────────────────────────────────


def holding(folder: Path, secret: str) -> list[Path]:
    """Return the files that have `secret` in them."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("key", ["a-wrong-key", ""])
def test_a_wrong_key_stops_at_once_and_is_shown_nowhere(proxy, run, monkeypatch, key):
    monkeypatch.setenv("OPDCTL_API_KEY", key)
    result = score(run, proxy.url)
    what = "the API key is refused" if key else "the server wants an API key"
    assert_clear(result, ExitCode.USAGE, "HTTP 401", what, "OPDCTL_API_KEY")
    assert proxy.seen == ["/v1/models"]
    assert not key or (key not in result.err + result.out and not holding(run, key))


def test_a_key_that_the_server_says_back_is_not_shown(proxy, run, undisturbed):
    proxy.set(lambda asked: Answer(403, f'{{"error": "not {asked.key}"}}'.encode()))
    assert_clear(score(run, proxy.url), ExitCode.USAGE, "HTTP 403")
    assert not holding(run, KEY)
    assert not holding(undisturbed, KEY)


def test_a_key_that_no_header_may_have_is_not_shown(proxy, run, monkeypatch):
    monkeypatch.setenv("OPDCTL_API_KEY", "schlüssel")
    result = score(run, proxy.url)
    assert result.code == ExitCode.USAGE
    assert "characters" in result.err
    assert "schl" not in result.err


def test_a_password_in_the_address_is_refused_before_anything_is_written(tmp_path):
    result = score(tmp_path / "run", "https://me:hunter2@host/v1")
    assert result.code == ExitCode.USAGE
    assert "teacher.server" in result.err
    assert "hunter2" not in result.err
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_not_served_stops_with_those_that_are(proxy, run):
    result = score(run, proxy.url, "teacher.served_name=taecher")
    assert_clear(result, ExitCode.USAGE, "no model `taecher`", "it serves `teacher`", "teacher.served_name")
    assert proxy.seen == ["/v1/models"]


def test_too_short_a_context_stops_with_the_numbers(proxy, run):
    def shorten(content: Any) -> None:
        content["data"][0]["max_model_len"] = 50

    proxy.set(always(edited(shorten), "/v1/models"))
    longest = max(len(each.response_ids) for each in answered(run)[:4])
    needed = f"takes 50 tokens, but {13 + longest} + 1 are needed"
    assert_clear(score(run, proxy.url), ExitCode.USAGE, needed, f"--max-model-len {14 + longest}")
    assert not proxy.completions()


def test_too_short_a_context_that_the_server_does_not_tell_of_stops_with_its_own_words(proxy, rolled_out):
    def keep_quiet(content: Any) -> None:
        del content["data"][0]["max_model_len"]

    proxy.set(always(edited(keep_quiet), "/v1/models"))
    engine = engine_at(proxy.url)
    with pytest.raises(OpdctlError, match=f"HTTP 400: .*{CONTEXT}"):
        engine.generate([Request(answered(rolled_out)[0].prompt_ids, 1)], Sampling(max_tokens=300), 1, print)
    engine.close()
    assert len(proxy.completions()) == 1


def test_another_tokenizer_stops(proxy, tmp_path):
    other = Path(shutil.copytree(teacher().path, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(OpdctlError, match="tokenizer is not that of"):
        engine_at(proxy.url, f"teacher.model={other}")
    assert not proxy.completions()


def test_a_server_that_is_none_of_vllm_s_stops_at_once(run):
    stranger = Proxy()
    try:
        stranger.set(lambda asked: Answer(404, b"<html>not found</html>"))
        result = score(run, stranger.url)
        assert_clear(result, ExitCode.USAGE, "HTTP 404", "not found", "is teacher.server the whole address")
        assert stranger.seen == ["/v1/models"]
        stranger.set(lambda asked: Answer(200, b"<html>welcome</html>"))
        assert_clear(score(run, stranger.url), ExitCode.BAD_DATA, "answer is broken")
        stranger.set(lambda asked: Answer(302, b"moved"))
        assert_clear(score(run, stranger.url), ExitCode.USAGE, "HTTP 302", "the whole address")
    finally:
        stranger.server_close()


def test_a_server_that_is_not_there_ends_as_out_of_reach(run):
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        assert_clear(score(run, url), ExitCode.UNAVAILABLE, url, "3 attempts", "run the same command again")
    assert not parts(run)


def test_no_address_is_said(run):
    common = ["--recipe", QUICKSTART, *sets("score.engine=server"), "--output", run]
    assert_clear(invoke("score-teacher", *common), ExitCode.USAGE, "teacher.server is not set", "http://host:8000/v1")
    assert "teacher.server" in invoke("score-teacher", *common, "--set", "teacher.server=host:8000").err


def test_a_certificate_of_its_own_is_refused_unless_it_is_named(server, run, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl, to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    proxy = Proxy(server.port)
    proxy.scheme, proxy.socket = "https", context.wrap_socket(proxy.socket, server_side=True)
    try:
        assert_clear(score(run, proxy.url), ExitCode.UNAVAILABLE, "CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE")
        assert not proxy.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert score(run, proxy.url).code == 0
    finally:
        proxy.server_close()


def test_a_cluster_s_signal_stops_it_with_75(proxy, run):
    asked = threading.Event()

    def wait(_: Asked) -> Answer:
        asked.set()
        return hang(_)

    proxy.set(always(wait))
    words = ["score-teacher", "--recipe", QUICKSTART, *sets(*served(proxy.url)), "--output", run]
    command = [sys.executable, "-m", "opdctl", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert asked.wait(60)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=30)
    assert running.returncode == ExitCode.REQUEUE, said
    assert "run the same command again to go on" in said
    assert "Traceback" not in said
