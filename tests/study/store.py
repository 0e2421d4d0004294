"""The stored measurements, and the jobs that make the missing ones."""

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""A key, and the function and arguments that measure it. The function returns a dataclass with this `key`."""


class MeasurementStore:
    """All measurements by key, in a JSON Lines file, each with the seconds that it took."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def append(self, measurement: Any, seconds: float) -> None:
        row = asdict(measurement) | {"seconds": seconds}
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def run_missing(self, jobs: Iterable[Job], pool: Executor, title: str) -> None:
        """Run the jobs whose measurement is missing."""
        missing = [job for job in jobs if job[0] not in self.rows]
        with Progress() as progress:
            bar = progress.add_task(title, total=len(missing))
            futures = [pool.submit(run_timed, measure, arguments) for _, measure, arguments in missing]
            for future in as_completed(futures):
                self.append(*future.result())
                progress.advance(bar)


def run_timed(measure: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    start = time.monotonic()
    return measure(*arguments), time.monotonic() - start
