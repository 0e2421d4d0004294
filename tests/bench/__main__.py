"""Speed and memory beside TRL and beside the plain formulas, in one table of ratios: `python tests/bench --trl PYTHON`.

Run it on an idle machine. Seconds of two machines cannot be compared, ratios can: the speed of a matrix product and of
a copy, in the first line, say what kind of machine it is. A ratio that misses its goal is marked, and one that is worse
than those of earlier versions is a regression, with exit code 1. TRL needs a separate environment, see against_trl.py;
without --trl its rows are left out. --quick: only the smallest shape of each kind.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import against_trl
import logprobs
import torch
from processes import run_in_new_process

SHAPES = ((8, 64), (8, 256), (32, 256))
TOY_SHAPES = ((8, 116), (64, 116))
GOALS = {"score and update": 2.5, "complete step": 2.5, "peak memory": 3.0}
TOY_GOALS = {"generation": 2.0, "score and update": 2.0, "complete step": 2.0}
LEAST = {
    (8, 64): {"score and update": 1.0, "complete step": 1.5},
    (8, 256): {"score and update": 1.6, "complete step": 2.0, "peak memory": 3.2},
    (8, 116): {"generation": 1.0, "complete step": 0.75},
    (64, 116): {"generation": 1.0, "complete step": 0.85},
}
"""By shape: up to a fifth less than the least that was measured, with AVX2 and with AVX-512, on shared machines. Lower
ratios are regressions."""
MAX_HEAD_RATIO = 1.3
MAX_PREFIX_RATIO, PREFIX_REGRESSION = 0.45, 0.5
HEAD_TOKENS = 2048


class Row(NamedTuple):
    """A ratio, with its goal, and the bound of a regression. They are the least values, or the greatest if negative."""

    name: str
    ours: str
    other: str
    ratio: float
    goal: float | None = None
    least: float | None = None

    @property
    def is_regression(self) -> bool:
        return not self._meets(self.least)

    def _meets(self, bound: float | None) -> bool:
        return bound is None or (self.ratio >= bound if bound > 0 else self.ratio <= -bound)

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"{'≥' if self.goal > 0 else '≤'} {abs(self.goal):g}"
        marks = ["missed"] * (not self._meets(self.goal)) + ["regression"] * self.is_regression
        return f"| {self.name} | {self.other} | {self.ours} | {self.ratio:.2f} | {': '.join([goal, *marks])} |"


def describe_machine(threads: int) -> str:
    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 8192)
    large = torch.randn(2**26)
    seconds = {}
    for name, function in {"product": lambda: a @ b, "copy": large.clone}.items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        seconds[name] = median(times)
    gflops, gigabytes = 2 * 1024**2 * 8192 / seconds["product"] / 1e9, 2 * 4 * 2**26 / seconds["copy"] / 1e9
    return f"{threads} threads: {gflops:.0f} GFLOP/s in a float32 product, {gigabytes:.1f} GB/s in a copy"


def against(args: argparse.Namespace, toy: bool, shapes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    """Yield the ratios of TRL's seconds and memory to opdctl's."""
    if not args.trl:
        return
    parser, goals = against_trl.make_parser(""), TOY_GOALS if toy else GOALS
    for batch, completion in shapes:
        options = ["--trl", args.trl, "--batch", str(batch), "--completion", str(completion)]
        options += ["--steps", str(args.steps), "--threads", str(args.threads), *["--toy"] * toy]
        each = parser.parse_args(options)
        with against_trl.models(each):
            rows = against_trl.compare(each)
        for label, (trl, opdctl) in rows.items():
            unit = "GiB" if label == "peak memory" else "s"
            name = f"{'embedded task' if toy else f'V = {each.vocab:,}'}, {batch} x {completion}: {label}"
            cells = [against_trl.format_cell(value, unit) for value in (opdctl, trl)]
            yield Row(name, *cells, trl / opdctl, goals.get(label), LEAST.get((batch, completion), {}).get(label))


def head(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the ratio of the output head's seconds to those of its products alone."""
    shape = argparse.Namespace(vocab=151_936, hidden=1024, threads=args.threads, device="cpu")
    own = run_in_new_process(logprobs.measure, "chunked", HEAD_TOKENS, shape)
    products = run_in_new_process(logprobs.measure_products, HEAD_TOKENS, shape)
    name, cells = f"head, {HEAD_TOKENS:,} tokens", (f"{own.seconds:.2f} s", f"{products:.2f} s")
    yield Row(f"{name} / products", *cells, own.seconds / products, -MAX_HEAD_RATIO, -MAX_HEAD_RATIO)


def prefix(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the ratio of an update's seconds with prefix_only, 30 %, to one with uniform weights."""
    seconds = {}
    for weight in ("uniform", "prefix_only"):
        each = against_trl.make_parser("").parse_args(["--steps", str(args.steps), "--weight", weight])
        with against_trl.models(each):
            against_trl.make_prompts(each.models / "prompts.jsonl", each.batch * each.steps, toy=False)
            names = ("batch", "completion", "steps", "threads", "models", "weight")
            options = [word for name in names for word in (f"--{name}", str(getattr(each, name)))]
            seconds[weight] = median(against_trl.measure(sys.executable, "opdctl", options)["update"][1:])
    uniform, own = seconds["uniform"], seconds["prefix_only"]
    yield Row(
        "update, prefix_only / uniform",
        f"{own:.2f} s",
        f"{uniform:.2f} s",
        own / uniform,
        -MAX_PREFIX_RATIO,
        -PREFIX_REGRESSION,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=6, help="the first is a warm-up and is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.trl and not against_trl.has_trl(args.trl):
        parser.error("--trl must be the Python of an environment with TRL")
    count = 1 if args.quick else None
    print(f"{describe_machine(args.threads)}; medians of {args.steps - 1} steps\n")
    print("| | other | opdctl | ratio | goal |\n|---|---:|---:|---:|---|", flush=True)
    parts = (head(args), prefix(args), against(args, True, TOY_SHAPES[:count]), against(args, False, SHAPES[:count]))
    has_regression = False
    for row in (row for part in parts for row in part):
        print(row, flush=True)
        has_regression |= row.is_regression
    sys.exit(has_regression)


if __name__ == "__main__":
    main()
