import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import filelock
import pytest

from opdctl.artifacts import files, leases
from opdctl.artifacts.leases import Lease, backoff, hold_lease
from opdctl.errors import ExitCode, OpdctlError


@pytest.fixture(autouse=True)
def short_leases(monkeypatch):
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "EMPTY_LOCK_TIMEOUT_SECONDS", 0.5)


def move_to_another_host(path: Path) -> None:
    """Make a lease look like one that a process on another host has acquired."""
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
    """Another process, which holds the lease `train`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_lease_is_refused_while_its_owner_lives_and_free_after_a_kill(tmp_path, owner):
    with pytest.raises(OpdctlError) as caught:
        hold_lease(tmp_path, "train").__enter__()
    assert (caught.value.kind, caught.value.code) == ("lease_held", ExitCode.UNAVAILABLE)
    assert f"process {owner.pid} on {socket.gethostname()}" in caught.value.message
    assert "`train`" in caught.value.message
    owner.kill()
    owner.wait()
    with hold_lease(tmp_path, "train"):
        pass
    assert not list(tmp_path.iterdir())


def test_owner_on_another_host_keeps_its_lease_while_it_lives(tmp_path, owner):
    move_to_another_host(tmp_path / ".train.lock")
    lease, end = Lease(tmp_path, "train"), time.monotonic() + 2.5
    while time.monotonic() < end:
        assert not lease.acquire()
        time.sleep(0.05)
    assert lease.owner_is_alive()


def test_dead_owner_on_another_host_loses_its_lease_after_the_lease_time(tmp_path, owner):
    move_to_another_host(tmp_path / ".train.lock")
    owner.kill()
    owner.wait()
    assert not Lease(tmp_path, "train").acquire()
    start = time.monotonic()
    with hold_lease(tmp_path, "train"):
        assert time.monotonic() - start > 0.9


def test_lock_file_without_owner_record_is_stale(tmp_path):
    (tmp_path / ".train.lock").touch()
    lease = Lease(tmp_path, "train")
    assert not lease.acquire()  # its owner may be about to write the record
    with hold_lease(tmp_path, "train"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("skew", [-86400, 86400])
def test_clock_of_the_file_server_does_not_matter(tmp_path, owner, skew):
    path = tmp_path / ".train.lock"
    move_to_another_host(path)
    owner.send_signal(signal.SIGSTOP)
    os.utime(path, (time.time() + skew,) * 2)
    lease = Lease(tmp_path, "train")
    assert not lease.acquire()
    time.sleep(0.3)
    assert not lease.acquire()  # less than one lease time has passed by this process's clock
    owner.send_signal(signal.SIGCONT)


def test_stale_leases_are_removed_and_held_ones_are_not(tmp_path, owner):
    leases.remove_stale_leases(tmp_path, "train")
    assert (tmp_path / ".train.lock").exists()
    owner.kill()
    owner.wait()
    leases.remove_stale_leases(tmp_path, "train")
    assert not (tmp_path / ".train.lock").exists()


def test_directory_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OpdctlError) as caught:
        Lease(tmp_path / "file", "train").acquire()
    assert (caught.value.kind, caught.value.code) == ("failed_write", ExitCode.UNAVAILABLE)


def test_lease_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), hold_lease(tmp_path, "train"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_is_held_notices_the_loss_of_a_lease(tmp_path):
    lease, other = Lease(tmp_path, "train"), Lease(tmp_path, "train")
    assert lease.acquire()
    assert lease.is_held()
    (tmp_path / ".train.lock").unlink()
    assert not lease.is_held()
    assert other.acquire()
    assert not lease.is_held()
    lease.release()
    assert other.is_held()
    other.release()


def test_nothing_is_published_below_the_directory_of_a_lost_lease(tmp_path):
    """A background thread is checked too; leases on other directories do not matter."""
    run, other, heirs = tmp_path / "run", tmp_path / "other", Lease(tmp_path / "run", "train")
    with hold_lease(run, "train"), hold_lease(other, "train"):
        files.write_text(run / "trainer/state", "old")
        (run / ".train.lock").unlink()  # as the acquisition of a stale lease does
        assert heirs.acquire()
        with ThreadPoolExecutor(1) as background, pytest.raises(OpdctlError) as caught:
            background.submit(files.write_text, run / "trainer/state", "new").result()
        assert (caught.value.kind, caught.value.code) == ("lost_lease", ExitCode.UNAVAILABLE)
        assert f"process {os.getpid()} on" in caught.value.message
        for change in (partial(files.remove_directory, run / "trainer"), partial(files.append_line, run / "log", {})):
            with pytest.raises(OpdctlError):
                change()
        assert (run / "trainer/state").read_text() == "old"
        assert not (run / "log").exists()
        files.write_text(other / "state", "new")
    assert heirs.is_held()
    heirs.release()
    files.write_text(run / "trainer/state", "new")
    assert not list(tmp_path.rglob(".*"))


def test_backoff_grows_to_its_maximum():
    pauses = list(itertools.islice(backoff(), 20))
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.02, leases.MAX_BACKOFF_SECONDS)


def test_lock_file_of_another_program_is_an_error(tmp_path):
    other = filelock.SoftFileLease(tmp_path / ".x.lock", lease_duration=5, heartbeat_interval=1)
    other.acquire()
    with pytest.raises(OpdctlError, match=r"\.x\.lock: not a lease of opdctl"):
        leases.Lease(tmp_path, "x").acquire()
    other.release()
