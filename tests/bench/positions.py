"""What analyze-position takes on a large run: `python tests/bench/positions.py [--tokens 10000000] [--length 1000]`.

A run of that many tokens is planted, of responses of that mean length, and analysed by the command itself in a process
of its own. Printed are its seconds, on the clock and of the processor, its peak memory, and both for a tenth of the
run, so that what grows can be told from what does not.
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

from planted import plant, planted_run

STEPS = 8


def make(path: Path, tokens: int, length: int) -> None:
    """Plant a run whose |A| rises along the response; lengths are geometric."""
    run, rng = planted_run(path, "rollout.num_parts=8"), np.random.default_rng(0)
    for step in range(STEPS):
        lengths = rng.geometric(1 / length, size=tokens // length // STEPS)
        plant(run, step, [rng.normal(0, np.linspace(0.2, 0.5, n)) for n in lengths])


def measure(path: Path, arguments: list[str]) -> dict[str, float]:
    """Return what one call of analyze-position takes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "opdctl", "analyze-position", str(path), "--json", "-q", *arguments]
    out = subprocess.run(["/usr/bin/env", *command], capture_output=True, text=True, check=True, env=os.environ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    phases = json.loads(out)["summary"]
    return {
        "steps": len(phases["steps"]),
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_gib": round(after.ru_maxrss / 2**20, 3),  # the greatest of all children so far
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("arguments", nargs="*", help="further arguments of analyze-position")
    given = parser.parse_args()
    for tokens in (given.tokens // 10, given.tokens):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "run", tokens, given.length)
            print(
                json.dumps({"tokens": tokens, "length": given.length, **measure(Path(folder) / "run", given.arguments)})
            )


if __name__ == "__main__":
    main()
