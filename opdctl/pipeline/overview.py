"""Runs side by side: how far each has come, its accuracies, its size and age. Only reads."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.errors import OpdctlError
from opdctl.pipeline.progress import best_accuracy, latest_accuracies
from opdctl.runs.run import Run


@dataclass(frozen=True)
class RunOverview:
    """The state of a run in a few values. newest, best: step and accuracy on the first benchmark. age: seconds since a
    file was changed."""

    path: Path
    weight: str
    objective: str
    steps_done: int
    steps: int
    newest: tuple[int, float] | None
    best: tuple[int, float] | None
    bytes: int
    age: float

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON values."""
        values = asdict(self)
        return {"run": str(values.pop("path")), **values}

    def as_row(self) -> dict[str, str]:
        """Return the values as text by column."""
        return {
            "run": str(self.path),
            "steps": f"{self.steps_done}/{self.steps}",
            "accuracy": format_accuracy(self.newest),
            "best": format_accuracy(self.best),
            "size": files.format_bytes(self.bytes),
            "age": str(timedelta(seconds=round(self.age))),
            "weight": self.weight,
            "objective": self.objective,
        }


def format_accuracy(evaluated: tuple[int, float] | None) -> str:
    """Return an accuracy with its step as text: "93.8% @64", "–" if there is none."""
    return f"{evaluated[1]:.1%} @{evaluated[0]}" if evaluated else "–"


def summarize_run(run: Run) -> RunOverview:
    done, settings = run.current_step(), run.recipe
    states = [file.lstat() for file in run.path.rglob("*") if file.is_file()]
    return RunOverview(
        path=run.path,
        weight=settings.weight.name,
        objective=settings.objective.name,
        steps_done=done,
        steps=settings.train.steps,
        newest=next(latest_accuracies(run, done), None),
        best=best_accuracy(run, done),
        bytes=sum(state.st_size for state in states),
        age=max(0.0, time.time() - max(state.st_mtime for state in states)),
    )


def summarize_runs(folder: Path) -> Iterator[RunOverview]:
    """Yield the runs in a folder, by name. An unreadable one is a warning."""
    for path in sorted(record.parent for record in folder.glob("*/run.json")):
        try:
            yield summarize_run(Run.load(path))
        except OpdctlError as error:
            console.warn(error.message)
