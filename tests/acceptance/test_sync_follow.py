"""Stages on two machines that share no disk meet in a bucket: `opdctl run sync --follow` beside each."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import forks
from helpers.commands import QUICKSTART, artifacts, invoke, sets
from helpers.object_stores import BUCKET, Answer, Request, Store, serve_s3, use

from opdctl.errors import ExitCode
from opdctl.runs import sync
from opdctl.runs.run import Run

URL = f"s3://{BUCKET}/runs/x"
THREE = ("train.steps=3", "rollout.max_tokens=40", "train.keep_latest=9")


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with serve_s3() as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(sync, "SYNC_POLL_SECONDS", 0.2)
    return use(server, monkeypatch)


children: list[int] = []


@pytest.fixture(autouse=True)
def end_children() -> Iterator[None]:
    """Kill the processes of a test that failed."""
    yield
    while children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child := children.pop(), signal.SIGKILL)
            os.waitpid(child, 0)


def start(*words: object) -> int:
    children.append(forks.fork(lambda: invoke(*words).code))
    return children[-1]


def end(child: int) -> int:
    children.remove(child)
    return forks.wait(child)


def until(ready: Callable[[], object]) -> None:
    end = time.monotonic() + forks.MAX_WAIT_SECONDS
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def every(count: int) -> Callable[[Request, Callable[[], Answer]], Answer]:
    """Return a fault that drops the connection of every `count`-th request."""
    number = iter(range(10**9))

    def fault(request: Request, forward: Callable[[], Answer]) -> Answer:
        if next(number) % count == count - 1:
            raise ConnectionResetError
        return forward()

    return fault


def test_stages_on_two_machines_make_the_student_of_one(store: Store, tmp_path: Path) -> None:
    """The first machine samples; the second scores and trains. Every 20th request fails, and a sync is killed."""
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    result = invoke("train", "--recipe", QUICKSTART, *sets(*THREE), "--output", alone)
    assert result.code == 0, result.err
    store.proxy.set(every(20))
    recipe = ("--recipe", QUICKSTART, *sets(*THREE))
    started = {
        "rollout": start("rollout", "--follow", *recipe, "--output", first),
        "first sync": start("run", "sync", "--follow", first, URL),
        "second sync": start("run", "sync", "--follow", URL, second),
    }
    until((second / "run.json").exists)
    started["score"] = start("score-teacher", "--follow", second)
    started["train"] = start("train", "--follow", second)
    until((second / "step-00000/update.json").exists)
    os.kill(started["second sync"], signal.SIGKILL)
    end(started["second sync"])
    started["second sync"] = start("run", "sync", "--follow", second, URL)
    assert {name: end(child) for name, child in started.items()} == dict.fromkeys(started, 0)
    assert artifacts(second) == artifacts(alone)
    for step in (1, 2, 3):
        name = f"student/step-{step:05d}/model.safetensors"
        assert (first / name).read_bytes() == (alone / name).read_bytes()
    assert not (first / "trainer").exists()  # no stage waits for it there
    assert Run.load(first).current_step() == Run.load(second).current_step() == 3
    assert invoke("status", second, "--verify").code == 0
    third = tmp_path / "third"
    assert invoke("run", "sync", URL, third).code == 0
    assert artifacts(third) == artifacts(alone)
    assert invoke("status", third, "--verify").code == 0


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, ExitCode.REQUEUE), (signal.SIGINT, ExitCode.INTERRUPTED)]
)
def test_signal_ends_a_sync_that_follows(number: int, code: int, store: Store, tmp_path: Path) -> None:
    child = start("run", "sync", "--follow", tmp_path / "run", URL)
    until(lambda: list(tmp_path.glob("run/.sync-*.lock")) and len(store.proxy.seen) > 1)
    os.kill(child, number)
    assert end(child) == code
    assert not list(tmp_path.glob("run/.sync-*.lock"))


def test_what_was_removed_here_is_not_fetched_again(
    store: Store, finished_run: Path, finished_copy: Path, tmp_path: Path
) -> None:
    """As by `opdctl run prune`. A sync in one direction fetches it."""
    copy = tmp_path / "copy"
    assert invoke("run", "sync", finished_copy, URL).code == 0
    assert invoke("run", "sync", URL, copy).code == 0
    (copy / "student/step-00001/model.safetensors").unlink()
    assert invoke("run", "sync", "--follow", copy, URL).code == 0
    assert not (copy / "student/step-00001/model.safetensors").exists()
    assert invoke("run", "sync", URL, copy).code == 0
    assert artifacts(copy) == artifacts(finished_run)


def test_object_that_is_replaced_while_it_is_fetched_is_fetched_again(
    store: Store, finished_run: Path, finished_copy: Path, tmp_path: Path
) -> None:
    """The other machine sends a newer version between the list and the request."""
    assert invoke("run", "sync", finished_copy, URL).code == 0
    grown: list[str] = []

    def fault(request: Request, forward: Callable[[], Answer]) -> Answer:
        answer = forward()
        if request.name.endswith("metrics.jsonl") and not grown:
            grown.append(request.name)
            return Answer(answer.status, answer.headers, answer.body + b"x" * 10_000)
        return answer

    store.proxy.set(fault)
    result = invoke("run", "sync", "--follow", URL, tmp_path / "copy")
    assert result.code == 0, result.err
    assert grown
    assert (tmp_path / "copy/metrics.jsonl").read_bytes() == (finished_run / "metrics.jsonl").read_bytes()
