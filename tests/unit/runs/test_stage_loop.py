import os
import signal

import pytest
from helpers.stages import fill, stage

from opdctl.artifacts import leases
from opdctl.runs.stage_loop import Part, make_missing_parts


@pytest.fixture
def loop(tmp_path):
    """A function that makes the missing parts of a stage; `.log` lists what it called."""
    log = []

    def prepare():
        log.append("prepare")

        def make_part(index, on_progress):
            log.append(index)
            on_progress(1)
            return Part(lambda path: path.write_text(f"part {index}"), rows=1, tokens=2)

        return {"engine": "test"}, make_part

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
        metadata, make_part = loop.prepare()

        def interrupted(part, on_progress):
            if part == index:
                raise error
            return make_part(part, on_progress)

        return metadata, interrupted

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
        assert other._lease.is_held()
    assert not list(tmp_path.glob(".*.lock"))
