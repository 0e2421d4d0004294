"""What the measurements come to: means and differences over seeds, with intervals. Draws and writes nothing.

The unit is the training: trainings of one seed share prompts, so arms are compared seed by seed. Accuracies are shares
in [0, 1]; intervals hold 95 %.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from arms import PREFIX, SUFFIX, UNIFORM, Arm, Scale, Student, Training
from scipy import stats

LEVEL = 0.95
LATE = 5
"""Steps at the end of a training whose responses tell what it came to: 5 x 32 problems."""

Rows = Mapping[str, Mapping[str, Any]]
Measure = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Interval:
    """A mean over trainings with its 95 % interval, and the two-sided p-value of its being 0."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Kept:
    """One condition: what it is like, and the share of the gain of all tokens that training on some of them keeps."""

    name: str
    rate: float
    start: float
    gain: Interval
    prefix: Interval
    suffix: Interval
    length: float
    onset: float
    first_share: float


def area(row: Mapping[str, Any]) -> float:
    """Return the mean accuracy over the steps: the area under the curve, divided by its length."""
    return float(np.mean(row["accuracy"]))


def late(row: Mapping[str, Any]) -> float:
    return float(np.mean(row["accuracy"][-LATE:]))


def final(row: Mapping[str, Any]) -> float:
    return float(row["final"])


def best_rates(rows: Rows, scale: Scale) -> dict[str, float]:
    """Return each arm's learning rate: that of the largest area, over students and selection seeds."""
    score: dict[str, dict[float, list[float]]] = {}
    for each in scale.selection():
        score.setdefault(each.arm.name, {}).setdefault(each.rate, []).append(area(rows[each.key]))
    return {arm: max(by_rate, key=lambda rate: float(np.mean(by_rate[rate]))) for arm, by_rate in score.items()}


def mean_over(strata: Sequence[np.ndarray]) -> Interval:
    """Return the mean of the strata's means, by Student's t with the variances within the strata pooled."""
    sizes = np.array([len(values) for values in strata])
    freedom = int((sizes - 1).sum())
    variance = sum(((values - values.mean()) ** 2).sum() for values in strata) / freedom
    error = float(np.sqrt(variance * (1 / sizes).sum())) / len(strata)
    return interval(float(np.mean([values.mean() for values in strata])), error, freedom)


def interval(mean: float, error: float, freedom: int) -> Interval:
    """Return a mean's interval from its standard error, with so many degrees of freedom."""
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Interval(mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number, step down (Holm 1979)."""
    order = np.argsort(p_values)
    stepped = [min(1.0, (len(p_values) - rank) * p_values[i]) for rank, i in enumerate(order)]
    corrected = np.empty(len(p_values))
    corrected[order] = list(accumulate(stepped, max))
    return corrected.tolist()


@dataclass(frozen=True)
class Results:
    """All that was measured, with the learning rate chosen for each arm and the students made for the conditions."""

    rows: Rows
    scale: Scale
    rates: Mapping[str, float]
    made: Sequence[Student]

    def values(self, student: Student, arm: Arm, measure: Measure) -> np.ndarray:
        """Return a measure of an arm's trainings in the main comparison, by seed."""
        trainings = (Training(student, arm, self.rates[arm.name], seed) for seed in self.scale.seeds)
        return np.array([measure(self.rows[each.key]) for each in trainings])

    def difference(self, one: Arm, other: Arm, measure: Measure, students: Sequence[Student] = ()) -> Interval:
        """Return `other` minus `one`, paired by seed, over all students or some."""
        return mean_over(
            [self.values(s, other, measure) - self.values(s, one, measure) for s in students or self.scale.students]
        )

    def against_uniform(self, measure: Measure, student: Student | None = None) -> dict[str, tuple[Interval, float]]:
        """Return each arm's difference from uniform weights, with its p-value corrected for the number of arms."""
        others = [arm for arm in self.scale.arms if arm != UNIFORM]
        found = [self.difference(UNIFORM, arm, measure, [student] if student else ()) for arm in others]
        corrected = holm([each.p for each in found])
        return {arm.name: pair for arm, pair in zip(others, zip(found, corrected, strict=True), strict=True)}

    def curve(self, student: Student, arm: Arm) -> np.ndarray:
        """Return the accuracies [seeds, steps]."""
        trainings = [Training(student, arm, self.rates[arm.name], seed) for seed in self.scale.seeds]
        return np.array([self.rows[each.key]["accuracy"] for each in trainings])

    def target(self, student: Student) -> float:
        """Return the accuracy halfway from the student's start to all right."""
        return (1 + float(self.curve(student, UNIFORM)[:, 0].mean())) / 2

    def steps_to_target(self, student: Student, arm: Arm) -> list[int | None]:
        """Return of each seed how many updates it took until the mean of three steps reached the target, or None."""
        found: list[int | None] = []
        for accuracy in self.curve(student, arm):
            smooth = np.convolve(accuracy, np.ones(3) / 3, mode="valid")
            reached = np.flatnonzero(smooth >= self.target(student))
            found.append(int(reached[0]) + 1 if len(reached) else None)
        return found

    def conditions(self) -> list[Kept]:
        """Return what training on the first or the last 30 % keeps of the gain, in each condition.

        The gain is the accuracy of the last steps less that of the first. Ratios have the error of the delta method;
        their spread over seeds is pooled over the conditions.
        """
        cases = self.scale.cases(self.made)
        seeds = self.scale.condition_seeds
        spread = [
            residual
            for student, rate in cases
            for arm in (PREFIX, SUFFIX)
            for residual in self._kept(student, rate, arm)[1]
        ]
        freedom = 2 * len(cases) * (len(seeds) - 1)
        error = float(np.sqrt(np.square(spread).sum() / freedom / len(seeds)))
        return [self._condition(student, rate, error, freedom) for student, rate in cases]

    def _condition(self, student: Student, rate: float, error: float, freedom: int) -> Kept:
        rows = [self.rows[Training(student, UNIFORM, rate, seed).key] for seed in self.scale.condition_seeds]
        prefix, suffix = (interval(self._kept(student, rate, arm)[0], error, freedom) for arm in (PREFIX, SUFFIX))
        return Kept(
            student.name,
            rate,
            float(np.mean([row["accuracy"][0] for row in rows])),
            mean_over([self._gains(student, rate, UNIFORM)]),
            prefix,
            suffix,
            *(float(np.nanmean([row[name] for row in rows])) for name in ("length", "onset", "first_share")),
        )

    def _gains(self, student: Student, rate: float, arm: Arm) -> np.ndarray:
        rows = [self.rows[Training(student, arm, rate, seed).key] for seed in self.scale.condition_seeds]
        return np.array([late(row) - row["accuracy"][0] for row in rows])

    def _kept(self, student: Student, rate: float, arm: Arm) -> tuple[float, np.ndarray]:
        """Return the ratio of the mean gains, and each seed's residual."""
        whole, some = self._gains(student, rate, UNIFORM), self._gains(student, rate, arm)
        ratio = float(some.mean() / whole.mean())
        return ratio, (some - ratio * whole) / whole.mean()

    def seconds(self) -> float:
        """Return the seconds that all jobs took, one beside another."""
        return sum(row["seconds"] for row in self.rows.values())
