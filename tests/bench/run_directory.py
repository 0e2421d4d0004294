"""Operations on the file system by the number of parts and of workers: `python tests/bench/run_directory.py`.

Workers make tiny parts of one stage without a model. All are in this process, in turn: a simulated clock decides which
one writes its part and claims the next; a part takes 30 to 90 s. The operations are those that name a
path, or list a directory, and so ask a metadata server. Reads, writes and flushes of an open file, and the touches of
leases, are not counted. `--out` should be in memory (/dev/shm): the counts are the same there, and 99,999 flushes to a
disk take minutes.

    python tests/bench/run_directory.py --parts 1000 10000 --workers 1 16 256
    python tests/bench/run_directory.py --parts 99999 --workers 1 256 --steps 165
"""

import argparse
import contextlib
import hashlib
import heapq
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import filelock
from helpers.planted import planted_run
from helpers.stages import stage

from opdctl.artifacts import files, leases
from opdctl.artifacts.files import write_json
from opdctl.artifacts.stage_dir import StageDir
from opdctl.artifacts.versions import versioned
from opdctl.runs.repair import find_corrupt_artifacts
from opdctl.runs.run import Run
from opdctl.runs.status import collect_status

EVENTS = ("open", "os.scandir", "os.listdir", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime")
"""The audit events of operations with a path. Those that have no event are wrapped."""
UNAUDITED = ("stat", "lstat")
SECONDS_OF_A_PART, TOUCH_SECONDS = 60.0, leases.HEARTBEAT_SECONDS
FIRST_PAUSE_SECONDS = next(leases.backoff())
counts: Counter[str] = Counter()


def count_operations(out: Path) -> None:
    """Count the operations of this process below `out`, and the tries of leases, from now on."""

    def is_below(arguments: tuple[Any, ...]) -> bool:
        return isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(f"{out}/")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and is_below(arguments):
            counts[event] += 1

    def counted(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if is_below(arguments):
            counts[name] += 1
        return function(*arguments, **options)

    def acquire(lease: leases.Lease) -> bool:
        counts["tries"] += 1
        return acquire_lease(lease)

    sys.addaudithook(audit)
    for name in UNAUDITED:
        setattr(os, name, partial(counted, name, getattr(os, name)))
    acquire_lease, leases.Lease.acquire = leases.Lease.acquire, acquire  # type: ignore[method-assign]


def save_content(path: Path) -> None:
    path.write_text("content")


class Worker:
    """A simulated worker: it claims parts in the loop of the stages, and holds each for its duration."""

    def __init__(self, directory: Path, parts: int, names: list[str]):
        self.stage = stage(directory, parts)
        self.stage.names = names  # shared: 256 lists would take 2 GB
        self.claims = self.stage.claim_available_parts()
        self.parts: Iterator[int | None] | None = None
        self.claimed: int | None = None

    def proceed(self) -> float | None:
        """Write the claimed part, if any, and claim another; return the seconds to the next call, None at the end."""
        if self.parts is None:
            self.parts = self.claims.__enter__()
            self.stage.start({})
        if self.claimed is not None:
            self.stage.write(self.claimed, save_content, rows=1, tokens=1)
        pauses.clear()
        try:
            self.claimed = next(self.parts or iter(()))
        except StopIteration:
            self.claims.__exit__(None, None, None)
            return None
        if self.claimed is not None:
            return random.uniform(0.5, 1.5) * SECONDS_OF_A_PART
        return min(1.5 * pauses[-1], leases.MAX_BACKOFF_SECONDS) if pauses else FIRST_PAUSE_SECONDS


clock = [0.0]
"""The simulated time in seconds."""
pauses: list[float] = []
"""The seconds that a worker without a part would have slept. It sleeps after it has reported that it has none."""


def measure_claims(out: Path, parts: int, workers: int) -> dict[str, float]:
    """Return the operations, the tries of leases and the listings of all workers together."""
    directory = out / "claims"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    first = Worker(directory / "rollout", parts, stage(directory / "rollout", parts).names)
    names = first.stage.names
    others = [Worker(directory / "rollout", parts, names) for _ in range(workers - 1)]
    counts.clear()
    calls = [(random.uniform(0, SECONDS_OF_A_PART), number) for number in range(workers)]
    heapq.heapify(calls)
    simulated, beat = [first, *others], 0.0
    while calls:
        now, number = heapq.heappop(calls)
        clock[0] = now
        if now > beat + TOUCH_SECONDS:
            beat = now
            touch_leases(directory)
        delay = simulated[number].proceed()
        if delay is not None:
            heapq.heappush(calls, (now + delay, number))
    assert first.stage.is_finished()
    listings = counts["os.scandir"] + counts["os.listdir"]
    operations = sum(counts.values()) - counts["tries"]
    return {"operations": operations, "tries": counts["tries"], "listings": listings}


def touch_leases(directory: Path) -> None:
    """Touch each lock file as its owner does; these operations are not counted."""
    before = counts.copy()
    for path in directory.glob(".*.lock"):
        os.utime(path)
    counts.clear()
    counts.update(before)


def slope(first: float, last: float, factor: float) -> float:
    """Return the exponent x of last / first = factor ** x."""
    return math.log(last / first) / math.log(factor) if factor > 1 else math.nan


def print_claims(out: Path, numbers: list[int], workers: list[int]) -> None:
    print("| workers | parts | operations per part | tries of leases per part | listings per worker | exponent |")
    print("|---:|---:|---:|---:|---:|---:|")
    for count in workers:
        before: tuple[int, float] | None = None
        for parts in numbers:
            result = measure_claims(out, parts, count)
            power = slope(before[1], result["operations"], parts / before[0]) if before else math.nan
            columns = [f"{result['operations'] / parts:.1f}", f"{result['tries'] / parts:.2f}"]
            columns += [f"{result['listings'] / count:.1f}", "" if math.isnan(power) else f"{power:.2f}"]
            print(f"| {count} | {parts:,} | {' | '.join(columns)} |", flush=True)
            before = parts, result["operations"]


# ── Readers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def plant(out: Path, parts: int, steps: int) -> Run:
    """Return a run with `steps` updates, of which the last has its responses, in `parts` parts."""
    shutil.rmtree(out / "run", ignore_errors=True)
    overrides = [f"rollout.num_parts={parts}", f"rollout.prompts_per_step={parts}", f"prompts.limit={parts}"]
    run = planted_run(out / "run", *overrides, f"train.steps={steps + 1}")
    empty: dict[str, Any] = {name: {} for name in ("settings", "inputs", "trainer", "student", "metrics")}
    for step in range(steps):
        write_json(run.update_path(step), versioned("update") | {"step": step} | empty)
    run.student_path(steps).mkdir(parents=True)
    return run


def fill(stage_dir: StageDir) -> None:
    """Write all parts with their receipts, without flushes."""
    stage_dir.start({})
    content = b"content"
    digest = hashlib.sha256(content).hexdigest()
    for name in stage_dir.names:
        record = {"name": name, "rows": 1, "tokens": 1, "bytes": len(content), "sha256": digest}
        (stage_dir.path / name).write_bytes(content)
        text = json.dumps({**record, "digest": files.digest_of(record)})
        (stage_dir.path / f"{name}.receipt.json").write_text(text)


@contextlib.contextmanager
def measured(name: str, parts: int) -> Iterator[None]:
    """Print the seconds and the operations of the block as a row. JSON files that were read before are read again."""
    files._read_json_once.cache_clear()
    counts.clear()
    begin = time.monotonic()
    yield
    seconds = time.monotonic() - begin
    operations = sum(counts.values()) - counts["tries"]
    print(f"| {name} | {parts:,} | {seconds:.2f} | {operations:,} | {operations / parts:.1f} |", flush=True)


def print_readers(out: Path, numbers: list[int], steps: int) -> None:
    print("\n| | parts | seconds | operations | per part |\n|---|---:|---:|---:|---:|")
    for parts in numbers:
        run = plant(out, parts, steps)
        rollout = run.rollout_stage(steps)
        fill(rollout)
        with measured("unfinished: missing()", parts):
            assert rollout.missing() == []
        with measured("unfinished: status", parts):
            collect_status(Run.load(run.path))
        with measured("finalize()", parts):
            assert rollout.finalize()
        manifest = rollout.manifest_path
        print(f"| manifest.json: {manifest.stat().st_size / 2**20:.1f} MiB | {parts:,} | | | |")
        with measured("parse of the manifest", parts):
            rollout.manifest()
        with measured("opening of the stage", parts):
            rollout = run.rollout_stage(steps)
        with measured("is_finished()", parts):
            assert rollout.is_finished()
        with measured("status", parts):
            collect_status(Run.load(run.path))
        with measured("status --verify", parts):
            collect_status(Run.load(run.path), verify=True)
        with measured("run repair --dry-run", parts):
            find_corrupt_artifacts(run)
        with measured("read: verify() and sha256() of each part", parts):
            rollout.failed()
            for index in range(parts):
                rollout.verify(index)
                rollout.sha256(index)
        with measured("`opdctl status --json`, the process", parts):
            command = [sys.executable, "-m", "opdctl", "status", str(run.path), "--json"]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("/dev/shm/run_directory"), help="directory, removed at the end"
    )
    parser.add_argument("--parts", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 16, 256])
    parser.add_argument("--steps", type=int, default=0, help="steps of the run that status and repair read; 0: none")
    args = parser.parse_args()
    count_operations(args.out)
    monotonic, time.monotonic = time.monotonic, lambda: clock[0]
    sleep, time.sleep = time.sleep, pauses.append  # type: ignore[assignment]
    filelock.SoftFileLease._start_heartbeat = lambda *arguments: None  # a thread; `touch_leases` does it
    try:
        print_claims(args.out, args.parts, args.workers)
        time.sleep, time.monotonic = sleep, monotonic
        if args.steps:
            print_readers(args.out, args.parts, args.steps)
    finally:
        shutil.rmtree(args.out, ignore_errors=True)


if __name__ == "__main__":
    main()
