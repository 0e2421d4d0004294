"""One step after another: rollout, score, update, and an evaluation now and then. Knows the stages, not their work."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from opdctl import dist, log, store, tracking
from opdctl.config import is_kept
from opdctl.engines import EnginePool, engine_pool
from opdctl.errors import ExitCode, OpdctlError
from opdctl.run import Run
from opdctl.stages import evaluate, rollout, score
from opdctl.stages.train import Trainer

PATIENCE = 3  # steps in a row beyond a bound that are a collapse


@dataclass
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("rollout", "score", "update", "eval"), 0.0)
    )

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - start


def train(run: Run, device: str, *, fill: bool = True, repair: bool = False) -> Clock:
    """Train until the recipe's last step and return where the time went. Called by all ranks.

    With `fill`, rollouts and teacher scores that a step still lacks are made here, each rank its parts, and the student
    is evaluated as the recipe says. Without it only updates are made, as far as other jobs' artifacts reach. With
    `repair`, damaged parts are made again. Raises OpdctlError (code 1) where training has collapsed by the recipe's
    bounds.
    """
    clock, steps = Clock(), run.recipe.train.steps
    with contextlib.ExitStack() as stack:
        if dist.is_main():
            stack.enter_context(store.locked(run.path, "train"))
            store.write_lines(run.metrics_path, [run.update(step)["metrics"] for step in range(run.current_step())])
            forget_old_students(run)
        dist.barrier()
        engines = stack.enter_context(engine_pool(run.recipe, device))
        track = stack.enter_context(tracking.trackers(run.recipe, run.path))
        trainer = None
        for step in range(run.current_step(), steps):
            dist.main_first(lambda: refuse_collapse(run))
            seconds: dict[str, float] = {}
            if fill:
                evaluate_if_due(run, step, engines, clock)
                seconds = fill_in(run, step, engines, clock, repair)
            elif not run.is_scored(step):
                break
            with clock.time("update"):
                trainer = trainer or Trainer(run, device)
                metrics = trainer.step(step, seconds)
            if dist.is_main():
                log.say(line(metrics, steps))
                track(metrics)
                forget_old_students(run)
        if fill:
            evaluate_if_due(run, run.current_step(), engines, clock)
    return clock


def fill_in(run: Run, step: int, engines: EnginePool, clock: Clock, repair: bool) -> dict[str, float]:
    """Make a step's rollout and scores where they are missing: each rank its share of the parts.

    Returns the seconds of the stages of which all was made now, whose speed can be told.
    """
    shard, parts, seconds = store.Shard(dist.rank(), dist.world()), run.recipe.rollout.parts, {}
    stages = {"rollout": (rollout.run, parts), "score": (score.run, parts * len(run.scorers()))}
    for name, (make, whole) in stages.items():
        start = time.monotonic()
        with clock.time(name):
            made = dist.totals({"parts": make(run, step, engines, repair=repair, shard=shard)})["parts"]
        if made == whole:
            seconds[name] = time.monotonic() - start
    return seconds


def refuse_collapse(run: Run) -> None:
    """Raise OpdctlError (code 1) if each of the last steps is beyond a bound of the recipe."""
    done, bounds = run.current_step(), run.recipe.train
    recent = [run.update(step)["metrics"] for step in range(max(done - PATIENCE, 0), done)]
    truncated, entropies = [m["truncated_share"] for m in recent], [m["entropy"] for m in recent]
    if len(recent) < PATIENCE:
        return
    if min(truncated) > bounds.max_truncated_share:
        shown = ", ".join(f"{share:.0%}" for share in truncated)
        what, key = f"{shown} of the responses ran into rollout.max_tokens", "train.max_truncated_share"
    elif max(entropies) < bounds.min_entropy:
        shown = ", ".join(f"{entropy:.3g}" for entropy in entropies)
        what, key = f"the policy's entropy was {shown} nats a token", "train.min_entropy"
    else:
        return
    raise OpdctlError(
        f"{run.path}: collapse: in steps {done - PATIENCE + 1} to {done} {what}; the bound is {key}",
        hint=f"students of before: steps {', '.join(map(str, run.kept_steps()))}; move the bound to go on, or begin "
        "again with a lower train.learning_rate",
        code=ExitCode.NO,
    )


def evaluate_if_due(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    """Evaluate the student before the first step, every so many, and after the last; the teachers once."""
    settings = run.recipe.eval
    if not settings.every or (step % settings.every and step < run.recipe.train.steps):
        return
    if dist.is_main():
        _evaluate(run, step, engines, clock)
    dist.barrier()


def _evaluate(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    subjects = [evaluate.student(run, step)]
    subjects += [evaluate.scorer(run, name) for name in run.recipe.teacher_models()] if step == 0 else []
    for bench in run.recipe.eval.bench:
        for subject in subjects:
            if not evaluate.is_evaluated(run, bench, subject.name):
                with clock.time("eval"):
                    summary, _ = evaluate.run(run, bench, subject, engines)
                assert summary is not None  # no shard: the whole of it was made
                log.say(accuracy_line(summary), style="bold")


def forget_old_students(run: Run) -> None:
    """Remove students and trainer states that the recipe does not keep."""
    settings, done = run.recipe.train, run.current_step()
    saved = [step for step in range(1, done + 1) if run.trainer_path(step).is_dir()]
    for step in saved[: -settings.keep_last]:
        store.remove(run.trainer_path(step))
    for step in range(1, done - settings.keep_last + 1):
        if not is_kept(run.recipe, step):
            store.remove(run.student_path(step))


def accuracies(run: Run) -> dict[int, float]:
    """Return the first benchmark's accuracy of every student that was evaluated, by step."""
    steps, bench = range(run.current_step() + 1), run.recipe.eval.bench[0]
    found = {step: evaluate.stored_summary(run, bench, f"step-{step:05d}") for step in steps}
    return {step: summary["avg"] for step, summary in found.items() if summary}


def best(run: Run) -> tuple[int, float] | None:
    """Return step and accuracy of the best student, the first of equals, or None where none was evaluated."""
    return max(accuracies(run).items(), key=lambda pair: (pair[1], -pair[0]), default=None)


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
