"""Print the table of docs/eval.md: how often each interval of an evaluation covers the true value, in simulations.

PYTHONPATH=tests python tests/bench/interval_coverage.py
"""

from itertools import product

from acceptance import test_interval_coverage as simulation


def main() -> None:
    for interval, names, coverage, samples in (
        ("resampled problems", simulation.PROBLEM_SETS, simulation.problem_coverage, simulation.SAMPLES),
        ("same problems", simulation.PROBLEM_SETS, simulation.sampling_coverage, simulation.SAMPLES_OF_SAME_PROBLEMS),
        ("difference", simulation.PAIRS, simulation.paired_coverage, simulation.SAMPLES),
    ):
        for name in names:
            found = [coverage(name, problems, n) for problems, n in product(simulation.PROBLEMS, samples)]
            print(f"| {interval} | {name} | {100 * min(found):.1f} to {100 * max(found):.1f} |")


if __name__ == "__main__":
    main()
