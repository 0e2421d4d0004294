"""The study: which token weights and losses help on the embedded tasks, and when a response's beginning matters most.

    python tests/study                     docs/study.md with its figures, in less than an hour on two idle cores
    python tests/study --out OUT --quick   the same path in minutes, with numbers that mean nothing

What is measured is kept in a file, so a study that was killed goes on, and the page can be written again at once.
"""

import argparse
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure
import noise
import page
import prefixes
import students
from arms import FULL, QUICK, Scale, Training
from ledger import Ledger
from results import Results, best_rates


def study(scale: Scale, work: Path, workers: int) -> Results:
    """Measure what is not measured yet, and return all of it."""
    ledger = Ledger(work / "measured.jsonl")

    def train(wanted: Iterable[Training], title: str) -> None:
        ledger.make([(each.key, measure.train, (each, scale)) for each in wanted], workers, title)

    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        making = partial(students.make, scale=scale, folder=work / "students")
        made = list(pool.map(making, students.makings()[: scale.makings]))
    train(scale.selection(), "learning rates")
    rates = best_rates(ledger.rows, scale)
    train(scale.comparison(rates), "comparison")
    train(scale.conditions(made), "conditions")
    for name, work_on in (("prefixes", prefixes.measure), ("noise", noise.measure)):
        jobs = [(f"{name}/{student.name}", work_on, (student, scale)) for student in scale.students]
        ledger.make(jobs, workers, name)
    return Results(ledger.rows, scale, rates, made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of study.md and its figures")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="folder of what was measured")
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--quick", action="store_true", help="try the path; the numbers mean nothing")
    args = parser.parse_args()
    start = time.monotonic()
    results = study(QUICK if args.quick else FULL, args.work, args.workers)
    print(f"{time.monotonic() - start:.0f} s")
    page.write(args.out, results, results.seconds() / args.workers)


if __name__ == "__main__":
    main()
