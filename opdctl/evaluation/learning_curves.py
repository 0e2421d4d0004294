"""Accuracy by step, of one run or of several beside one another: their seeds as bands, and steps to reach a target."""

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
from opdctl.evaluation.results import PROTOCOL_KEYS, Evaluation, check_same_problems, load_evaluation
from opdctl.evaluation.stats import CONFIDENCE_LEVEL
from opdctl.recipe.dependencies import is_mutable
from opdctl.recipe.schema import Recipe
from opdctl.runs.layout import list_steps
from opdctl.runs.run import read_recipe


@dataclass(frozen=True)
class Curve:
    """One run's evaluations on one benchmark, by step."""

    path: Path
    recipe: Recipe
    evaluations: Mapping[int, Evaluation]

    def accuracy(self, step: int) -> float:
        return float(self.evaluations[step].summary["avg"])

    def best(self) -> float:
        return max(map(self.accuracy, self.evaluations))

    def steps_to(self, target: float) -> int | None:
        """Return the first step that was evaluated at `target` or above, None where there is none."""
        return next((step for step in sorted(self.evaluations) if self.accuracy(step) >= target), None)


def curves(path: Path) -> dict[str, Curve]:
    """Return the students' evaluations of a run by benchmark. Raises OpdctlError when `path` is no run directory."""
    recipe, found = read_recipe(path), {}
    for bench in sorted({summary.parent.parent.name for summary in path.glob("eval/*/step-*/summary.json")}):
        folders = list_steps(path / "eval" / bench)
        own = {step: load_evaluation(folder) for step, folder in folders.items() if (folder / "summary.json").exists()}
        found[bench] = Curve(
            path, recipe, {step: each for step, each in own.items() if _same_protocol(each, own[max(own)])}
        )
        if left_out := sorted(own.keys() - found[bench].evaluations.keys()):
            shown = ", ".join(map(str, left_out))
            console.warn(f"{path}: {bench}: left out, since evaluated in another way than the newest: steps {shown}")
    return found


def _same_protocol(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations' accuracies may be shown beside one another: same problems, asked in the same way."""
    return one.same_problems_as(other) and one.summary["protocol"] == other.summary["protocol"]


def accuracy_curve(path: Path) -> dict[str, Any] | None:
    """Return a run's accuracy by step on its first benchmark, with what its teachers reach, or None without any."""
    found = curves(path)
    own = [Path(name).stem for name in read_recipe(path).eval.bench]
    bench = next((name for name in (*own, *found) if name in found), None)
    if bench is None:
        return None
    newest = found[bench].evaluations[max(found[bench].evaluations)]
    teachers = [
        load_evaluation(summary.parent) for summary in sorted((path / "eval" / bench).glob("teacher*/summary.json"))
    ]
    reached = {each.summary["model"]: each.summary["avg"] for each in teachers if _same_protocol(each, newest)}
    return {"bench": bench, "curve": _points([found[bench]]), "teachers": reached}


def compare_curves(paths: Sequence[Path], target: float | None = None) -> list[dict[str, Any]]:
    """Compare runs by their accuracy by step, on every benchmark that all were evaluated on.

    Runs whose recipes differ in nothing but seed and name, and in what may change at any time, are seeds of one
    setting. target: an accuracy; by default the highest that every setting reaches. Raises OpdctlError: 2 for less than
    two runs, or no benchmark that all have; 4 where they were asked other problems.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise OpdctlError("--compare: needs two different runs at least", hint="give --compare RUN_A RUN_B …")
    of_runs = [curves(path) for path in paths]
    shared = [bench for bench in of_runs[0] if all(bench in own for own in of_runs)]
    if not shared:
        said = "; ".join(f"{path}: {', '.join(own) or 'none'}" for path, own in zip(paths, of_runs, strict=True))
        raise OpdctlError(
            f"--compare: there is no benchmark that all runs were evaluated on: {said}",
            hint="evaluate them by `opdctl eval`, or while they train by eval.every_steps",
        )
    return [_compared(bench, [own[bench] for own in of_runs], target) for bench in shared]


def _compared(bench: str, runs: Sequence[Curve], target: float | None) -> dict[str, Any]:
    _check_asked_alike(bench, runs)
    settings: dict[str, list[Curve]] = defaultdict(list)
    for run, label in zip(runs, _labels(runs), strict=True):
        settings[label].append(run)
    points = {label: _points(own) for label, own in settings.items()}
    wanted = min(max(point["accuracy"] for point in curve) for curve in points.values()) if target is None else target
    first = next(iter(runs[0].evaluations.values())).summary
    return {
        "bench": bench,
        "problems": first["problems"],
        "samples": first["samples"],
        "target": wanted,
        "settings": [
            {
                "label": label,
                "runs": [{"path": str(run.path), "seed": run.recipe.seed, **_reached(run, wanted)} for run in own],
                "curve": points[label],
                **_steps_to(own, wanted),
            }
            for label, own in settings.items()
        ],
    }


def _reached(run: Curve, target: float) -> dict[str, Any]:
    return {"best": run.best(), "steps_to_target": run.steps_to(target)}


def _steps_to(runs: Sequence[Curve], target: float) -> dict[str, Any]:
    """Return the mean number of steps to the target over the seeds that reach it, and how many do."""
    steps = [step for run in runs if (step := run.steps_to(target)) is not None]
    return {"steps_to_target": float(np.mean(steps)) if steps else None, "reached": len(steps), "seeds": len(runs)}


def _points(seeds: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return a setting's accuracy at each step that all its seeds were evaluated at, with a 95 % interval: over the
    seeds by Student's t, or of a single seed, over its problems."""
    found = []
    for step in sorted(set.intersection(*(set(seed.evaluations) for seed in seeds))):
        values = [seed.accuracy(step) for seed in seeds]
        mean, n = float(np.mean(values)), len(values)
        if n == 1:
            low, high = seeds[0].evaluations[step].summary["ci"]
        else:
            half = float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, n - 1) * np.std(values, ddof=1)) / math.sqrt(n)
            low, high = max(mean - half, 0.0), min(mean + half, 1.0)
        found.append({"step": step, "accuracy": mean, "low": low, "high": high, "seeds": n})
    return found


def _check_asked_alike(bench: str, runs: Sequence[Curve]) -> None:
    """Raise OpdctlError (code 4) unless all were asked the same problems; warn where they were asked in another way."""
    found = [each for run in runs for each in run.evaluations.values()]
    for each in found:
        check_same_problems(found[0], each)
        protocols = found[0].summary["protocol"], each.summary["protocol"]
        if other := [key for key in PROTOCOL_KEYS if protocols[0][key] != protocols[1][key]]:
            console.warn(f"{bench}: {each.path}: not the same protocol as {runs[0].path}: {', '.join(other)} differ")


def _labels(runs: Sequence[Curve]) -> list[str]:
    """Return what to call each run's setting: the values of the keys in which the recipes differ, or else the run."""
    flat = [{k: v for k, v in run.recipe.flat().items() if k != "seed" and not is_mutable(k)} for run in runs]
    keys = [key for key in dict.fromkeys(key for own in flat for key in own) if _differ(flat, key)]
    if not keys:
        return [runs[0].recipe.name] * len(runs)
    return [
        " ".join(_format_value(key, own[key]) for key in keys if _is_distinguishing(flat, own, key)) or "without"
        for own in flat
    ]


def _differ(flat: Sequence[Mapping[str, Any]], key: str) -> bool:
    return len({repr(own.get(key)) for own in flat}) > 1


def _is_distinguishing(flat: Sequence[Mapping[str, Any]], own: Mapping[str, Any], key: str) -> bool:
    """Whether a key tells a setting from others: a component's parameter does not where its name does already."""
    name = f"{key.rpartition('.')[0]}.name"
    alike = [other for other in flat if other.get(name) == own.get(name)] if key != name else flat
    return own.get(key) is not None and _differ(alike, key)


def _format_value(key: str, value: Any) -> str:
    return str(value) if key.endswith(".name") else f"{key.rpartition('.')[2]}={value}"
