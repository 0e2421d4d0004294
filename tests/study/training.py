"""One training run, and what the study measures of it.

The problems of a step are new in that run. So the accuracy of a step's responses is that of the student before the
update of the step, and needs no evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from arms import PREFIX_FRACTION, Scale, Student, Training
from commands import recipe_options, run_command

from opdctl.artifacts.records import ScoredResponse
from opdctl.data.toy import TASKS
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs


@dataclass(frozen=True)
class TrainingResult:
    """The measurements of one training run.

    accuracy: of the student before each update. final: of the final student on test problems.

    Of the responses of the first step: length, their mean length in tokens; onset, the median over incorrect responses
    of the position of the first incorrect token, as a fraction of the worked answer; prefix_signal, the fraction of
    sum |A| on the first 30 % of the tokens.
    """

    key: str
    accuracy: list[float]
    final: float | None
    length: float
    onset: float
    prefix_signal: float


def measure_training(training: Training, scale: Scale) -> TrainingResult:
    """Run one training in a temporary directory and measure it."""
    overrides = (f"seed={training.seed}", f"train.learning_rate={training.learning_rate}", *training.arm.settings)
    student = training.student
    with TemporaryDirectory() as folder:
        run_command("train", *recipe_options(student, scale, *overrides), "--output", folder)
        run = Run.load(Path(folder))
        steps = [list(read_scored(run, step)) for step in range(scale.steps)]
        final = run_command("eval", "--run", folder)["avg"] if training.is_evaluated else None
        return TrainingResult(
            training.key,
            [float(np.mean(are_correct(run, student, rows))) for rows in steps],
            final,
            float(np.mean([len(row.response.response_ids) for row in steps[0]])),
            error_onset(run, student, steps[0]),
            prefix_signal(steps[0]),
        )


def decode(run: Run, ids: Sequence[Any]) -> list[str]:
    return run.student.tokenizer.batch_decode(ids, skip_special_tokens=True)


def are_correct(run: Run, student: Student, rows: Sequence[ScoredResponse]) -> list[bool]:
    """Return whether the answer of each response is correct."""
    texts = decode(run, [row.response.response_ids for row in rows])
    return [TASKS[student.task].extract(t) == row.response.answer for t, row in zip(texts, rows, strict=True)]


def error_onset(run: Run, student: Student, rows: Sequence[ScoredResponse]) -> float:
    """Return the median position of the first incorrect token of incorrect responses, as a fraction of the worked
    answer; NaN if all are correct."""
    prompts = decode(run, [row.response.prompt_ids for row in rows])
    texts = decode(run, [row.response.response_ids for row in rows])
    onsets = []
    for prompt, response, is_correct in zip(prompts, texts, are_correct(run, student, rows), strict=True):
        solution = TASKS[student.task].solve(prompt)
        if not is_correct:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(solution, response, strict=False))
            onsets.append(len(list(same)) / len(solution))
    return float(np.median(onsets)) if onsets else float("nan")


def prefix_signal(rows: Sequence[ScoredResponse]) -> float:
    """Return the fraction of sum |A| on the first 30 % of the tokens of each response."""
    abs_advantages = [np.abs(to_weight_inputs(row, 0).advantage_T) for row in rows]
    on_prefix = sum(a_T[: int(np.ceil(PREFIX_FRACTION * len(a_T)))].sum() for a_T in abs_advantages)
    return float(on_prefix / sum(a_T.sum() for a_T in abs_advantages))
