"""Claims to parts: one owner at a time, a dead one's taken over, and a suspended one's part dropped."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.stages import fill, stage

from opdctl.artifacts import leases
from opdctl.artifacts.leases import Lease, hold_lease
from opdctl.errors import ExitCode, OpdctlError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "EMPTY_LOCK_TIMEOUT_SECONDS", 0.5)


def elsewhere(path: Path) -> None:
    """Make a claim one that a process on another machine has laid, as far as this one can see."""
    text = path.read_text()
    path.write_text(text.replace(f"host={socket.gethostname()}", "host=elsewhere"))


HOLD = """
import pathlib, sys, time
from opdctl.artifacts import leases
leases.LEASE_SECONDS, leases.HEARTBEAT_SECONDS = 1.0, 0.1
with leases.hold_lease(pathlib.Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the claim `train`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_claim_is_refused_while_its_owner_lives_and_free_when_it_was_killed(tmp_path, owner):
    with pytest.raises(OpdctlError, match=f"process {owner.pid} on .* is working on `train`") as caught:
        hold_lease(tmp_path, "train").__enter__()
    assert caught.value.code == ExitCode.UNAVAILABLE
    owner.kill()
    owner.wait()
    with hold_lease(tmp_path, "train"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_live_owner_on_another_machine_keeps_its_claim_for_many_leases(tmp_path, owner):
    elsewhere(tmp_path / ".train.lock")
    claim, end = Lease(tmp_path, "train"), time.monotonic() + 2.5
    while time.monotonic() < end:
        assert not claim.acquire()
        time.sleep(0.05)
    assert claim.owner_is_alive()


def test_a_dead_owner_on_another_machine_loses_its_claim_after_one_lease(tmp_path, owner):
    elsewhere(tmp_path / ".train.lock")
    owner.kill()
    owner.wait()
    claim = Lease(tmp_path, "train")
    assert not claim.acquire()
    start = time.monotonic()
    with hold_lease(tmp_path, "train"):
        assert time.monotonic() - start > 0.9


def test_a_claim_whose_owner_died_before_it_was_signed_is_nobody_s(tmp_path):
    (tmp_path / ".train.lock").touch()
    claim = Lease(tmp_path, "train")
    assert not claim.acquire()  # it may just be about to be
    with hold_lease(tmp_path, "train"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("skew", [-86400, 86400])
def test_a_file_server_whose_clock_is_a_day_off_changes_nothing(tmp_path, owner, skew):
    path = tmp_path / ".train.lock"
    elsewhere(path)
    owner.send_signal(signal.SIGSTOP)
    os.utime(path, (time.time() + skew,) * 2)
    claim = Lease(tmp_path, "train")
    assert not claim.acquire()
    time.sleep(0.3)
    assert not claim.acquire()  # a fresh claim by the only clock that counts
    owner.send_signal(signal.SIGCONT)


def test_each_part_goes_to_one_worker(tmp_path):
    one, two = stage(tmp_path / "s"), stage(tmp_path / "s")
    with one.claim_parts() as mine:
        assert next(mine) == 0
        with two.claim_parts() as theirs:
            for index in theirs:
                assert index != 0
                fill(two, index)
        assert not two.is_finished()
        fill(one, 0)
        assert list(mine) == []
    assert one.is_finished()
    with stage(tmp_path / "s").claim_parts() as parts:
        assert parts is None


def test_a_worker_told_to_wait_comes_back_with_the_others_parts_too(tmp_path):
    """The other one dies within its part: it is taken over."""
    die = (
        "import pathlib, sys; sys.path.insert(0, 'tests'); from helpers.stages import stage\n"
        "from opdctl.artifacts import leases; leases.LEASE_SECONDS, leases.HEARTBEAT_SECONDS = 1.0, 0.1\n"
        "with stage(pathlib.Path(sys.argv[1])).claim_parts() as parts:\n    next(parts); print('held', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", die, str(tmp_path / "s")], **pipes)
    assert other.stdout.readline() == "held\n"
    made, order = stage(tmp_path / "s"), []
    with made.claim_parts(wait=True) as parts:
        for index in parts:
            order.append(index)
            fill(made, index)
            if index == 2:
                other.kill()
                other.communicate()
    assert order == [1, 2, 0]
    assert made.is_finished()


def test_a_late_loser_s_part_is_dropped(tmp_path):
    """It was suspended for longer than its lease, and another has made the part meanwhile: with other bytes here."""
    loser, winner = stage(tmp_path / "s", parts=1), stage(tmp_path / "s", parts=1)
    with loser.claim_parts() as mine:
        next(mine)
        (tmp_path / ".s-part-00000.lock").unlink()  # as taking over does
        with winner.claim_parts() as theirs:
            fill(winner, *theirs)
        sealed = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
        assert not loser.write(0, lambda path: path.write_text("another part 0"), rows=1, tokens=10)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == sealed
    winner.verify(0)


def test_what_was_made_under_settings_that_changed_meanwhile_is_dropped(tmp_path):
    slow = stage(tmp_path / "s", parts=1)
    with slow.claim_parts() as mine:
        next(mine)
        slow.start({"engine": "test"})
        shutil.rmtree(tmp_path / "s")
        assert not slow.write(0, lambda path: path.write_text("part 0"), rows=1, tokens=10)
        other = stage(tmp_path / "s", parts=1, settings={"rollout.temperature": 0.7})
        other.start({"engine": "test"})
        assert not slow.write(0, lambda path: path.write_text("part 0"), rows=1, tokens=10)
    assert other.missing() == [0]


@pytest.mark.parametrize("seed", range(3))
def test_workers_that_are_killed_at_random_and_started_again_make_each_part_once_and_whole(tmp_path, seed):
    rng = random.Random(seed)

    def worker() -> int:
        if child := os.fork():
            return child
        made = stage(tmp_path / "s", parts=24)
        with made.claim_parts(wait=True) as parts:
            for index in parts or ():
                time.sleep(0.05)
                fill(made, index)
        os._exit(0)

    workers, kills = [worker() for _ in range(3)], 0
    for _ in range(15):
        time.sleep(rng.uniform(0.02, 0.1))
        os.kill(victim := rng.choice(workers), signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(victim, 0)[1])  # it may have ended by itself
        workers[workers.index(victim)] = worker()
    assert [os.waitpid(child, 0)[1] for child in workers] == [0, 0, 0]
    assert kills >= 3
    made = stage(tmp_path / "s", parts=24)
    assert made.is_finished()
    assert [made.verify(index).read_text() for index in range(24)] == [f"part {index}" for index in range(24)]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["manifest.json", *made.names]
    assert not list(tmp_path.glob(".*.lock"))


def test_two_who_mend_one_stage_at_once_lose_no_part(tmp_path):
    """The first to finish writes the manifest while the other is still at its part."""
    made = stage(tmp_path / "s")
    fill(made, 0, 1, 2)
    made.finalize()
    for name in made.names[:2]:
        (tmp_path / "s" / name).write_text("damage")
    one, two = stage(tmp_path / "s"), stage(tmp_path / "s")
    with one.claim_parts(repair=True) as mine:
        assert next(mine) == 0
        one.start({"engine": "test"})
        with two.claim_parts(repair=True) as theirs:
            fill(two, *theirs)
        one.write(0, lambda path: path.write_text("part 0, otherwise"), rows=1, tokens=10)
    again = stage(tmp_path / "s")
    assert again.corrupted_parts() == {}
    assert again.sha256(0) == one.record(0).sha256
    assert not list((tmp_path / "s").glob("*.receipt.json"))


def test_what_the_dead_left_is_swept_and_what_the_living_hold_is_not(tmp_path, owner):
    leases.remove_stale_leases(tmp_path, "train")
    assert (tmp_path / ".train.lock").exists()
    owner.kill()
    owner.wait()
    leases.remove_stale_leases(tmp_path, "train")
    assert not (tmp_path / ".train.lock").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OpdctlError, match="cannot be written") as caught:
        Lease(tmp_path / "file", "train").acquire()
    assert caught.value.code == ExitCode.UNAVAILABLE
