"""One training, and what of its artifacts the study keeps. Runs opdctl's own commands, in this process.

The responses that a step draws are answers to problems that this training has not seen: their share of right ones is
the accuracy of the student before the step's update, at no cost.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from arms import FIRST, Scale, Student, Training
from typer.testing import CliRunner

from opdctl.artifacts.records import ScoredResponse
from opdctl.cli.main import app
from opdctl.data.toy import TASKS
from opdctl.runs.run import Run, load_run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
FINAL_PROBLEMS = 128


@dataclass(frozen=True)
class Trial:
    """One training's measurements. accuracy: of the student before each update; final: of the last, on test problems.

    Of the first step's responses: mean length in tokens; onset, the median place of the first wrong token of wrong
    answers, as a share of the worked answer; first_share, the share of sum |A| on the first 30 % of the tokens.
    """

    key: str
    accuracy: list[float]
    final: float | None
    length: float
    onset: float
    first_share: float


def command(*words: object) -> Any:
    """Run an opdctl command and return what it prints as JSON. Raises RuntimeError with its message."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    if result.exit_code:
        raise RuntimeError(f"opdctl {' '.join(map(str, words))}: {result.stderr}") from result.exception
    return json.loads(result.stdout)


def options(student: Student, scale: Scale, *others: str) -> list[object]:
    """Return the recipe and its settings for a run on a student's task, as words of a command."""
    chosen = (
        f"student.model={student.model}",
        f"teacher.model={student.teacher}",
        f"prompts.source=toy:{student.task}",
        "prompts.max_tokens=31",
        f'eval.bench=["{student.task}"]',
        f"rollout.prompts_per_step={scale.prompts_per_step}",
        "rollout.max_tokens=128",
        f"train.steps={scale.steps}",
        "eval.every_steps=0",
        f"eval.limit={FINAL_PROBLEMS}",
        f"eval.batch_size={FINAL_PROBLEMS}",
        "eval.max_tokens=128",
        "pipeline.threads=1",
        *others,
    )
    return ["--recipe", RECIPE, *(word for setting in chosen for word in ("--set", setting))]


def train(training: Training, scale: Scale) -> Trial:
    """Train in a folder of its own, which is forgotten."""
    others = (f"seed={training.seed}", f"train.learning_rate={training.rate}", *training.arm.settings)
    with TemporaryDirectory() as folder:
        command("train", *options(training.student, scale, *others), "--output", folder)
        run = load_run(Path(folder))
        steps = [list(read_scored(run, step)) for step in range(scale.steps)]
        final = command("eval", "--run", folder)["avg"] if training.is_evaluated else None
        return Trial(
            training.key,
            [float(np.mean(right(run, training.student, rows))) for rows in steps],
            final,
            float(np.mean([len(row.response.response_ids) for row in steps[0]])),
            onset(run, training.student, steps[0]),
            first_share(steps[0]),
        )


def texts(run: Run, ids: Sequence[Any]) -> list[str]:
    return run.student.tokenizer.batch_decode(ids, skip_special_tokens=True)


def right(run: Run, student: Student, rows: Sequence[ScoredResponse]) -> list[bool]:
    """Return of each response whether its answer is right."""
    said = texts(run, [row.response.response_ids for row in rows])
    return [TASKS[student.task].extract(t) == row.response.answer for t, row in zip(said, rows, strict=True)]


def onset(run: Run, student: Student, rows: Sequence[ScoredResponse]) -> float:
    """Return the median place of the first wrong token of the wrong answers, as a share of the worked answer."""
    prompts = texts(run, [row.response.prompt_ids for row in rows])
    said = texts(run, [row.response.response_ids for row in rows])
    places = []
    for prompt, response, is_right in zip(prompts, said, right(run, student, rows), strict=True):
        worked = TASKS[student.task].solve(prompt)
        if not is_right:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(worked, response, strict=False))
            places.append(len(list(same)) / len(worked))
    return float(np.median(places)) if places else float("nan")


def first_share(rows: Sequence[ScoredResponse]) -> float:
    """Return the share of the discrepancy, sum |A|, on the first 30 % of each response's tokens."""
    drifts = [np.abs(to_weight_inputs(row, 0, 1.0).advantage_T) for row in rows]
    return float(sum(d[: int(np.ceil(FIRST * len(d)))].sum() for d in drifts) / sum(d.sum() for d in drifts))
