"""TODO."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from opdctl.evaluation import evaluate
from opdctl.runs.layout import list_steps, step_name
from opdctl.runs.run import Run

COLUMNS = ("step", "loss", "|A|", "truncated", "accuracy", "tokens/s", "time left")


def accuracies(run: Run) -> dict[int, float]:
    """Return the first benchmark's accuracy of every student that was evaluated, by step."""
    return dict(reversed([*newest_accuracies(run, run.current_step())]))


def newest_accuracies(run: Run, done: int) -> Iterator[tuple[int, float]]:
    """Yield step and accuracy of the students up to step `done` that were evaluated, the newest first.

    They are what the folder lists, not what this process evaluated: with `train --follow` others do it, in any order.
    """
    bench = run.recipe.eval.bench[0]
    steps = [step for step in list_steps(run.evaluation_path(bench, "")) if step <= done]
    for step in reversed(steps):
        if summary := evaluate.stored_summary(run, bench, step_name(step)):
            yield step, summary["avg"]


def best(run: Run) -> tuple[int, float] | None:
    """Return step and accuracy of the best student, the first of equals, or None where none was evaluated."""
    return max(accuracies(run).items(), key=lambda pair: (pair[1], -pair[0]), default=None)


def accuracy(run: Run) -> dict[str, float | None]:
    """Return the first benchmark's accuracy of the student before and now, and of each teacher; None: not measured."""
    names = {"before": step_name(0), "after": step_name(run.current_step())}
    names |= {name: name for name in run.recipe.teacher_models()}
    found = {key: evaluate.stored_summary(run, run.recipe.eval.bench[0], name) for key, name in names.items()}
    return {key: summary["avg"] if summary else None for key, summary in found.items()}


def format_row(run: Run, metrics: dict[str, Any], seconds_left: float) -> list[str]:
    """Return a step's metrics under COLUMNS, with the last accuracy measured and the step of its student."""
    done = metrics["step"] + 1
    accuracy = next((f"{share:.1%} @{step}" for step, share in newest_accuracies(run, done)), "")
    seconds = sum(metrics.get(f"{stage}_seconds", 0.0) for stage in ("rollout", "score", "update"))
    return [
        f"{done}/{run.recipe.train.steps}",
        f"{metrics['loss']:+.4f}",
        f"{metrics['abs_advantage']:.4f}",
        f"{metrics['truncated_fraction']:.0%}",
        accuracy,
        f"{metrics['tokens'] / seconds:,.0f}",
        str(timedelta(seconds=round(seconds_left))),
    ]


def format_line(metrics: dict[str, Any], steps: int) -> str:
    """Return a step's metrics as one line."""
    lag = f"  lag {metrics['staleness']}" if metrics["staleness"] else ""
    return (
        f"step {metrics['step'] + 1:>{len(str(steps))}}/{steps}"
        f"  loss {metrics['loss']:+.4f}  |A| {metrics['abs_advantage']:.4f}  entropy {metrics['entropy']:.3f}"
        f"  length {metrics['response_length']:.0f}  truncated {metrics['truncated_fraction']:.0%}"
        f"  grad {metrics['grad_norm']:.2f}{lag}"
    )


def accuracy_line(summary: dict[str, Any]) -> str:
    low, high = summary["ci"]
    return (
        f"{summary['bench']}, {summary['model']}: {summary['avg']:.1%} [{low:.1%}, {high:.1%}]"
        f"  ({summary['problems']} problems, Avg@{summary['samples']})"
    )
