"""A study on the toy tasks: which token weights and objectives help, and when the start of a response matters most.

    python tests/study                     write docs/study.md and its figures from the measurements beside this file
    python tests/study --quick --out OUT   run the same code in about a minute; the numbers mean nothing

Missing measurements are made first: all of them take an hour on two idle cores. An interrupted study resumes.
"""

import argparse
import os
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import page
from arms import FULL, QUICK, Scale, Training
from noise import measure_noise
from prefixes import measure_prefixes
from results import Results, select_learning_rates
from store import MeasurementStore
from students import degradations, degraded_student, train_degraded
from training import measure_training

MEASUREMENTS = Path(__file__).with_name("measured.jsonl")


def run_study(scale: Scale, store: MeasurementStore, work: Path, pool: Executor) -> Results:
    """Make the missing measurements and return all of them."""

    def train(trainings: list[Training], title: str) -> None:
        jobs = [(training.key, measure_training, (training, scale)) for training in trainings]
        store.run_missing(jobs, pool, title)

    train(scale.selection(), "learning rates")
    learning_rates = select_learning_rates(store.rows, scale)
    train(scale.comparison(learning_rates), "comparison")
    degraded = [degraded_student(each, work) for each in degradations() if scale.includes(each.name)]
    conditions = scale.conditions(degraded)
    if any(training.key not in store.rows for training in conditions):
        train_missing_students(scale, work, pool)
    train(conditions, "conditions")
    for name, measure in (("prefixes", measure_prefixes), ("noise", measure_noise)):
        store.run_missing([(f"{name}/{s.name}", measure, (s, scale)) for s in scale.students], pool, name)
    return Results(store.rows, scale, learning_rates, degraded)


def train_missing_students(scale: Scale, work: Path, pool: Executor) -> None:
    """Train the degraded students whose model directories are missing in `work`."""
    paths = {each: Path(degraded_student(each, work).model) for each in degradations() if scale.includes(each.name)}
    missing = [(each, path) for each, path in paths.items() if not path.exists()]
    for future in [pool.submit(train_degraded, each, scale, path) for each, path in missing]:
        future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="directory of study.md and its figures")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="directory of the degraded students")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--quick", action="store_true", help="run a small version; the numbers mean nothing")
    args = parser.parse_args()
    start = time.monotonic()
    scale, measurements = (QUICK, args.work / "measured.jsonl") if args.quick else (FULL, MEASUREMENTS)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = run_study(scale, MeasurementStore(measurements), args.work, pool)
    print(f"{time.monotonic() - start:.0f} s")
    page.write(args.out, results, results.total_seconds() / args.workers)


if __name__ == "__main__":
    main()
