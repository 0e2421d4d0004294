"""Runs whose artifacts are planted: advantages that a test chose, behind the real stages' files."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from helpers.commands import small_recipe

from opdctl.artifacts.files import write_json
from opdctl.artifacts.records import SCHEMA_VERSION, Response, TokenScores
from opdctl.artifacts.tables import write_rows, write_scores
from opdctl.runs.open import open_run
from opdctl.runs.run import Run

SKY = 3  # an ordinary token


def planted_run(path: Path, *overrides: str) -> Run:
    return open_run(small_recipe("rollout.num_parts=1", "train.steps=8", "weight.gamma=1.0", *overrides), path)


def plant(
    run: Run,
    step: int,
    advantages: Sequence[np.ndarray],
    student_logp: float = -1.0,
    student: Mapping[str, np.ndarray] | None = None,
    teacher: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a step's artifacts whose advantages are those given. student, teacher: further columns of every response,
    which then have all one length."""
    if step:  # the student of the step, as far as paths know
        nothing = {name: {} for name in ("settings", "inputs", "trainer", "student", "metrics")}
        write_json(run.update_path(step - 1), nothing | {"schema_version": SCHEMA_VERSION, "step": step - 1})
    names = [f"planted/{step:05d}/{i}" for i in range(len(advantages))]
    rows = [
        Response(
            sample_id=name,
            prompt_id=name,
            prompt_ids=np.array([2], np.int32),
            response_ids=np.full(len(advantage), SKY, np.int32),
            logprobs=np.full(len(advantage), student_logp, np.float32),
            finish_reason="stop",
            policy_version=step,
            source="planted",
            teacher="teacher",
            answer=None,
            **(student or {}),
        )
        for name, advantage in zip(names, advantages, strict=True)
    ]
    scores = [TokenScores((a + student_logp).astype(np.float32), **(teacher or {})) for a in advantages]
    plant_rows(run, step, rows, scores)


def plant_rows(run: Run, step: int, rows: Sequence[Response], scores: Sequence[TokenScores]) -> None:
    """Write a step's rollout and teacher scores, cut into the run's parts."""
    rollout = run.rollout_stage(step)
    rollout.start({})
    for index in range(len(rollout.names)):
        own = rollout.items_of_part(list(rows), index)
        save = partial(write_rows, rows=own, kind=Response)
        rollout.write(index, save, rows=len(own), tokens=sum(len(row.response_ids) for row in own))
    rollout.finalize()
    teacher = run.score_stage(step, "teacher")
    teacher.start({})
    for index in range(len(teacher.names)):
        own, found = teacher.items_of_part(list(rows), index), teacher.items_of_part(list(scores), index)
        ids, logprob_metadata = [row.sample_id for row in own], {"rollout": rollout.sha256(index)}
        save = partial(write_scores, ids=ids, scores=found, logprob_metadata=logprob_metadata)
        teacher.write(index, save, rows=len(own), tokens=sum(len(each.logprobs) for each in found))
    teacher.finalize()
