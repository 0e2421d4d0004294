"""Metrics to MLflow, TensorBoard, trackio or Weights & Biases, in addition to metrics.jsonl.

A tracker must never stop a run: it is disabled at its first exception. A run has an id in the trackers that belongs to
its directory, whatever that is called: two runs of one name are two runs there, and a renamed one stays the same.
"""

import contextlib
import importlib.util
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdctl import console, distributed
from opdctl.artifacts import files
from opdctl.artifacts.manifests import TrackingRecord
from opdctl.errors import summarize_exception
from opdctl.recipe.schema import Recipe

Metrics = Mapping[str, float]
IDENTITY_FILE = "tracking.json"


@dataclass(frozen=True)
class Tracker:
    """An open experiment tracker.

    log: receives the metrics of a step, and the step. save: receives a file of the run directory, such as a card.
    """

    log: Callable[[Metrics, int], object]
    close: Callable[[], object]
    save: Callable[[Path], object] = lambda file: None


def run_identity(path: Path) -> str:
    """Return the id of the run in `path` in the trackers, which is written at its first use.

    A run that an earlier version tracked has the name of its directory.
    """
    file = path / IDENTITY_FILE
    if not file.exists():
        is_tracked = (path / "metrics.jsonl").exists() and files.read_text(path / "metrics.jsonl").strip()
        files.write_json(file, TrackingRecord(id=path.name if is_tracked else uuid.uuid4().hex))
    return str(files.read_json(file, TrackingRecord, f"remove {file}: the run then starts anew in the trackers")["id"])


def _open_tensorboard(recipe: Recipe, path: Path, identity: str) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(path / "tensorboard"))
    return Tracker(
        lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()], writer.close
    )


def _open_trackio(recipe: Recipe, path: Path, identity: str) -> Tracker:
    import trackio

    name = identity if identity == path.name else f"{path.name}-{identity[:8]}"  # a name is the identity there
    run = trackio.init(project=recipe.tracking.project, name=name, resume="allow", config=recipe.flat())
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=step), run.finish)


def _open_wandb(recipe: Recipe, path: Path, identity: str) -> Tracker:
    import wandb

    names = {"id": identity, "name": path.name, "dir": str(path), "resume": "allow"}
    run = wandb.init(project=recipe.tracking.project, config=recipe.flat(), **names)

    def save(file: Path) -> None:
        artifact = wandb.Artifact(f"{file.stem}-{identity}", type=file.stem)
        artifact.add_file(str(file))
        run.log_artifact(artifact)

    # Steps must not decrease: an accuracy of an earlier student is logged at the present one.
    return Tracker(lambda metrics, step: run.log(dict(metrics), step=max(step, run.step)), run.finish, save)


def _open_mlflow(recipe: Recipe, path: Path, identity: str) -> Tracker:
    import mlflow

    mlflow.set_experiment(recipe.tracking.project)
    runs = mlflow.search_runs(filter_string=f"tags.opdctl_run = '{identity}'", output_format="list")
    options = {"run_id": runs[0].info.run_id} if runs else {"run_name": path.name, "tags": {"opdctl_run": identity}}
    mlflow.start_run(**options)
    if not runs:
        mlflow.log_dict(recipe.flat(), "recipe.json")
    return Tracker(
        lambda metrics, step: mlflow.log_metrics(dict(metrics), step=step),
        mlflow.end_run,
        lambda file: mlflow.log_artifact(str(file)),
    )


FILE_TRACKERS = ("mlflow", "wandb")
"""The trackers that keep files beside the metrics."""
TRACKER_FACTORIES = {
    "mlflow": _open_mlflow,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
    "wandb": _open_wandb,
}


def warn_of_missing_trackers(recipe: Recipe) -> None:
    """Warn of trackers whose package is not installed."""
    for kind in recipe.tracking.report_to:
        if importlib.util.find_spec(kind) is None:
            console.warn(f"{kind} is not installed: it will be disabled; metrics.jsonl has all metrics")


@dataclass(frozen=True)
class Trackers:
    """The open trackers of a run, by name. No method raises."""

    opened: dict[str, Tracker]

    def log(self, metrics: Metrics) -> None:
        """Log metrics at the step among them."""
        values = {name: value for name, value in metrics.items() if name != "step"}
        self._call(lambda tracker: tracker.log(values, int(metrics["step"])))

    def save(self, file: Path) -> None:
        """Keep a file beside the metrics, where a tracker has files. A missing one is left out."""
        if file.exists():
            self._call(lambda tracker: tracker.save(file))

    def _call(self, function: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self.opened.items()):
            with _disable_on_error(name, self.opened):
                function(tracker)


def save_to_trackers(recipe: Recipe, path: Path, file: Path) -> None:
    """Keep a file of the run in `path` in the recipe's trackers that keep files. Never raises."""
    with open_trackers(recipe, path, FILE_TRACKERS) as trackers:
        trackers.save(file)


@contextlib.contextmanager
def open_trackers(recipe: Recipe, path: Path, kinds: Collection[str] | None = None) -> Iterator[Trackers]:
    """Yield the recipe's trackers, those among `kinds` if not None, on rank 0 only."""
    trackers = Trackers({})
    wanted = [kind for kind in recipe.tracking.report_to if kinds is None or kind in kinds]
    for kind in wanted if distributed.is_main() else ():
        with _disable_on_error(kind, trackers.opened):
            trackers.opened[kind] = TRACKER_FACTORIES[kind](recipe, path, run_identity(path))
    try:
        yield trackers
    finally:
        for name, tracker in list(trackers.opened.items()):
            with _disable_on_error(name, trackers.opened):
                tracker.close()


@contextlib.contextmanager
def _disable_on_error(name: str, trackers: dict[str, Tracker]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tracker failures must not fail the run
        trackers.pop(name, None)
        reason = f"{type(error).__name__}: {summarize_exception(error)}"[:300]
        console.warn(f"{name} is disabled after an error: {reason}; metrics.jsonl has all metrics")
