"""Runs side by side: how far each has come, its accuracies, its size and age. Only reads."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from opdctl import console
from opdctl.artifacts import files, leases
from opdctl.errors import OpdctlError
from opdctl.pipeline.progress import best_accuracy, latest_accuracies
from opdctl.runs.heartbeats import read_heartbeats
from opdctl.runs.run import Run


@dataclass(frozen=True)
class RunOverview:
    """The state of a run in a few values.

    newest, best: step and accuracy on the first benchmark. newest_student, best_student: their directories, None if
    there is none. age: seconds since a file was changed.
    """

    path: Path
    weight: str
    objective: str
    steps_done: int
    steps: int
    state: Literal["running", "finished", "stopped"]
    newest: tuple[int, float] | None
    best: tuple[int, float] | None
    newest_student: Path | None
    best_student: Path | None
    bytes: int
    age: float

    def as_dict(self) -> dict[str, Any]:
        """Return the values as JSON values."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return {"run": values.pop("path"), **values}

    def as_row(self) -> dict[str, str]:
        """Return the values as text by column."""
        return {
            "run": str(self.path),
            "steps": f"{self.steps_done}/{self.steps}",
            "state": self.state,
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
    best = best_accuracy(run, done)
    states = [file.lstat() for file in run.path.rglob("*") if file.is_file()]
    return RunOverview(
        path=run.path,
        weight=settings.weight.name,
        objective=settings.objective.name,
        steps_done=done,
        steps=settings.train.steps,
        state=_state(run),
        newest=next(latest_accuracies(run, done), None),
        best=best,
        newest_student=_student(run, done) if done > run.start_step else None,
        best_student=_student(run, best[0]) if best else None,
        bytes=sum(state.st_size for state in states),
        age=max(0.0, time.time() - max(state.st_mtime for state in states)),
    )


def _student(run: Run, step: int) -> Path | None:
    """Return the directory of the student of a step, None if it was removed."""
    path = run.student_path(step) if step else run.student.path
    return path if path.is_dir() else None


def _state(run: Run) -> Literal["running", "finished", "stopped"]:
    """Return what a run does. A worker that was killed is running for as long as its lease is live."""
    now = time.time()
    if any(beat.is_alive for beat in read_heartbeats(run, now)) or any(leases.live_leases(run.path, now)):
        return "running"
    return "finished" if run.current_step() >= run.recipe.train.steps else "stopped"


def summarize_runs(folder: Path) -> Iterator[RunOverview]:
    """Yield the runs in a folder, by name. An unreadable one is a warning."""
    for path in sorted(record.parent for record in folder.glob("*/run.json")):
        try:
            yield summarize_run(Run.load(path))
        except OpdctlError as error:
            console.warn(error.message)
