"""The noise floor of the token weights: |A| without any difference between models, and its effect on w_t.

A model that scores its own responses has advantages of rounding errors only, in float32 and in bfloat16. These are
compared with the advantages under the teacher, before and after training. The IW-OPD weights under a bfloat16 teacher
are compared with those under a float32 teacher, token by token, on the same responses.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from arms import FIXED_LEARNING_RATE, UNIFORM, Scale, Student
from commands import recipe_options, run_command
from training import are_correct

from opdctl.registry import WEIGHTS
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs


@dataclass(frozen=True)
class NoiseFloor:
    """The noise floor of one student. Advantages are in nats.

    mean_abs_advantage: mean |A| per token, by scorer. weight_rms_change: root mean square of the change of w_t under a
    bfloat16 teacher. Under the float32 teacher, medians over correct and over incorrect responses, None if there are
    none: abs_sum_*, of sum |A|; mean_weight_*, of the mean w_t.
    """

    mean_abs_advantage: dict[str, float]
    weight_rms_change: float
    abs_sum_correct: float | None
    abs_sum_incorrect: float | None
    mean_weight_correct: float | None
    mean_weight_incorrect: float | None


@dataclass(frozen=True)
class NoiseResult:
    """The noise floor of a student before and after training with uniform weights."""

    key: str
    before: NoiseFloor
    after: NoiseFloor


@dataclass(frozen=True)
class ScoredBatch:
    """The responses of one step under one scorer: |A| and w_t of each, [T], and whether it is correct."""

    abs_advantages: list[np.ndarray]
    weights: list[np.ndarray]
    is_correct: np.ndarray


def measure_noise(student: Student, scale: Scale) -> NoiseResult:
    """Measure the noise floor before and after training with uniform weights."""
    with TemporaryDirectory() as folder:
        setting = f"train.learning_rate={FIXED_LEARNING_RATE}"
        run_command("train", *recipe_options(student, scale, setting, *UNIFORM.settings), "--output", folder)
        trained = replace(student, model=str(Run.load(Path(folder)).student_path(scale.steps)))
        return NoiseResult(f"noise/{student.name}", noise_floor(student, scale), noise_floor(trained, scale))


def noise_floor(student: Student, scale: Scale) -> NoiseFloor:
    batches = {
        f"{name}, {dtype}": score_responses(student, scale, model, dtype)
        for name, model in (("itself", student.model), ("teacher", student.teacher))
        for dtype in ("float32", "bfloat16")
    }
    exact, rounded = batches["teacher, float32"], batches["teacher, bfloat16"]
    change = np.concatenate([a_T - b_T for a_T, b_T in zip(rounded.weights, exact.weights, strict=True)])
    abs_sums = np.array([a_T.sum() for a_T in exact.abs_advantages])
    mean_weights = np.array([w_T.mean() for w_T in exact.weights])
    is_correct = exact.is_correct
    return NoiseFloor(
        {name: float(np.concatenate(batch.abs_advantages).mean()) for name, batch in batches.items()},
        float(np.sqrt((change**2).mean())),
        *(median(values[mask]) for values in (abs_sums, mean_weights) for mask in (is_correct, ~is_correct)),
    )


def score_responses(student: Student, scale: Scale, scorer: str, dtype: str) -> ScoredBatch:
    """Sample the responses of one step and score them with the model `scorer`."""
    overrides = (f"rollout.prompts_per_step={scale.responses}", f"teacher.model={scorer}", f"teacher.dtype={dtype}")
    with TemporaryDirectory() as folder:
        run_command("rollout", *recipe_options(student, scale, *overrides), "--output", folder)
        run_command("score-teacher", "--output", folder)
        run = Run.load(Path(folder))
        rows = list(read_scored(run, 0))
        tokens = [to_weight_inputs(row, 0) for row in rows]
        weight = WEIGHTS.get("iw_opd")()
        return ScoredBatch(
            [np.abs(response.advantage_T) for response in tokens],
            [weight(response) for response in tokens],
            np.array(are_correct(run, student, rows)),
        )


def median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None
