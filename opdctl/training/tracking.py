"""Metrics to TensorBoard, trackio or Weights & Biases, for those who look there. metrics.jsonl is written anyhow.

A tracker must never stop a run: whatever it raises is said once, and it is left out from then on.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdctl import console, distributed
from opdctl.recipe.schema import Recipe

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Tracker:
    """One of them: what takes a step's metrics, and what ends it."""

    log: Callable[[Metrics, int], object]
    close: Callable[[], object]


def _tensorboard(recipe: Recipe, path: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(path / "tensorboard"))
    return Tracker(
        lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()], writer.close
    )


def _trackio(recipe: Recipe, path: Path) -> Tracker:
    import trackio

    run = trackio.init(project=recipe.tracking.project, name=path.name, resume="allow", config=recipe.flat())
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


def _wandb(recipe: Recipe, path: Path) -> Tracker:
    import wandb

    own = {"id": path.name, "name": path.name, "dir": str(path), "resume": "allow"}
    run = wandb.init(project=recipe.tracking.project, config=recipe.flat(), **own)
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


KINDS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


@contextlib.contextmanager
def trackers(recipe: Recipe, path: Path) -> Iterator[Callable[[Metrics], None]]:
    """Yield what hands a step's metrics on to the recipe's trackers, on rank 0 alone. It raises nothing."""
    opened: dict[str, Tracker] = {}
    for kind in recipe.tracking.report_to if distributed.is_main() else ():
        with _spared(kind, opened):
            opened[kind] = KINDS[kind](recipe, path)

    def hand_on(metrics: Metrics) -> None:
        values = {name: value for name, value in metrics.items() if name != "step"}
        for name, tracker in list(opened.items()):
            with _spared(name, opened):
                tracker.log(values, int(metrics["step"]))

    try:
        yield hand_on
    finally:
        for name, tracker in list(opened.items()):
            with _spared(name, opened):
                tracker.close()


@contextlib.contextmanager
def _spared(name: str, opened: dict[str, Tracker]) -> Iterator[None]:
    """Leave a tracker that fails out from then on."""
    try:
        yield
    except Exception as error:  # its network, its disk, its server: not this run's
        opened.pop(name, None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        console.warn(f"{name}: {reason}; the run goes on without it, metrics.jsonl has all metrics")
