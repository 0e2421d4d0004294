"""Compared runs: their evaluations on the benchmarks that all of them have, and the columns of a comparison."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.evaluation import statistics
from opdctl.evaluation.results import Evaluation, check_same_problems, load_student_evaluations
from opdctl.evaluation.settings import Setting, find_settings
from opdctl.evaluation.statistics import Estimate
from opdctl.recipe.schema import Recipe
from opdctl.runs.run import read_recipe

JOINT_BENCHMARKS = {"hmmt25": ("hmmt25_feb", "hmmt25_nov")}
"""Benchmarks that a comparison reports as one, over the problems of all of them (arXiv 2606.22600: HMMT25)."""
AVERAGE = "Avg"


@dataclass(frozen=True)
class ResultColumn:
    """What a comparison reports: the accuracy on a benchmark, on the problems of several, or a mean over benchmarks.

    weights: of the accuracy on each benchmark; their sum is 1. problems: the number of problems of all of them.
    """

    name: str
    weights: Mapping[str, float]
    problems: int

    def combine(self, by_bench: Mapping[str, Estimate]) -> Estimate:
        """Return the weighted mean of estimates on the benchmarks. Different problems make them independent."""
        return statistics.combine_independent([by_bench[bench] for bench in self.weights], [*self.weights.values()])


@dataclass(frozen=True)
class ComparedRun:
    """A run with its setting and the evaluations of its students, by benchmark and step."""

    path: Path
    recipe: Recipe
    setting: Setting
    evaluations: Mapping[str, Mapping[int, Evaluation]]

    def steps(self, column: ResultColumn) -> list[int]:
        """Return the steps that are evaluated on every benchmark of a column."""
        return sorted(set.intersection(*(set(self.evaluations[bench]) for bench in column.weights)))

    def accuracy(self, column: ResultColumn, step: int) -> Estimate:
        """Return the accuracy of the student of `step`, with the interval over problems."""
        return column.combine({bench: self.evaluations[bench][step].accuracy for bench in column.weights})


def load_compared_runs(
    paths: Sequence[Path], benches: Sequence[str] | None = None
) -> tuple[list[ComparedRun], list[ResultColumn]]:
    """Return the runs and the columns: each benchmark that all runs have, or each of `benches`, and their mean.

    Raises:
        OpdctlError: a path occurs twice or is not a run, there is no shared benchmark, one of `benches` is not shared,
            or the problems differ.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise OpdctlError("invalid_usage", "compare: a run occurs twice", hint="give each run once")
    recipes = [read_recipe(path) for path in paths]
    evaluations = [load_student_evaluations(path) for path in paths]
    shared = [bench for bench in evaluations[0] if all(bench in each for each in evaluations)]
    selected = list(dict.fromkeys(shared if benches is None else benches))
    if not selected or {*selected} - {*shared}:
        described = "; ".join(
            f"{path} is evaluated on {', '.join(each) or 'nothing'}"
            for path, each in zip(paths, evaluations, strict=True)
        )
        asked = "no shared benchmark" if benches is None else f"--bench {','.join(benches)}"
        raise OpdctlError(
            "missing_evaluation",
            f"{asked}: {described}",
            hint="run `opdctl eval` on the same benchmarks, or set eval.every_steps before training",
        )
    for bench in selected:
        check_comparable(bench, [each for by_bench in evaluations for each in by_bench[bench].values()])
    problems = {bench: int(next(iter(evaluations[0][bench].values())).summary["problems"]) for bench in selected}
    runs = [
        ComparedRun(path, recipe, setting, {bench: by_bench[bench] for bench in selected})
        for path, recipe, setting, by_bench in zip(paths, recipes, find_settings(recipes), evaluations, strict=True)
    ]
    _warn_of_repeated_seeds(runs)
    return runs, make_columns(problems)


def _warn_of_repeated_seeds(runs: Sequence[ComparedRun]) -> None:
    for (setting, seed), count in Counter((run.setting, run.recipe.seed) for run in runs).items():
        if count > 1:
            paths = ", ".join(str(run.path) for run in runs if (run.setting, run.recipe.seed) == (setting, seed))
            console.warn(f"{setting.label}: seed {seed} is that of {count} runs, which count as {count} seeds: {paths}")


def check_comparable(bench: str, evaluations: Sequence[Evaluation]) -> None:
    """Check that all evaluations are on the same problems; warn if their protocols differ.

    Raises:
        OpdctlError: the problems differ.
    """
    first = evaluations[0]
    for evaluation in evaluations:
        check_same_problems(first, evaluation)
        if keys := first.protocol_differences(evaluation):
            console.warn(f"{bench}: the protocols of {first.path} and {evaluation.path} differ in {', '.join(keys)}")


def make_columns(problems: Mapping[str, int]) -> list[ResultColumn]:
    """Return the columns of benchmarks with these numbers of problems.

    The benchmarks of a joint one are a single column, weighted by their numbers of problems. If there are several
    columns, the last one is the mean over the others.
    """
    names = {bench: bench for bench in problems}
    for name, parts in JOINT_BENCHMARKS.items():
        if problems.keys() >= {*parts}:
            names |= dict.fromkeys(parts, name)
    columns = []
    for name in dict.fromkeys(names.values()):
        of_column = {bench: count for bench, count in problems.items() if names[bench] == name}
        total = sum(of_column.values())
        columns.append(ResultColumn(name, {bench: count / total for bench, count in of_column.items()}, total))
    if len(columns) > 1:
        weights = {bench: weight / len(columns) for column in columns for bench, weight in column.weights.items()}
        columns.append(ResultColumn(AVERAGE, weights, sum(problems.values())))
    return columns
