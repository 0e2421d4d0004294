"""The short-horizon control: where no prefix can drift, IW-OPD is standard OPD.

F_{t-1} is the fraction of the discrepancy before token t. Before the first token it is 0, so responses of one token all
have w_1 = 1 + gamma: the loss of OPD times a constant. AdamW's update does not depend on the scale of the gradient,
except for its epsilon. So both train the same student, and only longer responses can differ. The measured control is
tests/study/short_horizon.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import QUICKSTART, invoke
from safetensors.numpy import load_file

from opdctl.artifacts.records import Response
from opdctl.losses.token_weights import IwOpd, ResponseTokens
from opdctl.runs.run import Run

STEPS = 3
SETTINGS = (
    *(f"train.steps={STEPS}", "prompts.limit=96", "rollout.prompts_per_step=32", "pipeline.threads=1"),
    *("eval.every_steps=0", "train.save_every_steps=99", "train.max_grad_norm=1e9"),  # no gradient is clipped
)


def train(path: Path, max_tokens: int, weight: str, *weight_settings: str) -> Run:
    settings = (*SETTINGS, f"rollout.max_tokens={max_tokens}", f"weight.name={weight}", *weight_settings)
    arguments = [word for setting in settings for word in ("--set", setting)]
    result = invoke("train", "--recipe", QUICKSTART, *arguments, "--output", path)
    assert result.code == 0, result.err
    return Run.load(path)


def parameters(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "model.safetensors")
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def relative_difference(opd: Run, iw_opd: Run) -> float:
    """Return the distance between two trained students, relative to the distance that OPD moved the student."""
    start, one, other = (
        parameters(folder) for folder in (opd.student.path, *(r.student_path(STEPS) for r in (opd, iw_opd)))
    )
    return float(np.linalg.norm(other - one) / np.linalg.norm(one - start))


def metrics(run: Run, step: int) -> dict[str, Any]:
    return run.update(step)["metrics"]


def responses(run: Run) -> list[list[int]]:
    return [row.response_ids.tolist() for step in range(STEPS) for row in run.rollout_stage(step).read_all(Response)]


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_short_horizon_control_of_one_token_trains_the_student_of_opd(tmp_path: Path, gamma: float) -> None:
    opd = train(tmp_path / "opd", 1, "uniform")
    iw_opd = train(tmp_path / "iw-opd", 1, "iw_opd", f"weight.gamma={gamma}")
    assert metrics(opd, 0)["abs_advantage"] > 0.1  # there is something to learn
    assert [metrics(iw_opd, step)["weight"] for step in range(STEPS)] == [1 + gamma] * STEPS
    scale = metrics(iw_opd, 0)["grad_norm"] / metrics(opd, 0)["grad_norm"]
    assert scale == pytest.approx(1 + gamma, rel=0 if gamma == 1 else 1e-5)  # a power of two causes no rounding
    assert responses(iw_opd) == responses(opd)
    assert relative_difference(opd, iw_opd) < 0.005


def test_short_horizon_control_fails_for_longer_responses(tmp_path: Path) -> None:
    """Prefixes drift within eight tokens: the students differ, so the control can tell OPD from IW-OPD."""
    opd, iw_opd = train(tmp_path / "opd", 8, "uniform"), train(tmp_path / "iw-opd", 8, "iw_opd", "weight.gamma=0.5")
    assert 1 < metrics(iw_opd, 0)["weight"] < 1.5
    assert relative_difference(opd, iw_opd) > 0.05


@pytest.mark.parametrize(
    ("advantage", "weights"),
    [
        ([0.0, 0.0, 0.0, 0.0], [1.5, 1.5, 1.5, 1.5]),  # teacher and student agree
        ([0.0, 0.0, 0.0, -2.0], [1.5, 1.5, 1.5, 1.5]),  # they disagree at the last token: no prefix has drifted
        ([-2.0, 0.0, 0.0, 0.0], [1.5, 1.0, 1.0, 1.0]),  # every later token has a drifted prefix
    ],
)
def test_short_horizon_control_weights_are_equal_without_drift(advantage: list[float], weights: list[float]) -> None:
    zeros = np.zeros(len(advantage))
    assert IwOpd(gamma=0.5)(ResponseTokens(zeros, zeros, np.array(advantage))).tolist() == weights
