"""analyze-position: where in the response the teacher's signal lies. From stored artifacts alone: no model, no torch.

Shapes: T tokens of one response, P positions, Q tenths of the response.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opdctl import log, report
from opdctl.config import lacking, weight_of
from opdctl.errors import ExitCode, OpdctlError
from opdctl.run import Run
from opdctl.scored import read_scored, tokens
from opdctl.status import next_stage_command
from opdctl.weights import Floats, Tokens, Weight, weigh

TENTHS = 10
QUANTITIES = ("abs_advantage", "k1", "weight")


@dataclass
class Sums:
    """Running count, sums and sums of squares of each quantity, bin by bin; grows as longer responses come."""

    count_P: Floats = field(default_factory=lambda: np.zeros(0))
    sum_QP: Floats = field(default_factory=lambda: np.zeros((len(QUANTITIES), 0)))
    square_QP: Floats = field(default_factory=lambda: np.zeros((len(QUANTITIES), 0)))

    def add(self, bins_T: np.ndarray, values_QT: Floats) -> None:
        """Add one response's tokens, token t to bin bins_T[t]."""
        if not len(bins_T):
            return
        grow = max(0, int(bins_T.max()) + 1 - len(self.count_P))
        self.count_P = np.pad(self.count_P, (0, grow))
        self.sum_QP, self.square_QP = (np.pad(a, ((0, 0), (0, grow))) for a in (self.sum_QP, self.square_QP))
        size = len(self.count_P)
        self.count_P += np.bincount(bins_T, minlength=size)
        for q, values_T in enumerate(values_QT):
            self.sum_QP[q] += np.bincount(bins_T, values_T, minlength=size)
            self.square_QP[q] += np.bincount(bins_T, values_T**2, minlength=size)

    def mean(self, quantity: str) -> Floats:
        return self.sum_QP[QUANTITIES.index(quantity)] / np.maximum(self.count_P, 1)

    def half_width(self, quantity: str) -> Floats:
        """Half of the 95 % interval of the mean in each bin, by the normal approximation; NaN below two values."""
        n, q = self.count_P, QUANTITIES.index(quantity)
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = (self.square_QP[q] - self.sum_QP[q] ** 2 / n) / (n - 1)
            return np.where(n > 1, 1.96 * np.sqrt(np.maximum(variance, 0) / n), np.nan)

    def share(self, quantity: str) -> Floats:
        """Each bin's share of the whole sum."""
        sums = self.sum_QP[QUANTITIES.index(quantity)]
        return sums / sums.sum() if sums.sum() else np.zeros_like(sums)


@dataclass
class Phase:
    """A stretch of training: by token position, and by tenths of each response's own length."""

    name: str
    steps: list[int]
    responses: int = 0
    position: Sums = field(default_factory=Sums)
    tenth: Sums = field(default_factory=Sums)

    def add(self, step: Sequence[Tokens], weight: Weight) -> None:
        """Add a step's responses, all of them: some weights rank the tokens of the whole step."""
        for response, weight_T in zip(step, weigh(weight, step), strict=True):
            advantage_T, length = response.advantage_T, len(response)
            values_QT = np.stack([np.abs(advantage_T), -advantage_T, weight_T])
            positions_T = np.arange(length)
            self.position.add(positions_T, values_QT)
            # A position as a fraction of the real length: token t of n covers t/n to (t+1)/n.
            self.tenth.add(positions_T * TENTHS // max(length, 1), values_QT)
            self.responses += 1


def run(run: Run) -> dict[str, Any]:
    """Read every scored step, draw the figures, and return the report's paths and the summary.

    Raises OpdctlError when no step is scored yet (code 1), or an artifact is damaged (code 3).
    """
    phases = _phases(scored_steps(run))
    if not phases:
        hint = f"run `{next_stage_command(run)}`"
        raise OpdctlError(f"{run.path}: no step has teacher scores yet", hint=hint, code=ExitCode.NO)
    weight = weight_of(run.recipe)
    if missing := lacking(run.recipe, weight.needs):
        settings = ", ".join(f"`{key} = {str(value).lower()}`" for key, value in missing.items())
        raise OpdctlError(
            f"{run.path}: weight `{run.recipe.weight.name}` needs what this run did not store",
            hint=f"a run with {settings} in its recipe stores it; name the weight in the recipe and it is so by itself",
            code=ExitCode.SETTINGS,
        )
    lam = run.recipe.train.extrapolation
    with log.progress("analyze-position", sum(len(phase.steps) for phase in phases)) as advance:
        for phase in phases:
            for step in phase.steps:
                phase.add([tokens(scored, step, lam) for scored in read_scored(run, step)], weight)
                advance(1)
    folder = run.path / "analysis"
    chosen = run.recipe.weight.model_dump(exclude_none=True)
    summary = {"run": run.path.name, "weight": chosen, "phases": [_summary(p) for p in phases]}
    return report.write(folder, phases, summary) | {"summary": summary}


def scored_steps(run: Run) -> list[int]:
    """Return the steps whose rollout and teacher scores are finished."""
    found = sorted(
        int(p.parent.parent.name.removeprefix("step-")) for p in run.path.glob("step-*/rollout/manifest.json")
    )
    return [step for step in found if all(stage.manifest() for stage in run.scores(step).values())]


def _phases(steps: list[int]) -> list[Phase]:
    """Split the steps into a first and a last quarter, at least one step each."""
    if len(steps) < 2:
        return [Phase(_span(steps), steps)] if steps else []
    quarter = max(1, len(steps) // 4)
    return [Phase(_span(part), part) for part in (steps[:quarter], steps[-quarter:])]


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"


def _summary(phase: Phase) -> dict[str, Any]:
    """Return a phase's numbers: the whole, and tenth by tenth."""
    share_Q = phase.tenth.share("abs_advantage")
    sums = phase.position.sum_QP.sum(axis=1) / max(phase.position.count_P.sum(), 1)
    return {
        "phase": phase.name,
        "responses": phase.responses,
        "tokens": int(phase.position.count_P.sum()),
        **{name: float(value) for name, value in zip(QUANTITIES, sums, strict=True)},
        "share_of_first_30_percent": float(share_Q[:3].sum()),
        "tenths": [
            {
                "tenth": q + 1,
                "share": float(share_Q[q]),
                **{name: float(phase.tenth.mean(name)[q]) for name in QUANTITIES},
            }
            for q in range(len(share_Q))
        ],
    }
