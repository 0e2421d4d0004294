"""Time and memory of analyze-position on a large run.

    python tests/bench/positions.py [--tokens 10000000] [--length 1000]

The run has planted artifacts: N tokens in responses of a mean length. The command analyzes it in a separate process.
Printed are the wall time, CPU time and peak memory, also for a run of a tenth of the size, to show how they grow.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.planted import plant, planted_run

STEPS = 8


def make_run(path: Path, tokens: int, length: int) -> None:
    """Plant a run in which |A| increases along the response; lengths are geometric."""
    run, rng = planted_run(path, "rollout.num_parts=8"), np.random.default_rng(0)
    for step in range(STEPS):
        lengths = rng.geometric(1 / length, size=tokens // length // STEPS)
        plant(run, step, [rng.normal(0, np.linspace(0.2, 0.5, n)) for n in lengths])


def measure(path: Path, arguments: list[str]) -> dict[str, float]:
    """Return the number of steps, and the time and memory of one call of analyze-position."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "opdctl", "analyze-position", str(path), "--json", "-q", *arguments]
    out = subprocess.run(["/usr/bin/env", *command], capture_output=True, text=True, check=True, env=os.environ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "steps": len(json.loads(out)["summary"]["steps"]),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_gib": round(after.ru_maxrss / 2**20, 3),  # the maximum over all children so far
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=1000, help="mean length of a response")
    parser.add_argument("arguments", nargs="*", help="further arguments of analyze-position")
    args = parser.parse_args()
    for tokens in (args.tokens // 10, args.tokens):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            make_run(run, tokens, args.length)
            print(json.dumps({"tokens": tokens, "length": args.length, **measure(run, args.arguments)}))


if __name__ == "__main__":
    main()
