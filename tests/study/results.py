"""The statistics of the measurements: means and differences over seeds, with intervals.

The unit is the training run. Runs with the same seed have the same prompts, so arms are compared seed by seed.
Accuracies are fractions in [0, 1]; intervals are 95 % confidence intervals.

Shape: S seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from arms import PREFIX, SUFFIX, UNIFORM, Arm, Scale, Student, Training
from scipy import stats

CONFIDENCE_LEVEL = 0.95
FINAL_STEPS = 5
"""Number of final steps whose mean accuracy is that of the trained student: 5 x 32 problems."""

ROUNDING = 1e-12  # standard errors below this are 0

Rows = Mapping[str, Mapping[str, Any]]
Measure = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Interval:
    """A mean over training runs, its standard error, and the degrees of freedom of Student's t."""

    mean: float
    standard_error: float
    degrees_of_freedom: float

    @property
    def low(self) -> float:
        return self.mean - self._half_width

    @property
    def high(self) -> float:
        return self.mean + self._half_width

    @property
    def _half_width(self) -> float:
        """Half the width of the 95 % interval."""
        return float(stats.t.ppf((1 + CONFIDENCE_LEVEL) / 2, self.degrees_of_freedom)) * self.standard_error

    def format(self, spec: str = "+.3f") -> str:
        """Return "mean [low, high]", or the mean alone if all values are equal: more runs may still differ."""
        bounds = f" [{self.low:{spec}}, {self.high:{spec}}]" if self.standard_error > ROUNDING else ""
        return f"{self.mean:{spec}}{bounds}"

    def p_value(self, expected: float = 0.0) -> float:
        """Return the two-sided p-value of the hypothesis that the mean is `expected`."""
        distance = abs(self.mean - expected)
        if not self.standard_error:
            return float(distance == 0)
        return float(2 * stats.t.sf(distance / self.standard_error, self.degrees_of_freedom))


@dataclass(frozen=True)
class ConditionResult:
    """One condition: the student, and how much of the gain training on the prefix or the suffix alone retains.

    gain: of training on all tokens. prefix, suffix: retained fractions of it, and their difference, paired by seed.
    length, onset and prefix_signal: as in `TrainingResult`, means over seeds.
    """

    name: str
    learning_rate: float
    start: float
    gain: Interval
    prefix: Interval
    suffix: Interval
    difference: Interval
    length: float
    onset: float
    prefix_signal: float


def area(row: Mapping[str, Any]) -> float:
    """Return the mean accuracy over the steps: the area under the curve, divided by its length."""
    return float(np.mean(row["accuracy"]))


def accuracy_of_final_steps(row: Mapping[str, Any]) -> float:
    return float(np.mean(row["accuracy"][-FINAL_STEPS:]))


def final(row: Mapping[str, Any]) -> float:
    """Return the accuracy of the final student on test problems."""
    return float(row["final"])


def select_learning_rates(rows: Rows, scale: Scale) -> dict[str, float]:
    """Return the learning rate of each arm with the largest mean area over students and selection seeds."""
    areas: dict[str, dict[float, list[float]]] = {}
    for training in scale.selection():
        by_rate = areas.setdefault(training.arm.name, {})
        by_rate.setdefault(training.learning_rate, []).append(area(rows[training.key]))
    return {arm: max(by_rate, key=lambda rate: float(np.mean(by_rate[rate]))) for arm, by_rate in areas.items()}


def stratified_mean(strata: Sequence[np.ndarray]) -> Interval:
    """Return the mean of the means of the strata, each with the variance of its own values.

    The strata are students, whose variances differ by a factor of 100. The degrees of freedom are Satterthwaite's
    (1946), as in Welch's test.
    """
    free = np.array([len(values) - 1 for values in strata])
    variances = np.array([values.var(ddof=1) / len(values) for values in strata]) / len(strata) ** 2
    total = float(variances.sum())
    degrees_of_freedom = total**2 / float((variances**2 / free).sum()) if total else float(free.sum())
    return Interval(float(np.mean([values.mean() for values in strata])), total**0.5, degrees_of_freedom)


def ratio_of_means(part_S: np.ndarray, all_S: np.ndarray) -> Interval:
    """Return the ratio of two means that are paired by seed, by the delta method."""
    ratio = float(part_S.mean() / all_S.mean())
    residual_S = (part_S - ratio * all_S) / all_S.mean()
    return Interval(ratio, float(residual_S.std(ddof=1)) / len(all_S) ** 0.5, len(all_S) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for multiple comparisons (step-down, Holm 1979)."""
    order = np.argsort(p_values)
    stepped = [min(1.0, (len(p_values) - rank) * p_values[i]) for rank, i in enumerate(order)]
    corrected = np.empty(len(p_values))
    corrected[order] = list(accumulate(stepped, max))
    return corrected.tolist()


@dataclass(frozen=True)
class Results:
    """All measurements, with the selected learning rate of each arm and the degraded students."""

    rows: Rows
    scale: Scale
    learning_rates: Mapping[str, float]
    degraded: Sequence[Student]

    # ── The main comparison ──────────────────────────────────────────────────────────────────────────────────────────

    def values(self, student: Student, arm: Arm, measure: Measure) -> np.ndarray:
        """Return a measure of the runs of an arm, [S]."""
        return np.array([measure(row) for row in self._rows(student, arm)])

    def curves(self, student: Student, arm: Arm) -> np.ndarray:
        """Return the accuracies, [S, steps]."""
        return np.array([row["accuracy"] for row in self._rows(student, arm)])

    def _rows(self, student: Student, arm: Arm) -> list[Mapping[str, Any]]:
        learning_rate = self.learning_rates[arm.name]
        return [self.rows[Training(student, arm, learning_rate, seed).key] for seed in self.scale.seeds]

    def difference(self, baseline: Arm, arm: Arm, measure: Measure, students: Sequence[Student] = ()) -> Interval:
        """Return `arm` minus `baseline`, paired by seed, over the given students or all."""
        return stratified_mean(
            [self.values(s, arm, measure) - self.values(s, baseline, measure) for s in students or self.scale.students]
        )

    def against_uniform(self, measure: Measure, student: Student | None = None) -> dict[str, tuple[Interval, float]]:
        """Return the difference of each arm from uniform weights, with its p-value corrected for the number of arms."""
        arms = [arm for arm in self.scale.arms if arm != UNIFORM]
        differences = [self.difference(UNIFORM, arm, measure, [student] if student else ()) for arm in arms]
        corrected = holm([difference.p_value() for difference in differences])
        return {arm.name: pair for arm, pair in zip(arms, zip(differences, corrected, strict=True), strict=True)}

    def target(self, student: Student) -> float:
        """Return the accuracy halfway between that of the untrained student and 1."""
        return (1 + float(self.curves(student, UNIFORM)[:, 0].mean())) / 2

    def steps_to_target(self, student: Student, arm: Arm) -> list[int | None]:
        """Return, for each seed, the updates until the mean of three steps reaches the target, or None."""
        steps: list[int | None] = []
        for accuracy in self.curves(student, arm):
            smooth = np.convolve(accuracy, np.ones(3) / 3, mode="valid")
            reached = np.flatnonzero(smooth >= self.target(student))
            steps.append(int(reached[0]) + 1 if len(reached) else None)
        return steps

    # ── The conditions ───────────────────────────────────────────────────────────────────────────────────────────────

    def conditions(self) -> list[ConditionResult]:
        """Return the fraction of the gain that training on the first or the last 30 % retains, in each condition.

        The gain is the accuracy of the final steps minus that of the first step. The errors of the ratios follow the
        delta method, each with the variance over its own seeds: the spread of the gains differs by a factor of 15.
        """
        return [self._condition(*case) for case in self.scale.condition_cases(self.degraded)]

    def _condition(self, student: Student, learning_rate: float) -> ConditionResult:
        rows = self._condition_rows(student, learning_rate, UNIFORM)
        all_S, prefix_S, suffix_S = (self._gains_S(student, learning_rate, arm) for arm in (UNIFORM, PREFIX, SUFFIX))
        return ConditionResult(
            student.name,
            learning_rate,
            float(np.mean([row["accuracy"][0] for row in rows])),
            stratified_mean([all_S]),
            *(ratio_of_means(part_S, all_S) for part_S in (prefix_S, suffix_S, prefix_S - suffix_S)),
            *(float(np.nanmean([row[name] for row in rows])) for name in ("length", "onset", "prefix_signal")),
        )

    def _condition_rows(self, student: Student, learning_rate: float, arm: Arm) -> list[Mapping[str, Any]]:
        return [self.rows[Training(student, arm, learning_rate, seed).key] for seed in self.scale.condition_seeds]

    def _gains_S(self, student: Student, learning_rate: float, arm: Arm) -> np.ndarray:
        rows = self._condition_rows(student, learning_rate, arm)
        return np.array([accuracy_of_final_steps(row) - row["accuracy"][0] for row in rows])

    def total_seconds(self) -> float:
        """Return the sum of the seconds of all measurements."""
        return sum(row["seconds"] for row in self.rows.values())
