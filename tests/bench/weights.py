"""Accuracy by step of token weights on one recipe, over seeds: `python tests/bench/weights.py --out docs/images`.

Trains the recipe once a weight and seed (finished runs are not run again), then prints the table and draws the curves.
The problems are the same for all; a point's interval of ± 2 standard errors is over seeds, so it covers the luck of
prompts and samples but not another set of problems.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"uniform": "#64748b", "iw_opd": "#c2410c"}


def curve(recipe: Path, weight: str, seed: int, student: str, runs: Path) -> dict[int, float]:
    """Train one run and return its accuracy by step."""
    output = runs / f"{student.removeprefix('toy:')}-{weight}-{seed}"
    settings = [f"weight.name={weight}", f"seed={seed}", f"student.model={student}", "eval.every=8"]
    command = [
        sys.executable,
        "-m",
        "opdctl",
        "train",
        "--recipe",
        str(recipe),
        "--output",
        str(output),
        "--json",
        "-q",
    ]
    subprocess.run([*command, *(w for s in settings for w in ("--set", s))], check=True, stdout=subprocess.DEVNULL)
    summaries = (json.loads(path.read_text()) for path in output.glob("eval/*/step-*/summary.json"))
    return {int(s["model"].removeprefix("step-")): s["avg"] for s in summaries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--student", default="toy:student")
    parser.add_argument("--weights", nargs="+", default=["uniform", "iw_opd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-weights"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the figure")
    args = parser.parse_args()

    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for weight in args.weights:
        curves = [curve(args.recipe, weight, seed, args.student, args.runs) for seed in args.seeds]
        steps = sorted(curves[0])
        points = np.array([[c[step] for step in steps] for c in curves])
        mean, error = points.mean(0), 2 * points.std(0, ddof=1) / np.sqrt(len(curves))
        axis.plot(steps, mean, color=COLOURS.get(weight), label=weight)
        axis.fill_between(steps, mean - error, mean + error, color=COLOURS.get(weight), alpha=0.2, lw=0)
        print(f"| {weight} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)) + " |")
        for seed, row in zip(args.seeds, points, strict=True):
            print(f"| {weight}, seed {seed} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    print("| step | " + " | ".join(map(str, steps)) + " |")
    axis.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title=f"{args.student}, {len(args.seeds)} seeds, ± 2 SE")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / f"accuracy-{args.student.removeprefix('toy:')}.png", dpi=120)


if __name__ == "__main__":
    main()
