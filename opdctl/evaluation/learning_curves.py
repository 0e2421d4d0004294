"""Accuracy by step of one run, or of several with seeds as intervals and the steps to reach a target accuracy."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.evaluation.results import Evaluation, check_same_problems, load_evaluation
from opdctl.evaluation.statistics import CONFIDENCE_LEVEL
from opdctl.recipe.dependencies import is_mutable
from opdctl.recipe.schema import Recipe
from opdctl.runs.layout import list_steps
from opdctl.runs.run import read_recipe


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run's students on one benchmark, by step."""

    path: Path
    recipe: Recipe
    evaluations: Mapping[int, Evaluation]

    def accuracy(self, step: int) -> float:
        return float(self.evaluations[step].summary["avg"])

    def best(self) -> float:
        """Return the highest accuracy."""
        return max(map(self.accuracy, self.evaluations))

    def steps_to(self, target: float) -> int | None:
        """Return the first evaluated step with an accuracy of at least `target`, or None."""
        return next((step for step in sorted(self.evaluations) if self.accuracy(step) >= target), None)


def load_curves(path: Path) -> dict[str, Curve]:
    """Return the curves of the run in `path` by benchmark.

    A curve contains the evaluations under the protocol of the newest one; a warning names the others.

    Raises:
        OpdctlError: `path` is not a run.
    """
    recipe, curves = read_recipe(path), {}
    for bench in sorted({summary.parent.parent.name for summary in path.glob("eval/*/step-*/summary.json")}):
        directories = list_steps(path / "eval" / bench)
        evaluations = {
            step: load_evaluation(directory)
            for step, directory in directories.items()
            if (directory / "summary.json").exists()
        }
        if not evaluations:
            continue
        newest = evaluations[max(evaluations)]
        kept = {step: each for step, each in evaluations.items() if _has_same_protocol(each, newest)}
        curves[bench] = Curve(path, recipe, kept)
        if skipped := sorted(evaluations.keys() - kept.keys()):
            steps = ", ".join(map(str, skipped))
            console.warn(f"{path}: {bench}: skipped, since their protocol is not that of the newest: steps {steps}")
    return curves


def _has_same_protocol(one: Evaluation, other: Evaluation) -> bool:
    """Whether the accuracies are comparable: the problems and the complete protocol are the same."""
    return one.has_same_problems(other) and bool(one.summary["protocol"] == other.summary["protocol"])


def accuracy_curve(path: Path) -> dict[str, Any] | None:
    """Return a run's accuracy by step on its first benchmark, with the accuracies of its teachers; None without one."""
    curves = load_curves(path)
    in_recipe = [Path(name).stem for name in read_recipe(path).eval.bench]
    bench = next((name for name in (*in_recipe, *curves) if name in curves), None)
    if bench is None:
        return None
    curve = curves[bench]
    newest = curve.evaluations[max(curve.evaluations)]
    teachers = [
        load_evaluation(summary.parent) for summary in sorted((path / "eval" / bench).glob("teacher*/summary.json"))
    ]
    accuracies = {each.summary["model"]: each.summary["avg"] for each in teachers if _has_same_protocol(each, newest)}
    return {"bench": bench, "curve": _mean_curve([curve]), "teachers": accuracies}


def compare_curves(
    paths: Sequence[Path], target: float | None = None, benches: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Compare runs by their accuracy by step, on every benchmark that all have, or on `benches`.

    Runs whose recipes differ only in seed, name and mutable keys are the seeds of one setting. target: an accuracy; by
    default the highest that every setting reaches.

    Raises:
        OpdctlError: there are less than two runs, no shared benchmark, seeds without a shared step, or the problems
            differ.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise OpdctlError("invalid_usage", "compare: fewer than two distinct runs", hint="give each run once")
    curves_by_run = [load_curves(path) for path in paths]
    shared = [
        bench
        for bench in curves_by_run[0]
        if all(bench in curves for curves in curves_by_run) and (benches is None or bench in benches)
    ]
    if not shared:
        evaluated = zip(paths, curves_by_run, strict=True)
        described = "; ".join(f"{path} is evaluated on {', '.join(curves) or 'nothing'}" for path, curves in evaluated)
        raise OpdctlError(
            "missing_evaluation",
            f"no shared benchmark: {described}",
            hint="run `opdctl eval` on the same benchmarks, or set eval.every_steps before training",
        )
    return [_compare_on_benchmark(bench, [curves[bench] for curves in curves_by_run], target) for bench in shared]


def _compare_on_benchmark(bench: str, curves: Sequence[Curve], target: float | None) -> dict[str, Any]:
    _check_comparable(bench, curves)
    settings: dict[str, list[Curve]] = defaultdict(list)
    for curve, label in zip(curves, _setting_labels(curves), strict=True):
        settings[label].append(curve)
    points = {label: _mean_curve(seeds) for label, seeds in settings.items()}
    if disjoint := [str(seed.path) for label, seeds in settings.items() if not points[label] for seed in seeds]:
        hint = "evaluate them at the same steps, by `opdctl eval --step`"
        raise OpdctlError("missing_evaluation", f"{bench}: no shared step: {', '.join(disjoint)}", hint=hint)
    if target is None:
        target = min(max(point["accuracy"] for point in curve) for curve in points.values())
    summary = next(iter(curves[0].evaluations.values())).summary
    return {
        "bench": bench,
        "problems": summary["problems"],
        "samples": summary["samples"],
        "target": target,
        "settings": [
            {
                "label": label,
                "runs": [_describe_seed(seed, target) for seed in seeds],
                "curve": points[label],
                **_mean_steps_to(seeds, target),
            }
            for label, seeds in settings.items()
        ],
    }


def _describe_seed(curve: Curve, target: float) -> dict[str, Any]:
    return {
        "path": str(curve.path),
        "seed": curve.recipe.seed,
        "best": curve.best(),
        "steps_to_target": curve.steps_to(target),
    }


def _mean_steps_to(seeds: Sequence[Curve], target: float) -> dict[str, Any]:
    """Return the mean number of steps to the target over the seeds that reach it, and the number of these seeds."""
    steps = [step for seed in seeds if (step := seed.steps_to(target)) is not None]
    return {"steps_to_target": float(np.mean(steps)) if steps else None, "reached": len(steps), "seeds": len(seeds)}


def _mean_curve(seeds: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return a setting's mean accuracy at each step that all its seeds have, with a 95 % interval.

    The interval is Student's t over the seeds. That of a single seed is the interval over its problems.
    """
    points = []
    for step in sorted(set.intersection(*(set(seed.evaluations) for seed in seeds))):
        accuracies = [seed.accuracy(step) for seed in seeds]
        mean, n = float(np.mean(accuracies)), len(accuracies)
        if n == 1:
            low, high = seeds[0].evaluations[step].summary["ci"]
        else:
            t = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, n - 1))
            half_width = t * float(np.std(accuracies, ddof=1)) / math.sqrt(n)
            low, high = max(mean - half_width, 0.0), min(mean + half_width, 1.0)
        points.append({"step": step, "accuracy": mean, "low": low, "high": high, "seeds": n})
    return points


def _check_comparable(bench: str, curves: Sequence[Curve]) -> None:
    """Check that all evaluations are on the same problems; warn if their protocols differ.

    Raises:
        OpdctlError: the problems differ.
    """
    evaluations = [evaluation for curve in curves for evaluation in curve.evaluations.values()]
    first = evaluations[0]
    for evaluation in evaluations:
        check_same_problems(first, evaluation)
        if keys := first.protocol_differences(evaluation):
            console.warn(f"{bench}: the protocols of {first.path} and {evaluation.path} differ in {', '.join(keys)}")


def _setting_labels(curves: Sequence[Curve]) -> list[str]:
    """Return the label of each run's setting: the values of the keys in which the recipes differ, or the run's name."""
    recipes = [
        {key: value for key, value in curve.recipe.flat().items() if key != "seed" and not is_mutable(key)}
        for curve in curves
    ]
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe) if _differs(recipes, key)]
    if not keys:
        return [curves[0].recipe.name] * len(curves)
    return [
        " ".join(_format_value(key, recipe[key]) for key in keys if _is_distinguishing(recipes, recipe, key))
        or "without"
        for recipe in recipes
    ]


def _differs(recipes: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({repr(recipe.get(key)) for recipe in recipes}) > 1


def _is_distinguishing(recipes: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], key: str) -> bool:
    """Whether a key belongs in the label: a component's parameter only if it differs within that component."""
    name = f"{key.rpartition('.')[0]}.name"
    same_component = [each for each in recipes if each.get(name) == recipe.get(name)] if key != name else recipes
    return recipe.get(key) is not None and _differs(same_component, key)


def _format_value(key: str, value: Any) -> str:
    return str(value) if key.endswith(".name") else f"{key.rpartition('.')[2]}={value}"
