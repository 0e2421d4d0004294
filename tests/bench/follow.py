"""Three stages that follow one another against a single process, on the quickstart: wall time, lag, accuracy.

    python tests/bench/follow.py --out OUT [--seeds 3] [--steps 64] [--staleness 0 1 2]

Each process has one thread. The wall time is from the first update to the last, so neither the start of processes nor
the filling of the pipeline counts; the single process makes no evaluations on its way. Accuracy is the last student's,
on 1,024 problems, mean of the seeds ± 2 standard errors. Runs of one seed stand beside one another in time, so a busy
machine disturbs them alike, but for this: three processes get more of a busy machine than one.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STAGES = ("rollout", "score-teacher", "train")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Measured:
    """One run: seconds, CPU seconds, lag of each step, accuracy."""

    wall: float
    cpu: float
    lags: list[int]
    accuracy: float


def measure(output: Path, seed: int, steps: int, staleness: int | None) -> Measured:
    """Train with followers of that staleness, or in a single process where it is None."""
    settings = [f"seed={seed}", f"train.steps={steps}", "eval.every_steps=0", "pipeline.threads=1"]
    settings += [f"pipeline.max_staleness={staleness or 0}"]
    common = ["--recipe", "recipes/quickstart.toml", "--output", str(output), "--quiet"]
    common += [word for setting in settings for word in ("--set", setting)]
    commands = [["train"]] if staleness is None else [[stage, "--follow"] for stage in STAGES]
    before = os.times()
    processes = [start([*command, *common]) for command in commands]
    if failed := [process.args for process in processes if process.wait()]:
        sys.exit(f"failed: {failed}")
    after = os.times()
    first, last = (output / f"step-{step:05d}" / "update.json" for step in (0, steps - 1))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return Measured(
        last.stat().st_mtime - first.stat().st_mtime,
        after.children_user + after.children_system - before.children_user - before.children_system,
        [json.loads(line)["staleness"] for line in lines],
        accuracy(output),
    )


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "opdctl", *arguments], env=ENVIRONMENT)


def accuracy(output: Path) -> float:
    command = ["eval", "--run", str(output), "--set", "eval.limit=1024", "--json", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "opdctl", *command], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True, text=True
    )
    return float(json.loads(done.stdout)["avg"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()
    kinds = {"single process": None} | {f"--follow, staleness {k}": k for k in given.staleness}
    found: dict[str, list[Measured]] = {name: [] for name in kinds}
    for seed in range(given.seeds):
        for name, staleness in kinds.items():
            folder = given.out / f"{seed}-{'single' if staleness is None else staleness}"
            found[name].append(measure(folder, seed, given.steps, staleness))
            print(seed, name, found[name][-1].wall, found[name][-1].cpu, found[name][-1].accuracy, flush=True)
    show(found)


def show(found: dict[str, list[Measured]]) -> None:
    base = found["single process"]
    print("\n| | wall | of the single | CPU | lag | accuracy |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        wall, cpu = (np.mean([getattr(run, key) for run in runs]) for key in ("wall", "cpu"))
        ratio = np.mean([run.wall / one.wall for run, one in zip(runs, base, strict=True)])
        lags = [lag for run in runs for lag in run.lags]
        reached = [run.accuracy for run in runs]
        error = 2 * np.std(reached, ddof=1) / len(reached) ** 0.5 if len(reached) > 1 else float("nan")
        print(
            f"| {name} | {wall:.1f} s | {ratio:.2f} | {cpu:.1f} s | {np.mean(lags):.2f}, at most {max(lags)} "
            f"| {np.mean(reached):.3f} ± {error:.3f} |"
        )


if __name__ == "__main__":
    main()
