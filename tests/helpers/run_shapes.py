"""Runs of eight shapes with planted artifacts, from ordinary ones to those that an analysis can get wrong."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers.planted import plant_rows, planted_run

from opdctl.analysis.continuations import summarize_continuations
from opdctl.artifacts.files import write_json
from opdctl.artifacts.records import GradedResponse, Response, TokenScores
from opdctl.artifacts.tables import write_rows
from opdctl.artifacts.versions import versioned
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.runs.run import Run

VOCABULARY = 56  # of the toy models
LIMIT = 160  # tokens
COLUMNS = ("rollout.entropy=true", "score.entropy=true", "rollout.top_k=4", "score.top_k=4")


class Planter:
    """Plants random responses in the steps of a run. All log-probs are below 0, and the teacher's fall along the
    response: |A| is greater at its end."""

    def __init__(self, run: Run, *, has_columns: bool = False):
        self.run, self._rng, self._has_columns = run, np.random.default_rng(0), has_columns

    def plant(self, step: int, lengths: Sequence[int], prompts: Sequence[str], limit: int = LIMIT) -> None:
        """Plant a step and the update that made its student. A response of `limit` tokens is truncated."""
        if step:
            self.record_update(step - 1)
        rows, scores = [], []
        for index, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
            row, score = self._response(step, index, length, prompt, limit)
            rows.append(row)
            scores.append(score)
        plant_rows(self.run, step, rows, scores)

    def record_update(self, step: int) -> None:
        """Record the update of a step with the settings of the recipe."""
        empty: dict[str, Any] = {name: {} for name in ("inputs", "trainer", "student", "metrics")}
        settings = fingerprint_settings(self.run.recipe, "update")
        write_json(self.run.update_path(step), versioned("update") | {"step": step, "settings": settings} | empty)

    def _response(self, step: int, index: int, length: int, prompt: str, limit: int) -> tuple[Response, TokenScores]:
        rng = self._rng
        student = -rng.exponential(0.7, length).astype(np.float32)
        teacher = -rng.exponential(0.5 + np.linspace(0.0, 1.5, length)).astype(np.float32)
        sampled: dict[str, Any] = {}
        scored: dict[str, Any] = {}
        if self._has_columns:
            for columns in (sampled, scored):
                top_ids = np.array([rng.permutation(12)[:4] for _ in range(length)], np.int32).reshape(length, 4)
                columns |= {"entropies": rng.gamma(2.0, 0.5, length).astype(np.float32), "top_ids": top_ids}
                columns["top_logprobs"] = np.full((length, 4), -2.0, np.float32)
            sampled["loss_mask"] = rng.random(length) < 0.7
        row = Response(
            sample_id=f"{prompt}/{step:05d}/{index}",
            prompt_id=prompt,
            prompt_ids=np.array([2, 5], np.int32),
            response_ids=rng.integers(3, 3 + rng.integers(2, 50), length).astype(np.int32),
            logprobs=student,
            finish_reason="length" if length == limit else "stop",
            policy_version=step,
            source="planted",
            teacher="teacher",
            answer=None,
            **sampled,
        )
        return row, TokenScores(teacher, **scored)


def _names(step: int, count: int) -> list[str]:
    return [f"prompt-{step}-{number}" for number in range(count)]


def _plant_ordinary(path: Path) -> None:
    """8 steps with responses to 240 prompts: more than there are groups. A seventh of the responses is truncated."""
    planter, rng = Planter(planted_run(path, "weight.gamma=0.5")), np.random.default_rng(1)
    for step in range(8):
        lengths = np.minimum(rng.geometric(1 / 70, 30), LIMIT)
        planter.plant(step, lengths.tolist(), _names(step, 30))
    _plant_continuations(path, step=0)


def _plant_continuations(path: Path, step: int) -> None:
    """Plant continuations of prefixes of 12 responses, one by each model, with their summary."""
    rng, folder = np.random.default_rng(9), path / "continuations" / f"step-{step:05d}"
    rows: dict[str, list[GradedResponse]] = {}
    for model, accuracy in (("student", 0.3), ("teacher", 0.8)):
        rows[model] = [
            GradedResponse(
                sample_id=f"prompt-{step}-{number}/{step:05d}/{number}/{prefix}/0",
                problem_id=f"prompt-{step}-{number}",
                response_ids=np.array([3], np.int32),
                text="",
                finish_reason="length" if rng.random() < 0.2 else "stop",
                gold="1",
                extracted=None,
                correct=bool(rng.random() < accuracy),
                verdict="ok",
                vote=None,
            )
            for prefix in ("0", "50", "90", "16-tokens")
            for number in range(12 if prefix != "16-tokens" else 7)
        ]
        (folder / model).mkdir(parents=True)
        write_rows(folder / model / "part-00000-of-00001.parquet", rows[model], GradedResponse)
    on_track = {row.sample_id.rpartition("/")[0]: is_on_track(row.sample_id) for row in rows["student"]}
    header = {"step": step, "student": f"step-{step:05d}", "bench": "sort12", "problems": 12, "responses": 12}
    accuracies = summarize_continuations(rows, on_track)
    write_json(folder / "summary.json", versioned("continuations") | header | {"max_tokens": LIMIT} | accuracies)


def is_on_track(sample_id: str) -> bool:
    """Whether the prefix of a planted continuation is right so far: that of every third response."""
    return int(sample_id.split("/")[2]) % 3 == 0


def _plant_one_step(path: Path) -> None:
    rng = np.random.default_rng(2)
    Planter(planted_run(path, "weight.name=uniform")).plant(0, rng.integers(1, 90, 40).tolist(), _names(0, 40))


def _plant_three_prompts(path: Path) -> None:
    planter, rng = Planter(planted_run(path, "weight.name=linear_decay")), np.random.default_rng(3)
    for step in range(2):
        planter.plant(step, rng.integers(20, 60, 9).tolist(), [f"prompt-{number % 3}" for number in range(9)])


def _plant_truncated(path: Path) -> None:
    planter = Planter(planted_run(path))
    for step in range(2):
        planter.plant(step, [64] * 24, _names(step, 24), limit=64)


def _plant_short(path: Path) -> None:
    planter, rng = Planter(planted_run(path)), np.random.default_rng(5)
    for step in range(2):
        planter.plant(step, [0, 1, *rng.integers(0, 13, 30)], _names(step, 32))


def _plant_changed_weight(path: Path) -> None:
    """The steps 0 and 1 were trained with iw_opd, 2 and 3 with linear_decay, which the recipe has since then."""
    rng = np.random.default_rng(6)
    planter = Planter(planted_run(path, "weight.gamma=2.0"))
    for step in range(4):
        if step == 3:  # the update of step 2 is the first one with the other weight
            _replace_weight(path, '[weight]\nname = "linear_decay"\ngamma = 0.75\n')
            planter.run = Run.load(path)
        planter.plant(step, rng.integers(10, 80, 25).tolist(), _names(step, 25))


def _replace_weight(path: Path, section: str) -> None:
    text = (path / "recipe.toml").read_text()
    before, _, rest = text.partition("[weight]\n")
    (path / "recipe.toml").write_text(f"{before}{section}\n[objective]{rest.partition('[objective]')[2]}")


def _plant_missing_steps(path: Path) -> None:
    planter, rng = Planter(planted_run(path)), np.random.default_rng(7)
    for step in range(6):
        planter.plant(step, rng.integers(5, 60, 12).tolist(), _names(step, 12))
    for step in (2, 3):
        planter.run.score_stage(step, "teacher").manifest_path.unlink()


def _plant_trajectories(path: Path) -> None:
    """Two epochs of 15 prompts with two responses each, with tokens that the student did not sample."""
    run = planted_run(path, "rollout.samples_per_prompt=2", "rollout.num_parts=3", "weight.gamma=1.0", *COLUMNS)
    planter, rng = Planter(run, has_columns=True), np.random.default_rng(8)
    for step in range(2):
        prompts = [f"prompt-{number // 2}" for number in range(30)]
        planter.plant(step, np.minimum(rng.integers(8, 200, 30), LIMIT).tolist(), prompts)


SHAPES: dict[str, Callable[[Path], None]] = {
    "ordinary": _plant_ordinary,
    "one step": _plant_one_step,
    "three prompts": _plant_three_prompts,
    "all truncated": _plant_truncated,
    "short responses": _plant_short,
    "changed weight": _plant_changed_weight,
    "missing steps": _plant_missing_steps,
    "trajectories": _plant_trajectories,
}
"""Each shape with the function that plants a run of it."""
