"""One step after another: rollout, score, update, and an evaluation now and then. Knows the stages, not their work."""

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

from opdctl import console, distributed
from opdctl.artifacts import files, leases, stage_dir
from opdctl.engines.pool import EnginePool, open_engine_pool
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import evaluate
from opdctl.pipeline import plan, rollout, score
from opdctl.pipeline.progress import COLUMNS, accuracy_line, format_line, format_row
from opdctl.recipe.schema import is_kept
from opdctl.runs.heartbeats import send_heartbeats
from opdctl.runs.run import Run
from opdctl.training import tracking
from opdctl.training.trainer import Trainer

COLLAPSE_STEPS = 3  # steps in a row beyond a bound that are a collapse


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


def run_training(run: Run, device: str, *, fill: bool = True, follow: bool = False, repair: bool = False) -> Clock:
    """Train until the recipe's last step and return where the time went. Called by all ranks.

    With `fill`, rollouts and teacher scores that a step still lacks are made here, each rank its parts, and the student
    is evaluated as the recipe says. Without it only updates are made, as far as other jobs' artifacts reach; with
    `follow` they are waited for. With `repair`, damaged parts are made again. Raises OpdctlError (code 1) where
    training has collapsed by the recipe's bounds.
    """
    clock, steps = Clock(), run.recipe.train.steps
    first, start = run.current_step(), time.monotonic()
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(leases.hold_lease(run.path, "train"))
            for folder in (run.path / "student", run.path / "trainer"):
                files.remove_temporary_files(
                    folder, everyones=True
                )  # whoever began something here is dead: the run is claimed
            files.write_lines(run.metrics_path, [run.update(step)["metrics"] for step in range(run.current_step())])
            prune_students(run)
        distributed.barrier()
        show = stack.enter_context(console.live_table(str(run.path), COLUMNS)) if distributed.is_main() else None
        engines = stack.enter_context(open_engine_pool(run.recipe, device))
        track = stack.enter_context(tracking.trackers(run.recipe, run.path))
        follower = stack.enter_context(send_heartbeats(run, "train")) if follow else None
        trainer = Trainer(run, device) if follow and run.current_step() < steps else None
        if repair and distributed.broadcast_object(distributed.is_main() and not latest_student_is_intact(run)):
            trainer = trainer or Trainer(run, device)
            trainer.repair_student(run.current_step())
        for step in range(run.current_step(), steps):
            distributed.main_process_first(lambda: check_collapse(run))
            distributed.main_process_first(
                lambda: plan.check_space(run, ("rollout", "score", "update") if fill else ("update",))
            )
            seconds: dict[str, float] = {}
            if fill:
                evaluate_if_due(run, step, engines, clock)
                seconds = make_missing(run, step, engines, clock, repair)
            elif follower is not None:
                distributed.main_process_first(
                    partial(follower.wait_for, step, partial(run.is_scored, step), "the teacher's scores")
                )
            elif not run.is_scored(step):
                break
            with clock.time("update"):
                trainer = trainer or Trainer(run, device)
                metrics = trainer.train_step(step, seconds)
            if show is not None:
                left = (time.monotonic() - start) / (step + 1 - first) * (steps - step - 1)
                show(partial(format_row, run, metrics, left), format_line(metrics, steps))
                track(metrics)
                prune_students(run)
        if fill:
            evaluate_if_due(run, run.current_step(), engines, clock)
    return clock


def latest_student_is_intact(run: Run) -> bool:
    """Whether the newest student is what was written."""
    try:
        run.student_at(run.current_step())
    except OpdctlError:
        return False
    return True


def follow_stage(run: Run, device: str, stage: str, scorers: Collection[str], shard: stage_dir.WorkerShard) -> None:
    """Draw the responses of step after step, or score them with the `scorers`, as soon as their inputs are there, until
    the recipe's last. Raises OpdctlError (code 5) when there were none for `pipeline.follow_timeout_seconds`."""
    with open_engine_pool(run.recipe, device) as engines, send_heartbeats(run, stage) as follower:
        for step in range(run.current_step(), run.recipe.train.steps):
            if stage == "rollout":
                follower.wait_for(step, partial(run.can_sample, step), "a student")
                made = rollout.run_rollout(run, step, engines, shard=shard, wait=True)
                console.info(f"step {step}: {made} parts drawn by the student of step {run.policy_version(step)}")
            else:
                follower.wait_for(step, partial(run.is_sampled, step), "the responses")
                made = score.run_scoring(run, step, engines, only=scorers, shard=shard, wait=True)
                console.info(f"step {step}: {made} parts scored")


def make_missing(run: Run, step: int, engines: EnginePool, clock: Clock, repair: bool) -> dict[str, float]:
    """Make a step's rollout and scores where they are missing: each rank its share of the parts.

    Returns the seconds of the stages of which all was made now, whose speed can be told.
    """
    shard, parts, seconds = (
        stage_dir.WorkerShard(distributed.rank(), distributed.world_size()),
        run.recipe.rollout.num_parts,
        {},
    )
    stages = {"rollout": (rollout.run_rollout, parts), "score": (score.run_scoring, parts * len(run.scorers()))}
    for name, (make, whole) in stages.items():
        start = time.monotonic()
        with clock.time(name):
            made = distributed.all_reduce_sum(
                {"parts": make(run, step, engines, repair=repair, shard=shard, wait=True)}
            )["parts"]
        if made == whole:
            seconds[name] = time.monotonic() - start
    return seconds


def check_collapse(run: Run) -> None:
    """Raise OpdctlError (code 1) if each of the last steps is beyond a bound of the recipe."""
    done, bounds = run.current_step(), run.recipe.train
    recent = [run.update(step)["metrics"] for step in range(max(done - COLLAPSE_STEPS, 0), done)]
    truncated, entropies = [m["truncated_fraction"] for m in recent], [m["entropy"] for m in recent]
    if len(recent) < COLLAPSE_STEPS:
        return
    if min(truncated) > bounds.max_truncated_fraction:
        shown = ", ".join(f"{share:.0%}" for share in truncated)
        what, key = f"{shown} of the responses ran into rollout.max_tokens", "train.max_truncated_fraction"
    elif max(entropies) < bounds.min_entropy:
        shown = ", ".join(f"{entropy:.3g}" for entropy in entropies)
        what, key = f"the policy's entropy was {shown} nats a token", "train.min_entropy"
    else:
        return
    raise OpdctlError(
        f"{run.path}: collapse: in steps {done - COLLAPSE_STEPS + 1} to {done} {what}; the bound is {key}",
        hint=f"students of before: steps {', '.join(map(str, run.kept_steps()))}; move the bound to go on, or begin "
        "again with a lower train.learning_rate",
        code=ExitCode.FAILED,
    )


def evaluate_if_due(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    """Evaluate the student before the first step, every so many, and after the last; the teachers once."""
    settings = run.recipe.eval
    if not settings.every_steps or (step % settings.every_steps and step < run.recipe.train.steps):
        return
    if distributed.is_main():
        _evaluate(run, step, engines, clock)
    distributed.barrier()


def _evaluate(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    subjects = [evaluate.student_target(run, step)]
    subjects += [evaluate.scorer_target(run, name) for name in run.recipe.teacher_models()] if step == 0 else []
    for bench in run.recipe.eval.bench:
        for subject in subjects:
            if not evaluate.is_evaluated(run, bench, subject.name):
                with clock.time("eval"):
                    summary, _ = evaluate.run_eval(run, bench, subject, engines, wait=True)
                assert summary is not None  # waited for
                console.info(accuracy_line(summary), style="bold")


def prune_students(run: Run) -> None:
    """Remove students and trainer states that the recipe does not keep."""
    settings, done = run.recipe.train, run.current_step()
    saved = [step for step in range(1, done + 1) if run.trainer_path(step).is_dir()]
    for step in saved[: -settings.keep_latest]:
        files.remove_directory(run.trainer_path(step))
    drawing = run.recipe.pipeline.max_staleness + 1  # students that may still be drawn with
    for step in range(1, done - max(settings.keep_latest, drawing) + 1):
        if not is_kept(run.recipe, step):
            files.remove_directory(run.student_path(step))
