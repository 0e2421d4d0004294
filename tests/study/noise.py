"""The noise floor of the weights: the discrepancy that is there without any difference, and what it does to w_t.

A model scored by itself differs from itself by rounding alone, in float32 and in bfloat16. That is set beside its
difference from the teacher, before a training and after it; and the IW-OPD weights under a bfloat16 teacher beside
those under a float32 one, token by token, on the same responses.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from arms import FIXED_RATE, UNIFORM, Scale, Student
from measure import command, options, right

from opdctl.registry import WEIGHTS
from opdctl.runs.run import load_run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs


@dataclass(frozen=True)
class Floor:
    """Before a training, or after it. All in nats, but the weights.

    drift: mean |A| a token, by who scores. weight_error: root mean square change of w_t by a bfloat16 teacher.
    spent_right, spent_wrong: median sum |A| of a right and of a wrong response, under the float32 teacher;
    weight_right, weight_wrong: median of their mean w_t; None where there is no such response.
    """

    drift: dict[str, float]
    weight_error: float
    spent_right: float | None
    spent_wrong: float | None
    weight_right: float | None
    weight_wrong: float | None


@dataclass(frozen=True)
class Noise:
    key: str
    before: Floor
    after: Floor


@dataclass(frozen=True)
class Scoring:
    """Responses under one scorer: |A| and w_t of each, and whether it is right."""

    drift: list[np.ndarray]
    weight: list[np.ndarray]
    is_right: np.ndarray


def scoring(student: Student, scale: Scale, scorer: str, dtype: str) -> Scoring:
    sizes = (f"rollout.prompts_per_step={scale.responses}", f"teacher.model={scorer}", f"teacher.dtype={dtype}")
    with TemporaryDirectory() as folder:
        command("rollout", *options(student, scale, *sizes), "--output", folder)
        command("score-teacher", "--output", folder)
        run = load_run(Path(folder))
        rows = list(read_scored(run, 0))
        found = [to_weight_inputs(row, 0, 1.0) for row in rows]
        weigh = WEIGHTS.get("iw_opd")()
        return Scoring(
            [np.abs(each.advantage_T) for each in found],
            [weigh(each) for each in found],
            np.array(right(run, student, rows)),
        )


def floor(student: Student, scale: Scale) -> Floor:
    scorers = {
        f"{who}, {dtype}": scoring(student, scale, model, dtype)
        for who, model in (("itself", student.model), ("teacher", student.teacher))
        for dtype in ("float32", "bfloat16")
    }
    taught, rounded = scorers["teacher, float32"], scorers["teacher, bfloat16"]
    error = np.concatenate([a - b for a, b in zip(rounded.weight, taught.weight, strict=True)])
    spent = np.array([drift.sum() for drift in taught.drift])
    weight = np.array([w.mean() for w in taught.weight])
    is_right = taught.is_right
    return Floor(
        {name: float(np.concatenate(each.drift).mean()) for name, each in scorers.items()},
        float(np.sqrt((error**2).mean())),
        *(median(of[which]) for of in (spent, weight) for which in (is_right, ~is_right)),
    )


def median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def measure(student: Student, scale: Scale) -> Noise:
    """Return the floor before and after a training by uniform weights."""
    with TemporaryDirectory() as folder:
        rate = f"train.learning_rate={FIXED_RATE}"
        command("train", *options(student, scale, rate, *UNIFORM.settings), "--output", folder)
        trained = str(load_run(Path(folder)).student_path(scale.steps))
        after = replace(student, model=trained)
        return Noise(f"noise/{student.name}", floor(student, scale), floor(after, scale))
