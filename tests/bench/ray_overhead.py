"""The overhead of Ray: the quickstart, and a rollout in 64 parts, by Ray and without it, in one run.

    python tests/bench/ray_overhead.py OUT [REPEATS]

A cluster of four nodes with two CPUs each is started on this machine. Seconds are medians; those of a stage are without
the start of its engines. Two workers of a stage are two processes that share it by leases, or two workers of the
cluster.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.ray_cluster import start_cluster

THREADS = ("--set", "pipeline.threads=1")  # two workers share two cores; Ray gives a process as many as it has CPUs
TRAIN = (
    "train",
    "--recipe",
    "quickstart",
    "--set",
    "train.steps=16",
    "--set",
    "rollout.prompts_per_step=64",
    "--set",
    "eval.every_steps=0",
    *THREADS,
)
ROLLOUT = (
    "rollout",
    "--recipe",
    "quickstart",
    "--set",
    "rollout.num_parts=64",
    "--set",
    "rollout.prompts_per_step=1024",
    *THREADS,
)
RAY = ("--launcher", "ray", "--set", "hardware.rollout_gpus=2")


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "opdctl", *words, "--output", str(path), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def measure(path: Path, processes: int, *words: str) -> tuple[float, float]:
    """Return the seconds of processes that run the same command, and the longest that one reports for its work."""
    shutil.rmtree(path, ignore_errors=True)
    begin = time.monotonic()
    started = [start(path, *words) for _ in range(processes)]
    reports = [json.loads(each.communicate()[0].splitlines()[-1]) for each in started]
    seconds = time.monotonic() - begin
    work = [each["seconds"] for each in reports]
    return seconds, max(sum(value.values()) - value["startup"] if isinstance(value, dict) else value for value in work)


def main() -> None:
    out, repeats = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with start_cluster():
        cases = {
            "quickstart, 16 steps of 64 prompts": (1, TRAIN),
            "quickstart, 16 steps of 64 prompts, Ray": (1, (*TRAIN, "--launcher", "ray")),
            "64 parts, 2 workers": (2, ROLLOUT),
            "64 parts, 2 workers, Ray": (1, (*ROLLOUT, *RAY)),
        }
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(repeats):
            for name, (processes, words) in cases.items():
                measured[name].append(measure(out / "run", processes, *words))
    print("| command | seconds in all | ratio | seconds of the work | ratio |\n|---|---:|---:|---:|---:|")
    base = (1.0, 1.0)
    for name, values in measured.items():
        total, work = (statistics.median(each) for each in zip(*values, strict=True))
        base = base if name.endswith("Ray") else (total, work)
        print(f"| {name} | {total:.1f} | {total / base[0]:.2f} | {work:.1f} | {work / base[1]:.2f} |")


if __name__ == "__main__":
    main()
