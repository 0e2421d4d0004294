"""Three stages with --follow compared with a single process, on the quickstart: wall time, lag, accuracy.

    python tests/bench/follow.py --out OUT [--seeds 3] [--steps 64] [--staleness 0 1 2]

Each process has one thread. The wall time is that from the first update to the last, without the start of the processes
and the first rollout; the single process does not evaluate during training. Accuracy is that of the final student on
1,024 problems, the mean over seeds ± 2 standard errors. The variants of a seed run one after another, so other load on
the machine affects them similarly; but three processes get more of a busy machine than one.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SETTINGS = (
    "prompts.limit=4096",
    "rollout.prompts_per_step=64",
    "train.learning_rate=2e-4",
    "eval.every_steps=0",
    "pipeline.threads=1",
)
RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
STAGES = ("rollout", "score-teacher", "train")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Measurement:
    """One run. lags: steps between the policy that sampled the responses and the one that is updated, by step."""

    wall_seconds: float
    cpu_seconds: float
    lags: list[int]
    accuracy: float


def measure(run_dir: Path, seed: int, steps: int, problems: int, staleness: int | None) -> Measurement:
    """Train with three followers and this max_staleness, or in a single process if it is None."""
    settings = [f"seed={seed}", f"train.steps={steps}", *SETTINGS]
    settings += [f"pipeline.max_staleness={staleness or 0}"]
    options = ["--recipe", str(RECIPE), "--output", str(run_dir), "--quiet"]
    options += [word for setting in settings for word in ("--set", setting)]
    commands = [["train"]] if staleness is None else [[stage, "--follow"] for stage in STAGES]
    before = os.times()
    processes = [start_opdctl([*command, *options]) for command in commands]
    if failed := [process.args for process in processes if process.wait()]:
        sys.exit(f"failed: {failed}")
    after = os.times()
    first, last = (run_dir / f"step-{step:05d}" / "update.json" for step in (0, steps - 1))
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines()
    return Measurement(
        last.stat().st_mtime - first.stat().st_mtime,
        after.children_user + after.children_system - before.children_user - before.children_system,
        [json.loads(line)["staleness"] for line in metrics],
        evaluate(run_dir, problems),
    )


def start_opdctl(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "opdctl", *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def evaluate(run_dir: Path, problems: int) -> float:
    command = ["eval", "--run", str(run_dir), "--set", f"eval.limit={problems}", "--json", "--quiet"]
    result = subprocess.run(
        [sys.executable, "-m", "opdctl", *command], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True, text=True
    )
    return float(json.loads(result.stdout)["avg"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2], help="values of pipeline.max_staleness")
    parser.add_argument("--problems", type=int, default=1024, help="problems of the final evaluation")
    args = parser.parse_args()
    variants = {"single process": None} | {f"--follow, staleness {k}": k for k in args.staleness}
    measurements: dict[str, list[Measurement]] = {name: [] for name in variants}
    for seed in range(args.seeds):
        for name, staleness in variants.items():
            run_dir = args.out / f"{seed}-{'single' if staleness is None else staleness}"
            result = measure(run_dir, seed, args.steps, args.problems, staleness)
            measurements[name].append(result)
            print(seed, name, result.wall_seconds, result.cpu_seconds, result.accuracy, flush=True)
    print_table(measurements)


def print_table(measurements: dict[str, list[Measurement]]) -> None:
    single = measurements["single process"]
    print("\n| | wall time | relative | CPU time | lag | accuracy |\n|---|---|---|---|---|---|")
    for name, runs in measurements.items():
        wall, cpu = (np.mean([getattr(run, key) for run in runs]) for key in ("wall_seconds", "cpu_seconds"))
        ratio = np.mean([run.wall_seconds / base.wall_seconds for run, base in zip(runs, single, strict=True)])
        lags = [lag for run in runs for lag in run.lags]
        accuracies = [run.accuracy for run in runs]
        error = 2 * np.std(accuracies, ddof=1) / len(accuracies) ** 0.5 if len(accuracies) > 1 else float("nan")
        print(
            f"| {name} | {wall:.1f} s | {ratio:.2f} | {cpu:.1f} s | {np.mean(lags):.2f}, at most {max(lags)} "
            f"| {np.mean(accuracies):.3f} ± {error:.3f} |"
        )


if __name__ == "__main__":
    main()
