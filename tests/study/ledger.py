"""What was measured, kept from run to run, and the processes that measure the rest."""

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import Progress

Job = tuple[str, Callable[..., Any], tuple[Any, ...]]


class Ledger:
    """All that was measured, by key, in a JSON Lines file; with the seconds that each job took."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def add(self, found: Any, seconds: float) -> None:
        row = asdict(found) | {"seconds": seconds}
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def make(self, jobs: Iterable[Job], workers: int, title: str) -> None:
        """Do the jobs that are not done yet, in processes of one thread each."""
        left = [job for job in jobs if job[0] not in self.rows]
        with (
            Progress() as progress,
            ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        ):
            bar = progress.add_task(title, total=len(left))
            for done in as_completed([pool.submit(timed, work, arguments) for _, work, arguments in left]):
                self.add(*done.result())
                progress.advance(bar)


def timed(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    start = time.monotonic()
    return work(*arguments), time.monotonic() - start
