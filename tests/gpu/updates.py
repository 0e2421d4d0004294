"""The update alone: its speed, memory and share of the GPUs' peak, and the same student by one rank and by all."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu import machine
from gpu.workspace import CheckError, Workspace

MAX_PROBE_RMS = {"bfloat16": 0.05, "float32": 1e-4}
"""Nats, between the students of one rank and of several, after the updates, by the student's dtype."""
UPDATES = 4
FULL = ("rollout.max_tokens=1024", "rollout.prompts_per_step=256", "train.gradient_checkpointing=true")


@dataclass(frozen=True)
class Updated:
    """A run after its first step. metrics: of the step. probe: the log-probs of fixed ids under the new student."""

    ranks: int
    metrics: dict[str, Any]
    probe: np.ndarray[Any, Any]
    peak_share: float | None

    def summary(self) -> str:
        speed, share = UPDATES * self.metrics["update_tokens_per_second"], self.peak_share
        of_peak = "" if share is None else f", {share:.0%} of the peak"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks}: {speed:,.0f} tokens/s, {self.metrics['peak_memory_gib']:.1f} GiB{of_peak}"


def check_update(work: Workspace) -> None:
    """One rank and all make the same student from the same responses and scores, as far as rounding allows."""
    settings = ("train.steps=1", f"train.updates_per_step={UPDATES}", "eval.every_steps=0")
    settings += () if work.place.is_tiny else FULL
    work.opdctl("rollout", *work.recipe(*settings))
    work.opdctl("score-teacher", *work.recipe(*settings))
    updated = [_update(work, settings, ranks) for ranks in sorted({1, len(work.place.gpus)})]
    work.notes += [each.summary() for each in updated]
    difference = updated[0].probe - updated[-1].probe
    rms = float(np.sqrt(np.square(difference).mean()))
    if len(updated) > 1:
        work.notes.append(f"students differ by {rms:.1g} nats RMS")
    if not rms <= MAX_PROBE_RMS[work.dtype]:
        raise CheckError(f"the students of 1 and of {updated[-1].ranks} ranks differ by {rms:.3g} nats RMS")


def _update(work: Workspace, settings: tuple[str, ...], ranks: int) -> Updated:
    """Update a copy of the run by this number of ranks."""
    run = Path(shutil.copytree(work.run, work.folder / f"run-{ranks}"))
    work.opdctl("train", "--no-fill", *work.recipe(*settings, run=run), gpus=work.place.gpus[:ranks], ranks=ranks)
    record = json.loads((run / "step-00000/update.json").read_text())
    probe = np.array(record["probe"]["logprobs"])
    return Updated(ranks, record["metrics"], probe, _peak_share(run, record["metrics"], ranks))


def _peak_share(run: Path, metrics: dict[str, Any], ranks: int) -> float | None:
    """Return the time that the updates would take at the GPUs' peak, by the cost model, as a share of their time."""
    from opdctl.models.shapes import read_shape
    from opdctl.pipeline.costs import update_cost
    from opdctl.runs.run import Run

    opened, peak = Run.load(run), machine.peak_tflops()
    shape = read_shape(opened.student)
    if peak is None or shape is None:
        return None
    lengths = {"mean_response_tokens": max(1, round(metrics["response_length"]))}
    hardware = opened.recipe.hardware.model_copy(
        update={"tflops": peak, "train_gpus": ranks, "gpus_per_node": ranks, **lengths}
    )
    seconds = update_cost(opened.recipe.model_copy(update={"hardware": hardware}), shape, None).seconds
    return None if seconds is None else seconds * hardware.utilization / metrics["update_seconds"]
