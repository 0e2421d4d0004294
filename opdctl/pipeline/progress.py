"""What training shows while it runs and at its end: a row for each step, accuracies, the summary."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from opdctl import console, distributed
from opdctl.evaluation import evaluate
from opdctl.evaluation.statistics import Estimate
from opdctl.runs.layout import list_steps, parse_step, step_name
from opdctl.runs.run import Run
from opdctl.training.tracking import Trackers

PROGRESS_COLUMNS = ("step", "loss", "|A|", "truncated", "accuracy", "tokens/s", "time left")


@contextlib.contextmanager
def report_steps(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that shows the metrics of a finished step, with the time left. Only rank 0 shows them."""
    if not distributed.is_main():
        yield lambda metrics: None
        return
    first, start, steps = run.current_step(), time.monotonic(), run.recipe.train.steps
    with console.live_table(str(run.path), PROGRESS_COLUMNS) as show:

        def report(metrics: dict[str, Any]) -> None:
            done = metrics["step"] + 1
            seconds_left = (time.monotonic() - start) / (done - first) * (steps - done)
            show(partial(format_row, run, metrics, seconds_left), format_line(metrics, steps))

        yield report


def format_row(run: Run, metrics: dict[str, Any], seconds_left: float) -> list[str]:
    """Return a step's metrics under PROGRESS_COLUMNS, with the latest accuracy and the step of its student."""
    done = metrics["step"] + 1
    latest = next((f"{accuracy:.1%} @{step}" for step, accuracy in latest_accuracies(run, done)), "")
    seconds = [metrics.get(f"{stage}_seconds", math.nan) for stage in ("rollout", "score", "update")]
    speed = metrics["tokens"] / sum(seconds)  # NaN if another command made a stage
    return [
        _count_steps(metrics["step"], run.recipe.train.steps),
        f"{metrics['loss']:+.4f}",
        f"{metrics['abs_advantage']:.4f}",
        f"{metrics['truncated_fraction']:.0%}",
        latest,
        "" if math.isnan(speed) else f"{speed:,.0f}",
        str(timedelta(seconds=round(seconds_left))),
    ]


def format_line(metrics: dict[str, Any], steps: int) -> str:
    """Return a step's metrics as one line."""
    staleness = f"  staleness {metrics['staleness']}" if metrics["staleness"] else ""
    startup = f"  start-up {metrics['startup_seconds']:.0f} s" if metrics["startup_seconds"] >= 1 else ""
    reward = f"  reward {metrics['reward']:.3f}" if "reward" in metrics else ""
    return (
        f"step {_count_steps(metrics['step'], steps)}"
        f"  loss {metrics['loss']:+.4f}  |A| {metrics['abs_advantage']:.4f}  entropy {metrics['entropy']:.3f}"
        f"  length {metrics['response_length']:.0f}  truncated {metrics['truncated_fraction']:.0%}"
        f"  grad {metrics['grad_norm']:.2f}{reward}{staleness}{startup}"
    )


def _count_steps(step: int, steps: int) -> str:
    """Return a finished step, which is counted from 0 as everywhere, with the number of finished steps."""
    width = len(str(steps))
    return f"{step:>{width}} ({step + 1:>{width}} of {steps})"


def accuracy_line(summary: dict[str, Any]) -> str:
    """Return an evaluation's accuracy with its interval as one line."""
    return (
        f"{summary['bench']}, {summary['model']}: {Estimate(summary['avg'], *summary['ci']).format()}"
        f"  ({summary['problems']} problems, Avg@{summary['samples']})"
    )


def latest_accuracies(run: Run, done: int, bench: str | None = None) -> Iterator[tuple[int, float]]:
    """Yield step and accuracy of the evaluated students up to step `done`, the latest first.

    bench: by default the recipe's first benchmark. The accuracies are read from the run directory: with
    `train --follow` other processes evaluate, in any order.
    """
    bench = bench or run.recipe.eval.bench[0]
    for step in reversed([step for step in list_steps(run.evaluation_path(bench, "")) if step <= done]):
        if summary := evaluate.stored_summary(run, bench, step_name(step)):
            yield step, summary["avg"]


class AccuracyLog:
    """Logs the accuracies of a run's evaluations to its trackers, each once.

    With `train --follow` other processes evaluate, in any order. Those that exist at first were logged before.
    """

    def __init__(self, run: Run, trackers: Trackers):
        self._run, self._trackers = run, trackers
        self._is_needed = distributed.is_main() and bool(run.recipe.tracking.report_to)
        self._logged = set(self._stored()) if self._is_needed and run.current_step() > run.start_step else set()

    def log_new(self) -> None:
        """Log the accuracy, with its interval, of each evaluation that has finished since the last call."""
        for key, metrics in (self._stored() if self._is_needed else {}).items():
            if key not in self._logged:
                self._logged.add(key)
                self._trackers.log(metrics)

    def _stored(self) -> dict[tuple[str, str], dict[str, float]]:
        """Return the metrics of each finished evaluation by benchmark and target."""
        run, found = self._run, {}
        for bench in run.recipe.eval.bench:
            students = [step_name(step) for step in list_steps(run.evaluation_path(bench, ""))]
            for target in (*students, *run.recipe.teacher_models()):
                if summary := evaluate.stored_summary(run, bench, target):
                    name = f"accuracy/{bench}" + (f"/{target}" if target not in students else "")
                    values = {name: summary["avg"], f"{name}/low": summary["ci"][0], f"{name}/high": summary["ci"][1]}
                    found[bench, target] = {"step": parse_step(target) or 0, **values}
        return found


@dataclass(frozen=True)
class TrainingSummary:
    """The result of a training: where it stands, accuracies on the first benchmark, and the seconds of each stage.

    accuracy: of the student `before` and `after`, and of each teacher; None if not measured. best: step and accuracy.
    """

    run: Run
    steps_done: int
    steps_before: int
    accuracy: dict[str, float | None]
    best: tuple[int, float] | None
    seconds: dict[str, float]

    @property
    def student(self) -> Path:
        done = self.steps_done
        return self.run.student_path(done) if done else self.run.student.path

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "run_dir": str(self.run.path),
            "steps": self.steps_done,
            "student": str(self.student),
            "accuracy": self.accuracy,
            "best": {"step": self.best[0], "accuracy": self.best[1]} if self.best else None,
            "seconds": self.seconds,
            "next": self.run.next_command(),
        }


def summarize_training(run: Run, steps_before: int, seconds: dict[str, float]) -> TrainingSummary:
    """Return the summary of a training that started after `steps_before` steps."""
    done = run.current_step()
    names = {"before": step_name(run.start_step), "after": step_name(done)}
    names |= {name: name for name in run.recipe.teacher_models()}
    summaries = {key: evaluate.stored_summary(run, run.recipe.eval.bench[0], name) for key, name in names.items()}
    accuracy = {key: summary["avg"] if summary else None for key, summary in summaries.items()}
    return TrainingSummary(run, done, steps_before, accuracy, best_accuracy(run, done), seconds)


def best_accuracy(run: Run, done: int, bench: str | None = None) -> tuple[int, float] | None:
    """Return step and accuracy of the best student up to step `done`, of equal ones the earliest; None if unknown."""
    return max(latest_accuracies(run, done, bench), key=lambda pair: (pair[1], -pair[0]), default=None)
