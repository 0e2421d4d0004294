"""The table of compared runs: the accuracy of every setting on every benchmark, and its difference to the baseline.

The unit of an interval is the seed (one training run) where there are at least two: Student's t over the seeds. Two
settings with the same seeds are paired by seed, since these have the same prompts in the same order; other seeds have
Welch's interval. If either setting has a single seed, or the seeds do not differ, the means over the seeds are paired
by problem: the interval covers other problems of the same kind, but not other seeds.
"""

import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.evaluation import statistics
from opdctl.evaluation.compared_runs import ComparedRun, ResultColumn
from opdctl.evaluation.results import Evaluation, load_evaluation
from opdctl.evaluation.settings import Setting
from opdctl.evaluation.statistics import Estimate
from opdctl.recipe.schema import Model

Pairing = Literal["paired by seed", "unpaired seeds", "paired by problem"]


@dataclass(frozen=True)
class ModelResult:
    """One model: the run that evaluated it, and its evaluations by benchmark. step: None for a teacher."""

    run: ComparedRun
    step: int | None
    evaluations: Mapping[str, Evaluation]

    def accuracy(self, column: ResultColumn) -> Estimate:
        return column.combine({bench: self.evaluations[bench].accuracy for bench in column.weights})


@dataclass(frozen=True)
class ResultCell:
    """The accuracy of a row on a column. deviation: the standard deviation over seeds; NaN for a single one."""

    mean: Estimate
    deviation: float
    difference: Estimate | None


@dataclass(frozen=True)
class ResultRow:
    """A setting with one student for each seed, an untrained student, or a teacher.

    setting: None of a model that was not trained. pairing: of the differences; None without differences.
    """

    label: str
    setting: Setting | None
    models: Sequence[ModelResult]
    cells: Mapping[str, ResultCell]
    pairing: Pairing | None

    @property
    def seeds(self) -> list[int]:
        return [model.run.recipe.seed for model in self.models]


@dataclass(frozen=True)
class ResultTable:
    """Rows in the order of the runs. at: the rule that selected the students. baseline: the method of the first run.

    Each setting is compared with the baseline of the same pair of models.
    """

    at: str
    baseline: str
    columns: Sequence[ResultColumn]
    rows: Sequence[ResultRow]


def tabulate_results(runs: Sequence[ComparedRun], columns: Sequence[ResultColumn], at: str = "last") -> ResultTable:
    """Return the table of runs. at: `last`, `best`, or a step: which student of each run counts.

    `last` is the newest step that is evaluated on all columns; `best` the one with the highest accuracy on the last
    column, the earliest of equal ones.

    Raises:
        OpdctlError: a run has no student that is evaluated on all columns, or not that of the step; responses of an
            evaluation are missing.
    """
    students = [_select_student(run, columns[-1], at) for run in runs]
    _warn_of_unequal_steps(students, at)
    by_setting = {model.run.setting: [m for m in students if m.run.setting == model.run.setting] for model in students}
    baseline = runs[0].setting.method
    rows = []
    for setting, models in by_setting.items():
        other = by_setting.get(Setting(setting.pair, baseline))
        rows.append(_make_row(setting.label, setting, models, columns, None if other is models else other))
    untrained = [] if at == "0" else _model_rows(_untrained_students(runs, columns[-1]), columns)
    return ResultTable(at, baseline, columns, [*untrained, *rows, *_model_rows(_teachers(runs, columns[-1]), columns)])


# ── Students ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _select_student(run: ComparedRun, overall: ResultColumn, at: str) -> ModelResult:
    steps, benches = run.steps(overall), ", ".join(overall.weights)
    if not steps:
        raise OpdctlError(
            "missing_evaluation",
            f"{run.path}: no step is evaluated on all of {benches}",
            hint=f"run `opdctl eval {shlex.quote(str(run.path))} --bench {','.join(overall.weights)}`",
        )
    if at == "last":
        step = steps[-1]
    elif at == "best":
        accuracies = {step: round(run.accuracy(overall, step).value, 12) for step in steps}  # equal despite rounding
        step = max(steps, key=lambda each: (accuracies[each], -each))
    elif int(at) in steps:
        step = int(at)
    else:
        raise OpdctlError(
            "missing_evaluation",
            f"{run.path}: step {at} is not evaluated on all of {benches}; these are: {', '.join(map(str, steps))}",
            hint=f"run `opdctl eval {shlex.quote(str(run.path))} --step {at}`, or give another --at",
        )
    return ModelResult(run, step, {bench: run.evaluations[bench][step] for bench in overall.weights})


def _warn_of_unequal_steps(students: Sequence[ModelResult], at: str) -> None:
    if at == "last" and len({model.step for model in students}) > 1:
        steps = ", ".join(f"{model.run.path} {model.step}" for model in students)
        console.warn(f"the last evaluated steps differ: {steps}; --at STEP compares equal steps")


def _untrained_students(runs: Sequence[ComparedRun], overall: ResultColumn) -> Iterator[tuple[str, ModelResult]]:
    """Yield the student of each run before training, with the label of its row."""
    for run in runs:
        if 0 in run.steps(overall):
            evaluations = {bench: run.evaluations[bench][0] for bench in overall.weights}
            yield f"{_name_model(run.recipe.student)} before training", ModelResult(run, 0, evaluations)


def _teachers(runs: Sequence[ComparedRun], overall: ResultColumn) -> Iterator[tuple[str, ModelResult]]:
    """Yield the teachers that a run evaluated by the protocol of its students, with the label of their row."""
    for run in runs:
        for name, model in run.recipe.teacher_models().items():
            paths = {bench: run.path / "eval" / bench / name for bench in overall.weights}
            evaluations = {b: load_evaluation(path) for b, path in paths.items() if (path / "summary.json").exists()}
            students = {bench: next(iter(by_step.values())) for bench, by_step in run.evaluations.items()}
            comparable = [bench for bench, each in evaluations.items() if each.has_same_protocol(students[bench])]
            if len(comparable) == len(paths):
                yield f"{_name_model(model)} (teacher)", ModelResult(run, None, evaluations)


def _name_model(model: Model) -> str:
    return f"{model.model}@{model.revision}" if model.revision else model.model


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _model_rows(models: Iterable[tuple[str, ModelResult]], columns: Sequence[ResultColumn]) -> list[ResultRow]:
    """Return a row for each distinct model. Runs with the same seed evaluate it alike, and count once."""
    by_label: dict[str, dict[int, ModelResult]] = defaultdict(dict)
    for label, model in models:
        by_label[label].setdefault(model.run.recipe.seed, model)
    return [_make_row(label, None, [*of_seeds.values()], columns, None) for label, of_seeds in by_label.items()]


def _make_row(
    label: str,
    setting: Setting | None,
    models: Sequence[ModelResult],
    columns: Sequence[ResultColumn],
    baseline: Sequence[ModelResult] | None,
) -> ResultRow:
    differences, pairing = _compare(baseline, models, columns) if baseline else ({}, None)
    cells = {}
    for column in columns:
        accuracies = [model.accuracy(column) for model in models]
        deviation = float(np.std([each.value for each in accuracies], ddof=1)) if len(models) > 1 else math.nan
        cells[column.name] = ResultCell(statistics.mean_accuracy(accuracies), deviation, differences.get(column.name))
    return ResultRow(label, setting, models, cells, pairing)


def _compare(
    one: Sequence[ModelResult], other: Sequence[ModelResult], columns: Sequence[ResultColumn]
) -> tuple[dict[str, Estimate], Pairing]:
    """Return the difference of `other` minus `one` on each column, and how they are paired."""
    by_problem = {bench: _compare_by_problem(bench, one, other) for bench in one[0].evaluations}
    if min(len(one), len(other)) < 2:
        return {column.name: column.combine(by_problem) for column in columns}, "paired by problem"
    by_seed_one, by_seed_other = ({model.run.recipe.seed: model for model in models} for models in (one, other))
    is_paired = by_seed_one.keys() == by_seed_other.keys() and len(by_seed_one) == len(one) == len(other)
    differences = {}
    for column in columns:
        if is_paired:
            pairs = [(by_seed_one[seed].accuracy(column), by_seed_other[seed].accuracy(column)) for seed in by_seed_one]
            difference = statistics.mean_of_runs([b.value - a.value for a, b in pairs])
        else:
            values = ([model.accuracy(column).value for model in models] for models in (one, other))
            difference = statistics.compare_runs(*values)
        has_interval = not math.isnan(difference.low)
        differences[column.name] = difference.clip(-1, 1) if has_interval else column.combine(by_problem)
    return differences, "paired by seed" if is_paired else "unpaired seeds"


def _compare_by_problem(bench: str, one: Sequence[ModelResult], other: Sequence[ModelResult]) -> Estimate:
    """Return the mean difference over the problems of a benchmark, of the mean accuracies over the seeds."""
    a, b = (_mean_by_problem([model.evaluations[bench].accuracies for model in models]) for models in (one, other))
    comparison = statistics.compare_paired([a[name] for name in a], [b[name] for name in a])
    return Estimate(comparison.difference, *comparison.ci)


def _mean_by_problem(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([accuracies[name] for accuracies in seeds])) for name in seeds[0]}
