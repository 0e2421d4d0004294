"""The time that this process waits for models: for the start of an engine, and while weights are loaded.

A stage takes this time, but its tokens per second are those of the work alone.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class StageTime:
    """The seconds of a block: of its work, and of start-up."""

    work: float = 0.0
    startup: float = 0.0


_startup_seconds = 0.0  # of this process so far
_depth = 0


@contextlib.contextmanager
def measure_startup() -> Iterator[None]:
    """Count the time of the block as start-up. Time in nested blocks counts once."""
    global _depth, _startup_seconds
    start, _depth = time.monotonic(), _depth + 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _startup_seconds += time.monotonic() - start


@contextlib.contextmanager
def measure_stage() -> Iterator[StageTime]:
    """Yield the times of the block, which are known at its end. It is not within start-up itself."""
    seconds, start, earlier = StageTime(), time.monotonic(), _startup_seconds
    try:
        yield seconds
    finally:
        seconds.startup = _startup_seconds - earlier
        seconds.work = time.monotonic() - start - seconds.startup
