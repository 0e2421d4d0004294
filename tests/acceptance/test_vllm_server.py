"""The engine `server` with a vLLM server on this machine, behind a proxy that injects faults."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets, small_recipe
from helpers.sampling import logprobs_of
from helpers.servers import (
    KEY,
    Answer,
    Proxy,
    Received,
    always,
    ask,
    assert_reported,
    at,
    drop,
    edited,
    engine_at,
    hang,
    parts,
    score,
    server_settings,
    teacher,
    truncated,
)

from opdctl import console
from opdctl.artifacts.records import ExportedResponse, GradedResponse, Response, sample_seed
from opdctl.artifacts.tables import read_rows
from opdctl.engines import http
from opdctl.engines import server as server_engine
from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.stop_strings import StopSearch
from opdctl.engines.transformers import TransformersEngine
from opdctl.environment import has_vllm
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.models.loading import load_model
from opdctl.recipe.dependencies import STAGE_DEPENDENCIES, fingerprint_settings
from opdctl.recipe.schema import Model, RolloutColumns, Sampling, Score
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored

pytestmark = pytest.mark.skipif(not has_vllm(), reason="needs vLLM, which `make test` installs where it can")

CONTEXT = 256


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Vllm:
    """A vLLM server with the toy teacher, in a separate process group."""

    def __init__(self, folder: Path):
        # Without the chat template: at its start the server tests it with words that this tokenizer cannot encode.
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
            # The module that `vllm serve` runs; in the CPU build that command does not find its version.
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until the server is healthy."""
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


# ── Fixtures ─────────── ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(http, "FIRST_RETRY_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(http, "MAX_RETRY_PAUSE_SECONDS", 2.0)
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
    _proxy.set(lambda received: None)
    return _proxy


@pytest.fixture
def engine(proxy):
    engine = engine_at(proxy.url)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def rolled_out(tmp_path_factory) -> Path:
    """A run whose first step has eight responses in two parts."""
    path = tmp_path_factory.mktemp("rolled-out") / "run"
    assert invoke("rollout", "--recipe", QUICKSTART, *sets("score.engine=server"), "--output", path).code == 0
    return path


@pytest.fixture
def run(rolled_out, tmp_path) -> Path:
    return Path(shutil.copytree(rolled_out, tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(rolled_out, server, tmp_path_factory) -> Path:
    """The same run, scored without faults, one request at a time."""
    path = Path(shutil.copytree(rolled_out, tmp_path_factory.mktemp("undisturbed") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPDCTL_API_KEY", KEY)
        result = score(path, f"http://127.0.0.1:{server.port}/v1", "server.concurrency=1")
    assert result.code == 0, result.err
    return path


def answered(run: Path) -> list[ScoreRequest]:
    rows = Run.load(run).rollout_stage(0).read_all(Response)
    return [ScoreRequest(row.prompt_ids, row.response_ids) for row in rows]


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_scores_are_those_of_the_transformers_engine(engine, rolled_out):
    wanted = TransformersEngine(teacher(), "cpu").score(answered(rolled_out), Score(top_k=5), lambda n: None)
    progress: list[int] = []
    found = engine.score(answered(rolled_out), Score(top_k=5), progress.append)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-3)
        np.testing.assert_allclose(ours.top_logprobs, theirs.top_logprobs, rtol=0, atol=1e-3)
        assert np.mean(ours.top_ids == theirs.top_ids) > 0.99  # the rest are ties
    assert sum(progress) == 8


@pytest.mark.parametrize("engine_name", ["server", "vllm"])
def test_files_are_scored_as_in_a_run(engine_name, undisturbed, server, tmp_path, monkeypatch):
    """By a server to the bit; by vLLM in a process of ours within rounding."""
    monkeypatch.chdir(tmp_path)
    assert invoke("run", "export", undisturbed, "exported.parquet").code == 0
    settings = ("teacher.dtype=float32", f"score.engine={engine_name}", "server.concurrency=1", "pipeline.threads=1")
    settings += (f"teacher.server=http://127.0.0.1:{server.port}/v1",) * (engine_name == "server")
    options = [word for setting in settings for word in ("--set", setting)]
    words = ["--input", "exported.parquet", "--teacher", "toy:teacher", "--output", "scored"]
    result = invoke("score-teacher", *words, *options)
    assert result.code == 0, result.err
    (part,) = Path("scored").glob("part-*.parquet")
    expected, found = (read_rows(Path(name), ExportedResponse) for name in ("exported.parquet", part))
    assert len(found) == 8
    for row, other in zip(found, expected, strict=True):
        tolerance = 0 if engine_name == "server" else 1e-4
        np.testing.assert_allclose(row.teacher_logprobs, other.teacher_logprobs, rtol=0, atol=tolerance)


def test_padding_rows_have_the_measured_probability_and_are_not_sampled(proxy, rolled_out, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(console, "info", messages.append)
    monkeypatch.setattr(server_engine, "MAX_PADDING_NATS", np.inf)
    monkeypatch.setattr(server_engine, "PADDING_SAMPLE_SIZE", 56)
    request = answered(rolled_out)[0]
    response = request.response_ids[:9]
    vocab_size = int(response[4])  # the ids from the likely next token on are called padding
    with torch.no_grad():
        context = torch.from_numpy(np.concatenate([request.prompt_ids, response[:4]]).astype(np.int64))
        p_V = load_model(teacher(), device="cpu")(context[None]).logits[0, -1].softmax(-1)
    engine = engine_at(proxy.url, vocab_size=vocab_size)
    engine._measure_padding([context.numpy()])
    (completion,) = engine.generate([Request(context.numpy(), 1)], Sampling(max_tokens=20), 1, lambda n: None)
    assert completion.response_ids.max() < vocab_size
    engine.close()
    (probability,) = (float(word) for word in re.findall(r"probability ([0-9.e-]+),", messages[0]))
    assert probability == pytest.approx(float(p_V[vocab_size:].sum()), rel=0.05)


def test_seed_determines_response_and_logprobs(engine):
    rng = np.random.default_rng(7)  # no training prompts: with those every seed gives the same response
    prompts = [rng.choice(np.arange(2, 28), 13, replace=False).astype(np.int32) for _ in range(8)]
    requests = [Request(prompt, sample_seed(0, f"sample {i}")) for i, prompt in enumerate(prompts)]
    once, again = (
        engine.generate(requests, Sampling(max_tokens=120), 256, lambda n: None, columns=RolloutColumns(top_k=k))
        for k in (3, 0)
    )
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


def test_sampling_settings_and_ends_are_those_of_the_other_engines(engine):
    """Each sampled token is one that the reference can sample. The same seed gives the same tokens up to an end."""
    rng, tokenizer = np.random.default_rng(7), teacher().tokenizer
    requests = [Request(rng.choice(np.arange(2, 28), 13, replace=False).astype(np.int32), n) for n in range(6)]
    settings = {"temperature": 1.5, "top_k": 4, "min_p": 0.01, "repetition_penalty": 1.3, "presence_penalty": 0.5}
    sampling = Sampling(max_tokens=40, **settings)
    complete = engine.generate(requests, sampling, 256, lambda n: None)
    model = load_model(teacher(), device="cpu")
    for request, done in zip(requests, complete, strict=True):
        assert np.isfinite(logprobs_of(model, request, done, sampling)[1]).all()
    stop = [tokenizer.decode(complete[0].response_ids[5:7])]
    ending = sampling.model_copy(update={"stop": stop})
    for before, after in zip(complete, engine.generate(requests, ending, 256, lambda n: None), strict=True):
        search = StopSearch(tokenizer, stop)
        count = next((n for n, token in enumerate(before.response_ids, 1) if search.add(int(token))), None)
        np.testing.assert_array_equal(after.response_ids, before.response_ids[:count])
        assert after.finish_reason == ("stop" if count else before.finish_reason)
        assert len(after.logprobs) == len(after.response_ids)
    ids = complete[0].response_ids.tolist()
    ending = sampling.model_copy(update={"stop_token_ids": [ids[6]]})
    (ended,) = engine.generate(requests[:1], ending, 256, lambda n: None)
    assert (ended.response_ids.tolist(), ended.finish_reason) == (ids[: ids.index(ids[6]) + 1], "stop")


def test_unsupported_settings_are_rejected(engine, rolled_out):
    for name in ("entropy", "student_top_k", "hidden_states"):
        with pytest.raises(OpdctlError, match=f"score.{name}") as caught:
            engine.score(answered(rolled_out), Score(**{name: True}), print)
        assert caught.value.kind == "unsupported_setting"
        assert "transformers" in caught.value.hint
    with pytest.raises(OpdctlError, match=r"rollout\.entropy") as caught:
        engine.generate([], Sampling(), 1, print, columns=RolloutColumns(entropy=True))
    assert caught.value.kind == "unsupported_setting"
    with pytest.raises(OpdctlError, match="rollout: temperature") as caught:
        engine.generate([], Sampling(temperature=0.5), 1, print, columns=RolloutColumns(top_k=2))
    assert caught.value.kind == "unsupported_setting"


def test_weights_of_another_model_are_rejected(engine):
    engine.load_weights(teacher())
    with pytest.raises(OpdctlError, match="student") as caught:
        engine.load_weights(ModelDir(find_or_download(Model(model="toy:student"), "model"), "float32"))
    assert caught.value.kind == "unsupported_setting"
    assert "rollout.engine" in caught.value.hint


def test_served_student_samples_and_is_evaluated_but_cannot_be_trained(proxy, tmp_path):
    student = ("student.model=toy:teacher", f"student.server={proxy.url}", "rollout.engine=server")
    common = ["--recipe", QUICKSTART, *sets(*student), "--output", tmp_path / "run"]
    for command in ("rollout", "eval"):
        result = invoke(command, *common)
        assert result.code == 0, result.err
    for command in (["train"], ["rollout"], ["eval", "--model", teacher().path.parent / "student"]):
        result = invoke(*command, *common)
        assert result.code == ExitCode.USAGE, command  # `rollout` is now one of step 1
        assert result.kind == "unsupported_setting", command
    run = Run.load(tmp_path / "run")
    graded = read_rows(run.path / "eval/sort12/step-00000/part-00000-of-00001.parquet", GradedResponse)
    assert len(graded) == 8
    assert np.mean([row.correct for row in graded]) > 0.5
    assert run.rollout_stage(0).manifest()["logprob_metadata"]["engine"] == "server"
    for sample in read_scored(run, 0):  # scored by the transformers engine with the same model
        np.testing.assert_allclose(sample.response.logprobs, sample.teacher.logprobs, rtol=0, atol=1e-3)


def test_server_settings_are_not_part_of_the_fingerprint(proxy, run, undisturbed):
    assert score(run, proxy.url, "server.concurrency=5", "teacher.served_name=teacher").code == 0
    assert parts(run) == parts(undisturbed)
    recipes = (
        small_recipe(),
        small_recipe(*server_settings(proxy.url, "server.api_key_env=ELSE", "teacher.served_name=x")),
    )
    for stage in STAGE_DEPENDENCIES:
        first, second = (fingerprint_settings(recipe, stage) for recipe in recipes)
        assert {key for key in first if first[key] != second.get(key)} <= {"score.engine"}
    result = score(run, "http://127.0.0.1:1/v1", "server.api_key_env=ELSE", "server.timeout_seconds=7")
    assert result.code == 0
    assert "nothing to do" in result.err


def test_concurrency_is_limited(proxy, rolled_out):
    def slow(received: Received) -> None:
        time.sleep(0.1)

    engine = engine_at(proxy.url, "server.concurrency=3")
    proxy.set(slow)
    engine.score(answered(rolled_out), Score(), lambda n: None)
    engine.close()
    assert proxy.most == 3


# ── Temporary faults ────────────────────────────────────────────────────────────────────────────────────────────────


PASSING = {
    "429": Answer(429, b'{"error": {"message": "slow down"}}'),
    "429, retry after a second": Answer(429, b"", retry_after="1"),
    "429, retry after a date": Answer(429, b"", retry_after="Tue, 24 Nov 2026 02:00:00 GMT"),
    "500": Answer(500, b"Internal Server Error"),
    "503": Answer(503, b"<html>no upstream</html>"),
    "a lost connection": drop,
    "a hang": hang,
    "a truncated answer": truncated,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_temporary_fault_does_not_change_the_result(proxy, run, undisturbed, fault):
    proxy.set(at(2, fault))
    result = score(run, proxy.url, "server.timeout_seconds=1")
    assert result.code == 0, result.err
    assert len(proxy.completions()) == 9
    assert parts(run) == parts(undisturbed)
    assert ("retrying" in result.err) == (fault is not truncated)


@pytest.mark.parametrize("retry_after", [None, "1"])
def test_retry_after_is_respected(proxy, rolled_out, retry_after):
    engine = engine_at(proxy.url)
    proxy.set(at(0, Answer(429, b"", retry_after)))
    engine.score(answered(rolled_out)[:1], Score(), lambda n: None)
    engine.close()
    first, second = proxy.completions()
    assert (second - first >= 1) == (retry_after == "1")


def test_missing_tokenize_endpoint_is_a_warning(proxy, run):
    proxy.set(always(Answer(404, b""), "/tokenize"))
    result = score(run, proxy.url)
    assert result.code == 0
    assert result.err.startswith("warning: ")
    assert "/tokenize" in result.err


# ── Permanent faults ────────────────────────────────────────────────────────────────────────────────────────────────


def test_resuming_after_the_server_was_killed_gives_the_same_bytes(server, proxy, run, undisturbed):
    def kill(received: Received) -> Answer:
        if received.number == 6:
            server.kill()
            server.start()
        return received.forward()

    proxy.set(always(kill))
    stopped = score(run, proxy.url, "server.concurrency=1")
    assert_reported(stopped, "unavailable_server", "3 attempts", "run the same command again")
    first, second = parts(undisturbed).items()
    assert parts(run).keys() == {first[0], f"{first[0]}.receipt.json"}
    assert parts(run)[first[0]] == first[1]
    assert sorted(path.name for path in (run / "step-00000/teacher").iterdir()) == sorted(
        [*parts(run), "in_progress.json"]
    )
    server.wait()
    proxy.set(lambda received: None)
    assert score(run, proxy.url, "server.concurrency=1").code == 0
    assert len(proxy.completions()) == 4  # those of the second part
    assert dict([first, second]) == parts(run)
    manifests = [path / "step-00000/teacher/manifest.json" for path in (run, undisturbed)]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()


STAYING = {
    "429": (Answer(429, b'{"error": {"message": "slow\\ndown"}}'), 3, ["3 attempts", "HTTP 429: slow down"]),
    "503": (Answer(503, b"<html>\nno upstream</html>"), 3, ["3 attempts", "HTTP 503: <html> no upstream"]),
    "an error with the key": (Answer(500, f"Bearer {KEY} \x1b[31m".encode()), 3, ["a message that is not shown"]),
    "lost connections": (drop, 3, ["3 attempts"]),
    "a hang": (hang, 3, ["3 attempts", "within 0.3 seconds"]),
}


@pytest.mark.parametrize("name", STAYING)
def test_permanent_fault_is_an_unavailable_server_after_all_attempts(proxy, run, name):
    fault, count, words = STAYING[name]
    proxy.set(always(fault))
    result = score(run, proxy.url, "server.concurrency=1", "server.timeout_seconds=0.3")
    assert_reported(result, "unavailable_server", proxy.url, "retrying up to 2 times", *words)
    assert len(proxy.completions()) == count
    assert not parts(run)


def choice(change: Callable[[Any], Any]) -> Callable[[Received], Answer]:
    return edited(lambda content: change(content["choices"][0]))


def last_entry(content: Any) -> dict[str, Any]:
    return next(iter(content["prompt_logprobs"][-1].values()))


MALFORMED = {
    "truncated": (truncated, "JSON"),
    "no JSON": (Answer(200, b"<html></html>"), "JSON"),
    "another prompt": (choice(lambda c: c["prompt_token_ids"].reverse()), "prompt token ids"),
    "log-probs of other ids": (choice(lambda c: c["prompt_logprobs"].append(c["prompt_logprobs"].pop(-2))), "KeyError"),
    "too few log-probs": (choice(lambda c: c["prompt_logprobs"].pop()), "13 + "),
    "no log-probs": (choice(lambda c: c.update(prompt_logprobs=None)), "TypeError"),
    "NaN": (choice(lambda c: last_entry(c).update(logprob=float("nan"))), "log-prob nan"),
    "null": (choice(lambda c: last_entry(c).update(logprob=None)), "log-probs of the type NoneType"),
    "minus infinity": (choice(lambda c: last_entry(c).update(logprob=-9999.0)), "log-prob -9999.0"),
    "a positive log-prob": (choice(lambda c: last_entry(c).update(logprob=0.5)), "log-prob 0.5"),
    "two choices": (edited(lambda content: content.update(choices=content["choices"] * 2)), "ValueError"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_response_is_requested_once_more(proxy, run, name):
    fault, word = MALFORMED[name]
    proxy.set(always(fault))
    result = score(run, proxy.url, "server.concurrency=1")
    assert_reported(result, "malformed_response", word)
    assert len(proxy.completions()) == 2
    assert not parts(run)


MALFORMED_COMPLETIONS = {
    "log-probs of other ids": (lambda c: c["token_ids"].reverse(), "do not belong"),
    "too few log-probs": (lambda c: c["logprobs"]["token_logprobs"].pop(), "do not belong"),
    "NaN": (lambda c: c["logprobs"]["token_logprobs"].append(c["logprobs"]["token_logprobs"].pop() * np.nan), "nan"),
    "another reason": (lambda c: c.update(finish_reason="abort"), "`abort`"),
    "ended too early": (lambda c: c.update(finish_reason="stop"), "`stop`"),
}


@pytest.mark.parametrize("name", MALFORMED_COMPLETIONS)
def test_malformed_completion_is_rejected(proxy, engine, rolled_out, name):
    change, word = MALFORMED_COMPLETIONS[name]
    proxy.set(always(choice(change)))
    prompt = answered(rolled_out)[0].prompt_ids
    with pytest.raises(OpdctlError, match=word) as caught:
        engine.generate([Request(prompt, 1)], Sampling(max_tokens=10), 1, print)
    assert caught.value.kind == "malformed_response"


def test_server_without_token_ids_is_rejected(proxy, run):
    proxy.set(always(choice(lambda c: c.pop("prompt_token_ids"))))
    result = score(run, proxy.url, "server.concurrency=1")
    assert_reported(result, "unsupported_setting", "token ids", "0.10.2")
    assert len(proxy.completions()) == 1


# ── Errors without retry ─────────────────────────────────────────────────────────────────────────────────────────────


def holding(folder: Path, secret: str) -> list[Path]:
    """Return the files that contain `secret`."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("key", ["a-wrong-key", ""])
def test_wrong_key_is_rejected_and_never_printed(proxy, run, monkeypatch, key):
    monkeypatch.setenv("OPDCTL_API_KEY", key)
    result = score(run, proxy.url)
    reason = "rejects" if key else "requires"
    assert_reported(result, "rejected_request", "HTTP 401", reason, "OPDCTL_API_KEY")
    assert proxy.seen == ["/v1/models"]
    assert not key or (key not in result.err + result.out and not holding(run, key))


def test_key_in_the_server_s_message_is_not_printed(proxy, run, undisturbed):
    proxy.set(lambda received: Answer(403, f'{{"error": "not {received.key}"}}'.encode()))
    assert_reported(score(run, proxy.url), "rejected_request", "HTTP 403")
    assert not holding(run, KEY)
    assert not holding(undisturbed, KEY)


def test_key_that_no_header_can_contain_is_not_printed(proxy, run, monkeypatch):
    monkeypatch.setenv("OPDCTL_API_KEY", "schlüssel")
    result = score(run, proxy.url)
    assert result.kind == "invalid_usage"
    assert "OPDCTL_API_KEY" in result.err
    assert "schl" not in result.err


def test_unknown_model_name_lists_the_served_models(proxy, run):
    result = score(run, proxy.url, "teacher.served_name=taecher")
    assert_reported(result, "missing_model", "`taecher`", "`teacher`", "teacher.served_name")
    assert proxy.seen == ["/v1/models"]


def test_too_short_context_is_reported_with_the_lengths(proxy, run):
    def shorten(content: Any) -> None:
        content["data"][0]["max_model_len"] = 50

    proxy.set(always(edited(shorten), "/v1/models"))
    first = len(answered(run)[0].response_ids)
    lengths = (f"{13 + first} + 1 tokens", "50", "--max-model-len 174")  # of the recipe's longest sequence
    assert_reported(score(run, proxy.url), "unsupported_setting", *lengths)
    assert not proxy.completions()


def test_too_short_context_without_a_reported_length(proxy, rolled_out):
    def remove_length(content: Any) -> None:
        del content["data"][0]["max_model_len"]

    proxy.set(always(edited(remove_length), "/v1/models"))
    engine = engine_at(proxy.url)
    with pytest.raises(OpdctlError, match=f"HTTP 400: .*{CONTEXT}"):
        engine.generate([Request(answered(rolled_out)[0].prompt_ids, 1)], Sampling(max_tokens=300), 1, print)
    engine.close()
    assert len(proxy.completions()) == 1


def test_another_tokenizer_is_rejected(proxy, tmp_path):
    other = Path(shutil.copytree(teacher().path, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(OpdctlError, match=str(other)) as caught:
        engine_at(proxy.url, f"teacher.model={other}")
    assert caught.value.kind == "incompatible_tokenizer"
    assert not proxy.completions()


def test_private_certificate_is_rejected_unless_configured(server, run, tmp_path, monkeypatch):
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
        assert_reported(score(run, proxy.url), "unavailable_server", "CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE")
        assert not proxy.seen
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert score(run, proxy.url).code == 0
    finally:
        proxy.server_close()


def test_sigterm_exits_with_75(proxy, run):
    received = threading.Event()

    def wait(_: Received) -> Answer:
        received.set()
        return hang(_)

    proxy.set(always(wait))
    words = ["score-teacher", "--recipe", QUICKSTART, *sets(*server_settings(proxy.url)), "--output", run]
    command = [sys.executable, "-m", "opdctl", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert received.wait(60)
    running.send_signal(signal.SIGTERM)
    _, stderr = running.communicate(timeout=30)
    assert running.returncode == ExitCode.REQUEUE, stderr
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
