"""Notices within a minute that another process of the group is gone, whatever this one is doing.

A process that waits in a collective learns it only if a connection closes, which it does not do if a machine loses its
power or a process is suspended. So each rank counts up a number in the store of the group and watches that of the next
rank. A failure that a rank reports or notices is written into the store, for all to read.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_SECONDS = 5.0
LOST_BEATS = 8
"""After which a silent rank counts as lost. They are this rank's own beats, since all may be suspended together."""
EXIT_BEATS = 2
"""After a failure, until this process ends if it has not noticed by itself."""
FAILURE = "failure"  # a key of the store


class PeerWatch:
    """The heartbeat of this rank, and its watch over the next one.

    store: a connection to the group's store that nothing else uses. on_failure: called once, in a thread, with a
    description; it ends the process.
    """

    def __init__(self, store: "Store", rank: int, world_size: int, on_failure: Callable[[str], None]):
        self._store, self._rank, self._next, self._on_failure = store, rank, (rank + 1) % world_size, on_failure
        self._failure: str | None = None
        self._own_failure = ""
        self._number = b""  # of the next rank
        self._stop, self._talk_now, self._talked = threading.Event(), threading.Event(), threading.Event()

    def start(self) -> None:
        for function in (self._talk, self._watch):
            threading.Thread(target=function, daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        self._talk_now.set()

    def report(self, failure: str) -> None:
        """Let the other ranks know that this one failed, unless another failure came first."""
        self._own_failure = failure
        self.failure()

    def failure(self) -> str | None:
        """Return the description of the first failure in the group, or None if none is known yet."""
        self._talked.clear()
        self._talk_now.set()
        self._talked.wait(BEAT_SECONDS)
        return self._failure

    def _talk(self) -> None:
        """Exchange numbers and failures with the store. A store that is gone may block this thread for ever."""
        count = 0
        while not self._stop.is_set():
            try:
                self._exchange(count)
                self._talked.set()
            except RuntimeError:
                self._talked.clear()
            count += 1
            self._talk_now.wait(BEAT_SECONDS)
            self._talk_now.clear()

    def _exchange(self, count: int) -> None:
        self._store.set(f"beat/{self._rank}", str(count))
        if self._store.check([f"beat/{self._next}"]):
            self._number = self._store.get(f"beat/{self._next}")
        if self._own_failure:
            self._store.compare_set(FAILURE, "", self._own_failure)
        if self._store.check([FAILURE]):
            self._failure = self._store.get(FAILURE).decode()

    def _watch(self) -> None:
        silent_beats, last = 0, b""
        while self._failure is None and silent_beats < LOST_BEATS:
            if self._stop.wait(BEAT_SECONDS):
                return
            silent_beats, last = (silent_beats + 1, last) if self._number == last else (0, self._number)
        if self._failure is None:
            lost = f"rank {self._next}" if self._talked.is_set() else "rank 0, with the store of the group,"
            self.report(f"{lost} is lost: no heartbeat for {LOST_BEATS * BEAT_SECONDS:g} s")
        if not self._stop.wait(EXIT_BEATS * BEAT_SECONDS):
            self._on_failure(self._failure or self._own_failure)
