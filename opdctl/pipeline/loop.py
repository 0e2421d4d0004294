"""One step after another: rollout, score, update, and an evaluation now and then. Knows the stages, not their work."""

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from opdctl import claims, dist, log, plan, store, tracking
from opdctl.config import is_kept
from opdctl.engines import EnginePool, engine_pool
from opdctl.errors import ExitCode, OpdctlError
from opdctl.follow import following
from opdctl.run import Run
from opdctl.stages import evaluate, rollout, score
from opdctl.stages.train import Trainer

PATIENCE = 3  # steps in a row beyond a bound that are a collapse
COLUMNS = ("step", "loss", "|A|", "truncated", "accuracy", "tokens/s", "time left")


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


def train(run: Run, device: str, *, fill: bool = True, follow: bool = False, repair: bool = False) -> Clock:
    """Train until the recipe's last step and return where the time went. Called by all ranks.

    With `fill`, rollouts and teacher scores that a step still lacks are made here, each rank its parts, and the student
    is evaluated as the recipe says. Without it only updates are made, as far as other jobs' artifacts reach; with
    `follow` they are waited for. With `repair`, damaged parts are made again. Raises OpdctlError (code 1) where
    training has collapsed by the recipe's bounds.
    """
    clock, steps = Clock(), run.recipe.train.steps
    first, start = run.current_step(), time.monotonic()
    with contextlib.ExitStack() as stack:
        if dist.is_main():
            stack.enter_context(claims.claimed(run.path, "train"))
            for folder in (run.path / "student", run.path / "trainer"):
                store.sweep(folder, everyones=True)  # whoever began something here is dead: the run is claimed
            store.write_lines(run.metrics_path, [run.update(step)["metrics"] for step in range(run.current_step())])
            forget_old_students(run)
        dist.barrier()
        show = stack.enter_context(log.growing_table(str(run.path), COLUMNS)) if dist.is_main() else None
        engines = stack.enter_context(engine_pool(run.recipe, device))
        track = stack.enter_context(tracking.trackers(run.recipe, run.path))
        follower = stack.enter_context(following(run, "train")) if follow else None
        trainer = Trainer(run, device) if follow and run.current_step() < steps else None
        if repair and dist.share(dist.is_main() and not has_whole_student(run)):
            trainer = trainer or Trainer(run, device)
            trainer.repair_student(run.current_step())
        for step in range(run.current_step(), steps):
            dist.main_first(lambda: refuse_collapse(run))
            dist.main_first(lambda: plan.check_space(run, ("rollout", "score", "update") if fill else ("update",)))
            seconds: dict[str, float] = {}
            if fill:
                evaluate_if_due(run, step, engines, clock)
                seconds = fill_in(run, step, engines, clock, repair)
            elif follower is not None:
                dist.main_first(partial(follower.wait_for, step, partial(run.is_scored, step), "the teacher's scores"))
            elif not run.is_scored(step):
                break
            with clock.time("update"):
                trainer = trainer or Trainer(run, device)
                metrics = trainer.step(step, seconds)
            if show is not None:
                left = (time.monotonic() - start) / (step + 1 - first) * (steps - step - 1)
                show(partial(row, run, metrics, left), line(metrics, steps))
                track(metrics)
                forget_old_students(run)
        if fill:
            evaluate_if_due(run, run.current_step(), engines, clock)
    return clock


def has_whole_student(run: Run) -> bool:
    """Whether the newest student is what was written."""
    try:
        run.student_at(run.current_step())
    except OpdctlError:
        return False
    return True


def follow(run: Run, device: str, stage: str, scorers: Collection[str], shard: store.Shard) -> None:
    """Draw the responses of step after step, or score them with the `scorers`, as soon as their inputs are there, until
    the recipe's last. Raises OpdctlError (code 5) when there were none for `pipeline.max_idle_seconds`."""
    with engine_pool(run.recipe, device) as engines, following(run, stage) as follower:
        for step in range(run.current_step(), run.recipe.train.steps):
            if stage == "rollout":
                follower.wait_for(step, partial(run.may_draw, step), "a student")
                made = rollout.run(run, step, engines, shard=shard, wait=True)
                log.say(f"step {step}: {made} parts drawn by the student of step {run.policy_step(step)}")
            else:
                follower.wait_for(step, partial(run.is_drawn, step), "the responses")
                made = score.run(run, step, engines, only=scorers, shard=shard, wait=True)
                log.say(f"step {step}: {made} parts scored")


def fill_in(run: Run, step: int, engines: EnginePool, clock: Clock, repair: bool) -> dict[str, float]:
    """Make a step's rollout and scores where they are missing: each rank its share of the parts.

    Returns the seconds of the stages of which all was made now, whose speed can be told.
    """
    shard, parts, seconds = store.Shard(dist.rank(), dist.world()), run.recipe.rollout.parts, {}
    stages = {"rollout": (rollout.run, parts), "score": (score.run, parts * len(run.scorers()))}
    for name, (make, whole) in stages.items():
        start = time.monotonic()
        with clock.time(name):
            made = dist.totals({"parts": make(run, step, engines, repair=repair, shard=shard, wait=True)})["parts"]
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
                    summary, _ = evaluate.run(run, bench, subject, engines, wait=True)
                assert summary is not None  # waited for
                log.say(accuracy_line(summary), style="bold")


def forget_old_students(run: Run) -> None:
    """Remove students and trainer states that the recipe does not keep."""
    settings, done = run.recipe.train, run.current_step()
    saved = [step for step in range(1, done + 1) if run.trainer_path(step).is_dir()]
    for step in saved[: -settings.keep_last]:
        store.remove(run.trainer_path(step))
    drawing = run.recipe.pipeline.max_staleness + 1  # students that may still be drawn with
    for step in range(1, done - max(settings.keep_last, drawing) + 1):
        if not is_kept(run.recipe, step):
            store.remove(run.student_path(step))


def accuracies(run: Run) -> dict[int, float]:
    """Return the first benchmark's accuracy of every student that was evaluated, by step."""
    return dict(reversed([*newest_accuracies(run, run.current_step())]))


def newest_accuracies(run: Run, done: int) -> Iterator[tuple[int, float]]:
    """Yield step and accuracy of the students up to step `done` that were evaluated, the newest first.

    They are what the folder lists, not what this process evaluated: with `train --follow` others do it, in any order.
    """
    bench = run.recipe.eval.bench[0]
    found = run.evaluation_path(bench, "").glob("step-*/summary.json")
    numbers = (path.parent.name.removeprefix("step-") for path in found)
    steps = [int(number) for number in numbers if number.isdigit()]  # a person's copy may lie beside them
    for step in sorted((step for step in steps if step <= done), reverse=True):
        if summary := evaluate.stored_summary(run, bench, f"step-{step:05d}"):
            yield step, summary["avg"]


def best(run: Run) -> tuple[int, float] | None:
    """Return step and accuracy of the best student, the first of equals, or None where none was evaluated."""
    return max(accuracies(run).items(), key=lambda pair: (pair[1], -pair[0]), default=None)


def accuracy(run: Run) -> dict[str, float | None]:
    """Return the first benchmark's accuracy of the student before and now, and of each teacher; None: not measured."""
    names = {"before": "step-00000", "after": f"step-{run.current_step():05d}"}
    names |= {name: name for name in run.recipe.teacher_models()}
    found = {key: evaluate.stored_summary(run, run.recipe.eval.bench[0], name) for key, name in names.items()}
    return {key: summary["avg"] if summary else None for key, summary in found.items()}


def row(run: Run, metrics: dict[str, Any], seconds_left: float) -> list[str]:
    """Return a step's metrics under COLUMNS, with the last accuracy measured and the step of its student."""
    done = metrics["step"] + 1
    accuracy = next((f"{share:.1%} @{step}" for step, share in newest_accuracies(run, done)), "")
    seconds = sum(metrics.get(f"{stage}_seconds", 0.0) for stage in ("rollout", "score", "update"))
    return [
        f"{done}/{run.recipe.train.steps}",
        f"{metrics['loss']:+.4f}",
        f"{metrics['abs_advantage']:.4f}",
        f"{metrics['truncated_share']:.0%}",
        accuracy,
        f"{metrics['tokens'] / seconds:,.0f}",
        str(timedelta(seconds=round(seconds_left))),
    ]


def line(metrics: dict[str, Any], steps: int) -> str:
    """Return a step's metrics as one line."""
    lag = f"  lag {metrics['lag']}" if metrics["lag"] else ""
    return (
        f"step {metrics['step'] + 1:>{len(str(steps))}}/{steps}"
        f"  loss {metrics['loss']:+.4f}  |A| {metrics['abs_advantage']:.4f}  entropy {metrics['entropy']:.3f}"
        f"  length {metrics['response_length']:.0f}  truncated {metrics['truncated_share']:.0%}"
        f"  grad {metrics['grad_norm']:.2f}{lag}"
    )


def accuracy_line(summary: dict[str, Any]) -> str:
    low, high = summary["ci"]
    return (
        f"{summary['bench']}, {summary['model']}: {summary['avg']:.1%} [{low:.1%}, {high:.1%}]"
        f"  ({summary['problems']} problems, Avg@{summary['samples']})"
    )
