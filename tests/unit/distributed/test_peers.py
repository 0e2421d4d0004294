"""Ranks that watch each other through the store of their group."""

import queue
import threading
from collections.abc import Callable

import pytest
from torch._C._distributed_c10d import HashStore

from opdctl.distributed import peers
from opdctl.distributed.peers import PeerWatch


@pytest.fixture(autouse=True)
def short_beats(monkeypatch):
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.05)


@pytest.fixture
def start():
    """Start the watch of a rank; all stop at the end."""
    watches = []

    def start_rank(store, rank: int, world_size: int, on_failure: Callable[[str], None]) -> PeerWatch:
        watch = PeerWatch(store, rank, world_size, on_failure)
        watches.append(watch)
        watch.start()
        return watch

    yield start_rank
    for watch in watches:
        watch.stop()


def test_silent_rank_is_reported_to_all_others(start):
    """Rank 1 stops without a word. Rank 0 watches it; rank 2, which does not, reads the report of rank 0."""
    store, failures = HashStore(), queue.Queue()
    for rank in (0, 2):
        start(store, rank, 3, lambda text, rank=rank: failures.put((rank, text)))
    start(store, 1, 3, pytest.fail).stop()
    found = dict(failures.get(timeout=60) for _ in range(2))
    assert found[0] == found[2]
    assert found[0].startswith("rank 1 is lost")


def test_failure_of_a_rank_is_reported_at_once_and_the_first_one_counts(start):
    store, failures = HashStore(), queue.Queue()
    first, second = (start(store, rank, 2, failures.put) for rank in (0, 1))
    first.report("5 rank 0: no space")
    second.report("1 rank 1: lost its peer")
    assert first.failure() == second.failure() == "5 rank 0: no space"
    assert {failures.get(timeout=60), failures.get(timeout=60)} == {"5 rank 0: no space"}


def test_ranks_that_beat_are_not_lost(start):
    store, failed = HashStore(), threading.Event()
    for rank in range(3):
        start(store, rank, 3, lambda text: failed.set())
    assert not failed.wait(4 * peers.LOST_BEATS * peers.BEAT_SECONDS)


def test_store_that_does_not_answer_is_a_lost_rank_0(start):
    """If its machine loses power, a call to the store never returns."""
    released = threading.Event()

    class DeadStore:
        def set(self, key: str, value: str) -> None:
            released.wait()
            raise RuntimeError("closed")

    failures = queue.Queue()
    start(DeadStore(), 1, 2, failures.put)
    assert failures.get(timeout=60).startswith("rank 0, with the store of the group,")
    released.set()
