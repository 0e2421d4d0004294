"""The order in which a worker claims the parts of a stage, so that many workers rarely try the same part.

A worker tries the parts in ascending order. As soon as another one is ahead of it, it continues at a random part. It
reads the list of the parts again only after as many vain tries as parts that it got. So the operations for each part do
not grow with the number of workers.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path

from opdctl.artifacts import leases

MAX_CONFLICTS = 8
"""Vain tries, beyond as many as this worker got parts, after which it lists the parts again."""
MAX_WATCHED = 16
"""Leases of other workers that a worker tries again and again, so that a stale one is acquired. With more of them each
worker tries others: all of them together would try each lease as often as there are workers."""


class PartClaims:
    """The claims of one worker on the parts of a stage.

    directory, name: the leases are `name`-part-00000 and so on, in `directory`. list_unmade: returns the numbers of the
    parts that must be made. is_made: whether a part has been made. held: gets the lease of each claimed part.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        list_unmade: Callable[[], list[int]],
        is_made: Callable[[int], bool],
        held: dict[int, leases.Lease],
    ):
        self._directory, self._prefix = directory, f"{name}-part-"
        self._list_unmade, self._is_made, self._held = list_unmade, is_made, held
        self._settled: set[int] = set()  # claimed here, or found to be made
        self._watched: dict[int, leases.Lease] = {}
        self._next_look = 0.0  # at the watched leases
        self._is_ascending = True

    def lease_each(self, *, wait: bool) -> Iterator[int | None]:
        """Yield each part as soon as this worker holds its lease, and None before each pause.

        It ends when every part was yielded or made by others; without `wait` also when others have leased the remaining
        ones, and the owners of those that are watched are alive. If many owners are dead, the last worker that is alive
        watches leases of the dead only, and does not end.
        """
        pause, unmade = leases.backoff(), self._list_unmade()
        while unmade:
            locked = self._locked().intersection(unmade)
            free, settled = [index for index in unmade if index not in locked], len(self._settled)
            is_idle = not free
            yield from itertools.chain(self._claim_watched(locked), self._claim_free(free))
            if len(self._settled) > settled:
                pause = leases.backoff()
            elif is_idle and not wait and self._are_owners_alive():
                return
            else:
                yield None
                time.sleep(next(pause))
            unmade = [i for i in (self._list_unmade() if free else unmade) if i not in self._settled]

    def _locked(self) -> set[int]:
        """Return the numbers of the parts that have a lock file, held or stale."""
        numbers = (name.removeprefix(self._prefix) for name in leases.list_leases(self._directory))
        return {int(number) for number in numbers if number.isdecimal()}

    def _claim_watched(self, locked: Collection[int]) -> Iterator[int]:
        """Claim parts with stale leases, twice in the time of a heartbeat. locked: the parts that have a lock file."""
        self._watched = {index: lease for index, lease in self._watched.items() if index in locked}
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + leases.HEARTBEAT_SECONDS / 2
        others, room = sorted({*locked} - self._watched.keys()), MAX_WATCHED - len(self._watched)
        if len(others) > room:
            others = secrets.SystemRandom().sample(others, room)
        self._watched |= {index: self._lease(index) for index in others}
        for index, lease in sorted(self._watched.items()):
            if lease.acquire():
                del self._watched[index]
                self._next_look = 0.0  # the next pass watches another lease in its place
                yield from self._claim(index, lease)

    def _are_owners_alive(self) -> bool:
        return bool(self._watched) and all(lease.owner_is_alive() for lease in self._watched.values())

    def _claim_free(self, free: list[int]) -> Iterator[int]:
        """Claim parts of `free` that have no lock file, and remove each that was tried from it."""
        claimed = conflicts = 0
        place = 0 if self._is_ascending else secrets.randbelow(len(free) or 1)
        while free and conflicts <= claimed + MAX_CONFLICTS:
            index = free.pop(place % len(free))
            lease = None if self._is_made(index) else self._lease(index)
            if lease is None:
                self._settled.add(index)
            elif lease.acquire() and (yield from self._claim(index, lease)):
                claimed += 1
                continue
            conflicts += 1
            self._is_ascending = False
            place = secrets.randbelow(len(free) or 1)

    def _lease(self, index: int) -> leases.Lease:
        return leases.Lease(self._directory, f"{self._prefix}{index:05d}")

    def _claim(self, index: int, lease: leases.Lease) -> Generator[int, None, bool]:
        """Yield a part whose lease was acquired, unless its owner has made it before; return whether it did."""
        self._settled.add(index)
        self._held[index] = lease
        if not self._is_made(index):
            yield index
            return True
        del self._held[index]
        lease.release()
        return False
