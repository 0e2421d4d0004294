"""The short-horizon control: where prefixes do not drift, IW-OPD should show no gain over OPD.

    python tests/study/short_horizon.py    print the table of docs/embedded-task.md: a few minutes on two idle cores

Responses end at a horizon: after one token, where every weight is 1 + gamma and IW-OPD is OPD; after one pass of the
task, within which little drifts; and not at all. A response counts as correct if it is the worked answer up to the
horizon.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from arms import IW_OPD, STUDENTS, UNIFORM, Arm, Scale, Student
from commands import recipe_options, run_command
from results import stratified_mean
from training import decode

from opdctl.artifacts.records import Response
from opdctl.data.toy import TASKS
from opdctl.registry import WEIGHTS
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs

HORIZONS = {
    "one token": {"sort12": 1, "perm": 1},
    "one pass": {"sort12": 14, "perm": 8},
    "whole answer": {"sort12": 128, "perm": 128},
}
"""Tokens of a response, by task. The first pass of sort12 is `b:` with the other letters and `;`, that of perm
`01hjdil;`."""
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class ControlRun:
    """The measurements of one training run.

    accuracy: of the student before each update and of the final student. weight_variation: standard deviation of the
    IW-OPD weights divided by their mean, over the tokens of the first step.
    """

    accuracy: list[float]
    weight_variation: float


def measure_control(student: Student, tokens: int, arm: Arm, seed: int, scale: Scale) -> ControlRun:
    """Train on responses of at most `tokens` tokens, in a temporary directory, and measure the run."""
    settings = (
        *(f"seed={seed}", f"train.learning_rate={LEARNING_RATE}", f"rollout.max_tokens={tokens}"),
        *(f"prompts.limit={(scale.steps + 1) * scale.prompts_per_step}", *arm.settings),
    )
    with TemporaryDirectory() as folder:
        run_command("train", *recipe_options(student, scale, *settings), "--output", folder)
        run_command("rollout", "--output", folder, "--step", scale.steps)
        run = Run.load(Path(folder))
        accuracy = [horizon_accuracy(run, student, tokens, step) for step in range(scale.steps + 1)]
        weight = WEIGHTS.build("iw_opd", {})
        weights = np.concatenate([weight(to_weight_inputs(row, 0)) for row in read_scored(run, 0)])
        return ControlRun(accuracy, float(weights.std() / weights.mean()))


def horizon_accuracy(run: Run, student: Student, tokens: int, step: int) -> float:
    """Return the fraction of a step's responses that are the worked answer up to the horizon, of one letter a token."""
    rows = run.rollout_stage(step).read_all(Response)
    prompts, texts = decode(run, [row.prompt_ids for row in rows]), decode(run, [row.response_ids for row in rows])
    solve = TASKS[student.task].solve
    return float(np.mean([text == solve(prompt)[:tokens] for prompt, text in zip(prompts, texts, strict=True)]))


Runs = dict[tuple[str, Student, Arm, int], ControlRun]
"""The runs by horizon, student, arm and seed."""


def control_table(runs: Runs) -> list[str]:
    """Return a Markdown table: for each horizon and student, OPD, IW-OPD and their difference, paired by seed."""
    lines = [
        "| horizon | student | weight variation | OPD: start | mean | final | IW-OPD minus OPD: mean | final |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for horizon in dict.fromkeys(key[0] for key in runs):
        students = list(dict.fromkeys(key[1] for key in runs if key[0] == horizon))
        pairs = {student: _pairs(runs, horizon, student) for student in students}
        lines += [_row(horizon, student.name, [pairs[student]]) for student in students]
        lines.append(_row(horizon, "all", list(pairs.values())))
    return lines


Pairs = list[tuple[ControlRun, ControlRun]]
"""OPD and IW-OPD of each seed."""


def _pairs(runs: Runs, horizon: str, student: Student) -> Pairs:
    seeds = dict.fromkeys(key[3] for key in runs)
    return [(runs[horizon, student, UNIFORM, seed], runs[horizon, student, IW_OPD, seed]) for seed in seeds]


def _row(horizon: str, name: str, strata: Sequence[Pairs]) -> str:
    opd = [one for pairs in strata for one, _ in pairs]
    cells = [horizon, name, f"{np.mean([run.weight_variation for run in opd]):.3f}"]
    cells += [f"{np.mean([run.accuracy[0] for run in opd]):.3f}"]
    cells += [f"{np.mean([np.mean(run.accuracy) for run in opd]):.3f}"]
    cells += [f"{np.mean([run.accuracy[-1] for run in opd]):.3f}"]
    for value in (lambda run: float(np.mean(run.accuracy)), lambda run: run.accuracy[-1]):
        interval = stratified_mean(
            [np.array([value(iw_opd) - value(one) for one, iw_opd in pairs]) for pairs in strata]
        )
        cells.append(interval.format())
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at least two")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, with one thread each")
    args = parser.parse_args()
    start = time.monotonic()
    keys = [
        (horizon, student, arm, seed)
        for horizon in HORIZONS
        for student in STUDENTS
        for arm in (UNIFORM, IW_OPD)
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(measure_control, student, HORIZONS[horizon][student.task], arm, seed, Scale())
            for horizon, student, arm, seed in keys
        ]
        runs = dict(zip(keys, [future.result() for future in futures], strict=True))
    print("\n".join(control_table(runs)))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
