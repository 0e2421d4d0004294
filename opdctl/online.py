"""One step after another: rollout, score, update, and an evaluation now and then. Knows the stages, not their work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opdctl import log, store
from opdctl.config import is_kept
from opdctl.engines import EnginePool, engine_pool
from opdctl.run import Run
from opdctl.stages import evaluate, rollout, score
from opdctl.stages.train import Trainer


@dataclass
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("rollout", "score", "update", "eval"), 0.0)
    )

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - start


def train(run: Run, device: str, *, fill: bool = True, repair: bool = False) -> Clock:
    """Train until the recipe's last step and return where the time went.

    With `fill`, rollouts and teacher scores that a step still lacks are made here, and the student is evaluated as the
    recipe says. Without it only updates are made, as far as other jobs' artifacts reach. With `repair`, damaged parts
    are made again.
    """
    clock, steps = Clock(), run.recipe.train.steps
    with store.locked(run.path, "train"), engine_pool(run.recipe, device) as engines:
        store.write_lines(run.metrics_path, [run.update(step)["metrics"] for step in range(run.current_step())])
        forget_old_students(run)
        trainer = None
        for step in range(run.current_step(), steps):
            if fill:
                evaluate_if_due(run, step, engines, clock)
                with clock.time("rollout"):
                    rollout.run(run, step, engines, repair=repair)
                with clock.time("score"):
                    score.run(run, step, engines, repair=repair)
            elif not run.is_scored(step):
                break
            with clock.time("update"):
                trainer = trainer or Trainer(run, device)
                metrics = trainer.step(step)
            log.say(line(metrics, steps))
            forget_old_students(run)
        if fill:
            evaluate_if_due(run, run.current_step(), engines, clock)
    return clock


def evaluate_if_due(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    """Evaluate the student before the first step, every so many, and after the last; the teachers once."""
    settings = run.recipe.eval
    if not settings.every or (step % settings.every and step < run.recipe.train.steps):
        return
    subjects = [evaluate.student(run, step)]
    subjects += [evaluate.scorer(run, name) for name in run.recipe.teacher_models()] if step == 0 else []
    for bench in settings.bench:
        for subject in subjects:
            if not evaluate.is_evaluated(run, bench, subject.name):
                with clock.time("eval"):
                    summary, _ = evaluate.run(run, bench, subject, engines)
                log.say(accuracy_line(summary), style="bold")


def forget_old_students(run: Run) -> None:
    """Remove students and trainer states that the recipe does not keep."""
    settings, done = run.recipe.train, run.current_step()
    for step in range(1, done - settings.keep_last + 1):
        store.remove(run.trainer_path(step))
        if not is_kept(run.recipe, step):
            store.remove(run.student_path(step))


def accuracy(run: Run) -> dict[str, float | None]:
    """Return the first benchmark's accuracy of the student before and now, and of each teacher; None: not measured."""
    names = {"before": "step-00000", "after": f"step-{run.current_step():05d}"}
    names |= {name: name for name in run.recipe.teacher_models()}
    found = {key: evaluate.stored_summary(run, run.recipe.eval.bench[0], name) for key, name in names.items()}
    return {key: summary["avg"] if summary else None for key, summary in found.items()}


def line(metrics: dict[str, Any], steps: int) -> str:
    """Return a step's metrics as one line."""
    return (
        f"step {metrics['step'] + 1:>{len(str(steps))}}/{steps}"
        f"  loss {metrics['loss']:+.4f}  |A| {metrics['abs_advantage']:.4f}  entropy {metrics['entropy']:.3f}"
        f"  length {metrics['response_length']:.0f}  truncated {metrics['truncated_share']:.0%}"
        f"  grad {metrics['grad_norm']:.2f}"
    )


def accuracy_line(summary: dict[str, Any]) -> str:
    low, high = summary["ci"]
    return (
        f"{summary['bench']}, {summary['model']}: {summary['avg']:.1%} [{low:.1%}, {high:.1%}]"
        f"  ({summary['problems']} problems, Avg@{summary['samples']})"
    )
