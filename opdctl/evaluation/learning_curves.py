"""Accuracy by step of one run, or of several with seeds as intervals and the steps to reach a target accuracy."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opdctl.errors import OpdctlError
from opdctl.evaluation import statistics
from opdctl.evaluation.compared_runs import ComparedRun, ResultColumn
from opdctl.evaluation.results import load_evaluation, load_student_evaluations
from opdctl.evaluation.statistics import Estimate
from opdctl.recipe.data_names import benchmark_directory
from opdctl.runs.run import read_recipe

Curve = dict[int, Estimate]
"""The accuracy of one run's students by step, with intervals over problems."""


def accuracy_curve(path: Path) -> dict[str, Any] | None:
    """Return a run's accuracy by step on its first benchmark, with the accuracies of its teachers; None without one."""
    evaluations = load_student_evaluations(path)
    in_recipe = [benchmark_directory(name) for name in read_recipe(path).eval.bench]
    bench = next((name for name in (*in_recipe, *evaluations) if name in evaluations), None)
    if bench is None:
        return None
    by_step = evaluations[bench]
    newest = by_step[max(by_step)]
    teachers = [
        load_evaluation(summary.parent) for summary in sorted((path / "eval" / bench).glob("teacher*/summary.json"))
    ]
    accuracies = {each.summary["model"]: each.summary["avg"] for each in teachers if each.has_same_protocol(newest)}
    curve = {step: evaluation.accuracy for step, evaluation in by_step.items()}
    return {"bench": bench, "curve": _mean_curve([curve]), "teachers": accuracies}


def compare_curves(runs: Sequence[ComparedRun], column: ResultColumn, target: float | None = None) -> dict[str, Any]:
    """Compare runs by their accuracy by step. Runs of one setting are its seeds.

    target: an accuracy; by default the highest that every setting reaches.

    Raises:
        OpdctlError: the seeds of a setting have no evaluated step in common.
    """
    curves: dict[str, list[tuple[ComparedRun, Curve]]] = defaultdict(list)
    for run in runs:
        curves[run.setting.label].append((run, {step: run.accuracy(column, step) for step in run.steps(column)}))
    points = {label: _mean_curve([curve for _, curve in seeds]) for label, seeds in curves.items()}
    if disjoint := [str(run.path) for label, seeds in curves.items() if not points[label] for run, _ in seeds]:
        hint = "evaluate them at the same steps, by `opdctl eval --step`"
        raise OpdctlError("missing_evaluation", f"{column.name}: no shared step: {', '.join(disjoint)}", hint=hint)
    if target is None:
        target = min(max(point["accuracy"] for point in curve) for curve in points.values())
    return {
        "bench": column.name,
        "problems": column.problems,
        "target": target,
        "settings": [
            {
                "label": label,
                "runs": [_describe_seed(run, curve, target) for run, curve in seeds],
                "curve": points[label],
                **_mean_steps_to([curve for _, curve in seeds], target),
            }
            for label, seeds in curves.items()
        ],
    }


def _describe_seed(run: ComparedRun, curve: Curve, target: float) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "seed": run.recipe.seed,
        "best": max(accuracy.value for accuracy in curve.values()),
        "steps_to_target": _steps_to(curve, target),
    }


def _steps_to(curve: Curve, target: float) -> int | None:
    """Return the first evaluated step with an accuracy of at least `target`, or None."""
    return next((step for step in sorted(curve) if curve[step].value >= target), None)


def _mean_steps_to(seeds: Sequence[Curve], target: float) -> dict[str, Any]:
    """Return the mean number of steps to the target over the seeds that reach it, and the number of these seeds."""
    steps = [step for seed in seeds if (step := _steps_to(seed, target)) is not None]
    return {"steps_to_target": float(np.mean(steps)) if steps else None, "reached": len(steps), "seeds": len(seeds)}


def _mean_curve(seeds: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return a setting's mean accuracy at each step that all its seeds have, with a 95 % interval.

    The interval is Student's t over the seeds. That of a single seed, or of equal ones, is over the problems.
    """
    points = []
    for step in sorted(set.intersection(*(set(seed) for seed in seeds))):
        mean = statistics.mean_accuracy([seed[step] for seed in seeds])
        points.append({"step": step, "accuracy": mean.value, "low": mean.low, "high": mean.high, "seeds": len(seeds)})
    return points
