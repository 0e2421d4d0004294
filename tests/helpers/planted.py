"""Runs with planted artifacts: advantages chosen by a test, in the files of the real stages."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from helpers.commands import small_recipe

from opdctl.artifacts.files import write_json
from opdctl.artifacts.records import Response, TokenScores
from opdctl.artifacts.tables import write_rows, write_scores
from opdctl.artifacts.versions import versioned
from opdctl.runs.open import open_run
from opdctl.runs.run import Run

TOKEN_ID = 3  # an ordinary token


def planted_run(path: Path, *overrides: str) -> Run:
    return open_run(small_recipe("rollout.num_parts=1", "train.steps=8", "weight.gamma=1.0", *overrides), path)


def plant(
    run: Run,
    step: int,
    advantages: Sequence[np.ndarray],
    student_logp: float = -1.0,
    student: Mapping[str, np.ndarray] | None = None,
    teacher: Mapping[str, np.ndarray] | None = None,
    prompts: Sequence[str] | None = None,
    finish_reasons: Sequence[str] | None = None,
) -> None:
    """Write a step's artifacts with these advantages. prompts: the prompt id of each response; by default all differ.
    finish_reasons: of each response; by default all are "stop".

    student, teacher: further columns of every response; the responses then have equal lengths.
    """
    if step:  # the update that makes the student of the step
        empty = {name: {} for name in ("settings", "inputs", "trainer", "student", "metrics")}
        write_json(run.update_path(step - 1), versioned("update") | {"step": step - 1} | empty)
    names = [f"planted/{step:05d}/{i}" for i in range(len(advantages))]
    rows = [
        Response(
            sample_id=name,
            prompt_id=prompt,
            prompt_ids=np.array([2], np.int32),
            response_ids=np.full(len(advantage), TOKEN_ID, np.int32),
            logprobs=np.full(len(advantage), student_logp, np.float32),
            finish_reason=reason,
            policy_version=step,
            source="planted",
            teacher="teacher",
            answer=None,
            **(student or {}),
        )
        for name, prompt, advantage, reason in zip(
            names, prompts or names, advantages, finish_reasons or ["stop"] * len(names), strict=True
        )
    ]
    scores = [TokenScores((a + student_logp).astype(np.float32), **(teacher or {})) for a in advantages]
    plant_rows(run, step, rows, scores)


def plant_rows(run: Run, step: int, rows: Sequence[Response], scores: Sequence[TokenScores]) -> None:
    """Write a step's rollout and teacher scores, divided into the run's parts."""
    rollout = run.rollout_stage(step)
    rollout.start({})
    for index in range(len(rollout.names)):
        part = rollout.items_of_part(list(rows), index)
        save = partial(write_rows, rows=part, record=Response)
        rollout.write(index, save, rows=len(part), tokens=sum(len(row.response_ids) for row in part))
    rollout.finalize()
    teacher = run.score_stage(step, "teacher")
    teacher.start({})
    for index in range(len(teacher.names)):
        ids = [row.sample_id for row in teacher.items_of_part(list(rows), index)]
        part_scores = teacher.items_of_part(list(scores), index)
        metadata = {"rollout": rollout.sha256(index)}
        save = partial(write_scores, ids=ids, scores=part_scores, logprob_metadata=metadata)
        teacher.write(index, save, rows=len(ids), tokens=sum(len(each.logprobs) for each in part_scores))
    teacher.finalize()
