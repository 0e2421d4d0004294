import itertools
import os
import signal
import threading
from dataclasses import replace

import pytest
from helpers.stages import fill, stage

from opdctl.artifacts import leases
from opdctl.artifacts.stage_dir import Fingerprint, PartMakers, StageDir
from opdctl.runs.stage_loop import Part, StageWork, make_missing_parts


@pytest.fixture
def loop(tmp_path):
    """A function that makes the missing parts of a stage; `.log` lists what it called."""
    log = []

    def prepare():
        log.append("prepare")

        def open_part(index):
            log.append(index)
            return [index], lambda results: Part(lambda path: path.write_text(results[0]), rows=1, tokens=2)

        def process(requests):
            for number, index in enumerate(requests):
                yield number, f"part {index}"

        return StageWork({"engine": "test"}, open_part, process, across_parts=False)

    def run(made=None, *, wait=False, prepare=prepare):
        return make_missing_parts(made or stage(tmp_path / "s"), "rollout", 3, prepare, wait=wait)

    run.log, run.prepare = log, prepare
    return run


def test_missing_parts_are_made_and_the_stage_is_finished(loop, tmp_path):
    fill(stage(tmp_path / "s"), 1)
    assert loop() == 2
    assert loop.log == ["prepare", 0, 2]
    assert stage(tmp_path / "s").is_finished()
    assert [part["tokens"] for part in stage(tmp_path / "s").manifest()["parts"]] == [2, 10, 2]


def test_first_part_waits_for_the_fingerprint_and_no_request_does(loop, tmp_path):
    known = stage(tmp_path / "s").fingerprint

    def find() -> Fingerprint:
        loop.log.append("fingerprint")
        assert not (tmp_path / "s").exists()
        return known

    waiting = stage(tmp_path / "s")
    waiting._fingerprint = find
    assert loop(waiting) == 3
    assert loop.log == ["prepare", 0, "fingerprint", 1, 2]
    assert stage(tmp_path / "s").is_finished()


def test_engine_is_not_prepared_for_a_finished_stage(loop):
    loop()
    loop.log.clear()
    assert loop() == 0
    assert loop.log == []


def test_engine_is_not_prepared_while_others_make_every_part(loop, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    with stage(tmp_path / "s", parts=1).claim_parts() as parts:
        next(parts)
        assert loop(stage(tmp_path / "s", parts=1)) == 0
    assert loop.log == []


def test_removed_part_of_a_finished_stage_is_reported_and_regenerated(loop, tmp_path, capsys):
    loop()
    made = stage(tmp_path / "s")
    path = tmp_path / "s" / made.names[1]
    data = path.read_bytes()
    path.unlink()
    assert loop() == 1
    assert path.read_bytes() == data
    assert str(path) in capsys.readouterr().err


def stop_at(loop, index, error):
    """Return `prepare` of a loop whose part `index` is interrupted."""

    def prepare():
        work = loop.prepare()

        def process(requests):
            for number, result in work.process(requests):
                if result == f"part {index}":
                    raise error
                yield number, result

        return replace(work, process=process)

    return prepare


@pytest.mark.parametrize("error", [RuntimeError("engine"), KeyboardInterrupt(), SystemExit(3)])
def test_interruption_keeps_finished_parts_and_releases_the_lease(loop, tmp_path, error):
    with pytest.raises(type(error)):
        loop(prepare=stop_at(loop, 1, error))
    made = stage(tmp_path / "s")
    assert made.missing() == [1, 2]
    assert not list(tmp_path.glob(".*.lock"))
    assert not list((tmp_path / "s").glob(".tmp*"))
    assert loop() == 2
    assert made.is_finished()


def test_failing_engine_leaves_no_lease_and_no_directory(loop, tmp_path):
    def fail():
        raise RuntimeError("no engine")

    with pytest.raises(RuntimeError, match="no engine"):
        loop(prepare=fail)
    assert not list(tmp_path.iterdir())


def test_interrupt_while_waiting_for_another_worker(loop, tmp_path):
    """Ctrl-C reaches a worker that waits for the part of another one."""
    other, waiting = stage(tmp_path / "s", parts=1), stage(tmp_path / "s", parts=1)
    with other.claim_parts() as parts:
        next(parts)
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            loop(waiting, wait=True)
        signal.signal(signal.SIGALRM, before)
        assert [path.name for path in tmp_path.glob(".*.lock")] == [".s-part-00000.lock"]
        assert other._leases[0].is_held()
    assert not list(tmp_path.glob(".*.lock"))


# ── Streams across parts ─────────────────────────────────────────────────────────────────────────────────────────────


class Engine:
    """Processes `at_once` requests, numbers of seconds, at a time; the shortest ends first. Records what happens."""

    def __init__(self, made, at_once, parts):
        self.made, self.at_once, self.parts, self.events, self.in_work = made, at_once, parts, [], []

    def work(self):
        def open_part(index):
            self.events.append(f"open {index}")

            def build(results):
                assert results == [f"{seconds} s" for seconds in self.parts[index]]
                self.events.append(f"build {index}")
                return Part(lambda path: path.write_text(f"part {index}"), rows=len(results), tokens=1)

            return self.parts[index], build

        return StageWork({"engine": "test"}, open_part, self.process, across_parts=True)

    def process(self, requests):
        waiting, running = enumerate(requests), {}
        while True:
            for number, seconds in itertools.islice(waiting, self.at_once - len(running)):
                running[number] = seconds
            if not running:
                return
            self.in_work.append(len(running))
            number = min(running, key=lambda each: (running[each], each))
            yield number, f"{running.pop(number)} s"


def make(made, at_once, parts, *, wait=False):
    engine = Engine(made, at_once, parts)
    make_missing_parts(made, "rollout", sum(map(len, parts)), engine.work, wait=wait)
    return engine


def test_next_part_is_claimed_when_there_is_room_and_a_part_is_written_when_it_is_finished(tmp_path):
    made = stage(tmp_path / "s")
    engine = make(made, 2, [[1, 9], [1, 1], [1, 1]])
    assert engine.events == ["open 0", "open 1", "build 1", "open 2", "build 2", "build 0"]
    assert engine.in_work == [2, 2, 2, 2, 2, 1]  # never fewer than there is room for, until the end
    assert made.is_finished()
    assert [made.verify(index).read_text() for index in range(3)] == ["part 0", "part 1", "part 2"]


def test_parts_without_requests_are_written(tmp_path):
    for parts in ([[], [1], []], [[], [], []]):
        made = stage(tmp_path / str(len(parts[1])))
        make(made, 2, parts)
        assert made.is_finished()


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_error_leaves_the_finished_parts_and_no_lease(tmp_path, error):
    made, closed = stage(tmp_path / "s"), []
    work = Engine(made, 2, [[1, 1], [2, 9], [3, 3]]).work()

    def process(requests):
        try:
            for number, result in work.process(requests):
                if result == "3 s":
                    raise error
                yield number, result
        finally:
            closed.append(True)

    with pytest.raises(type(error)):
        make_missing_parts(made, "rollout", 6, lambda: replace(work, process=process))
    assert made.missing() == [1, 2]
    assert closed
    assert not list(tmp_path.glob(".*.lock"))
    assert not list((tmp_path / "s").glob(".tmp*"))


def test_error_while_a_part_is_written_closes_the_engine_s_stream(tmp_path, monkeypatch):
    made = stage(tmp_path / "s")
    work = Engine(made, 6, [[1, 1], [2, 9], [3, 3]]).work()
    closed = []

    def process(requests):
        try:
            yield from work.process(requests)
        finally:
            closed.append(True)

    def full(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(made, "write", full)
    with pytest.raises(OSError, match="disk full"):
        make_missing_parts(made, "rollout", 6, lambda: replace(work, process=process))
    assert closed


def test_parts_of_this_worker_are_written_while_another_one_has_the_rest(tmp_path):
    """The engine finishes its own parts before the worker waits for those of others."""
    made, other = stage(tmp_path / "s"), stage(tmp_path / "s")
    with other.claim_parts() as theirs:
        assert next(theirs) == 0
        engine = Engine(made, 9, [[1], [1, 9], [1]])

        def finish(index, *arguments, **options):
            written = StageDir.write(made, index, *arguments, **options)
            if set(made.missing()) == {0}:
                fill(other, 0)
            return written

        made.write = finish
        make_missing_parts(made, "rollout", 4, engine.work, wait=True)
    assert engine.events == ["open 1", "open 2", "build 2", "build 1"]
    assert made.is_finished()


def test_process_without_an_engine_waits_for_those_that_have_one(tmp_path):
    made = stage(tmp_path / "s")
    options = {"wait": False, "makers": PartMakers(is_here=False)}
    assert make_missing_parts(made, "rollout", 3, lambda: pytest.fail("no engine"), **options) == 0
    worker = threading.Thread(target=lambda: make(stage(tmp_path / "s"), 2, [[1], [2], [3]]))
    worker.start()
    options["wait"] = True
    assert make_missing_parts(made, "rollout", 3, lambda: pytest.fail("no engine"), **options) == 0
    assert made.is_finished()
    worker.join()
