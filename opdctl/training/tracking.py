"""Metrics to TensorBoard, trackio or Weights & Biases, in addition to metrics.jsonl.

A tracker must never stop a run: it is disabled at its first exception.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdctl import console, distributed
from opdctl.errors import summarize_exception
from opdctl.recipe.schema import Recipe

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Tracker:
    """An open experiment tracker. log: receives the metrics of a step, and the step."""

    log: Callable[[Metrics, int], object]
    close: Callable[[], object]


def _open_tensorboard(recipe: Recipe, path: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(path / "tensorboard"))
    return Tracker(
        lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()], writer.close
    )


def _open_trackio(recipe: Recipe, path: Path) -> Tracker:
    import trackio

    run = trackio.init(project=recipe.tracking.project, name=path.name, resume="allow", config=recipe.flat())
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


def _open_wandb(recipe: Recipe, path: Path) -> Tracker:
    import wandb

    identity = {"id": path.name, "name": path.name, "dir": str(path), "resume": "allow"}
    run = wandb.init(project=recipe.tracking.project, config=recipe.flat(), **identity)
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


TRACKER_FACTORIES = {"tensorboard": _open_tensorboard, "trackio": _open_trackio, "wandb": _open_wandb}


def warn_of_missing_trackers(recipe: Recipe) -> None:
    """Warn of trackers whose package is not installed."""
    for kind in recipe.tracking.report_to:
        if importlib.util.find_spec(kind) is None:
            console.warn(f"{kind} is not installed: it will be disabled; metrics.jsonl has all metrics")


@contextlib.contextmanager
def open_trackers(recipe: Recipe, path: Path) -> Iterator[Callable[[Metrics], None]]:
    """Yield a function that logs a step's metrics to the recipe's trackers, on rank 0 only. It never raises."""
    trackers: dict[str, Tracker] = {}
    for kind in recipe.tracking.report_to if distributed.is_main() else ():
        with _disable_on_error(kind, trackers):
            trackers[kind] = TRACKER_FACTORIES[kind](recipe, path)

    def log_metrics(metrics: Metrics) -> None:
        values = {name: value for name, value in metrics.items() if name != "step"}
        for name, tracker in list(trackers.items()):
            with _disable_on_error(name, trackers):
                tracker.log(values, int(metrics["step"]))

    try:
        yield log_metrics
    finally:
        for name, tracker in list(trackers.items()):
            with _disable_on_error(name, trackers):
                tracker.close()


@contextlib.contextmanager
def _disable_on_error(name: str, trackers: dict[str, Tracker]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tracker failures must not fail the run
        trackers.pop(name, None)
        reason = f"{type(error).__name__}: {summarize_exception(error)}"[:300]
        console.warn(f"{name} is disabled after an error: {reason}; metrics.jsonl has all metrics")
