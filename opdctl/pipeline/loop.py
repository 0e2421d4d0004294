"""The training loop: rollout, scores, update, and a periodic evaluation."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from opdctl import console, distributed
from opdctl.artifacts import files, leases
from opdctl.engines.pool import EnginePool, open_engine_pool
from opdctl.errors import OpdctlError
from opdctl.evaluation import evaluate
from opdctl.pipeline.plan import check_space
from opdctl.pipeline.progress import accuracy_line, report_steps
from opdctl.pipeline.pruning import prune_students
from opdctl.pipeline.rollout import run_rollout
from opdctl.pipeline.score import run_scoring
from opdctl.runs.heartbeats import StageHeartbeat, send_heartbeats
from opdctl.runs.run import Run
from opdctl.training import tracking
from opdctl.training.policy import check_trainable
from opdctl.training.trainer import Trainer

COLLAPSE_STEPS = 3  # consecutive steps beyond a bound that count as a collapse


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


ProduceInputs = Callable[[int], dict[str, float] | None]
"""step → the seconds of the stages that were made completely now, or None if the step's scores do not exist."""


def run_training(run: Run, device: str, *, fill: bool = True, follow: bool = False) -> Clock:
    """Train until the recipe's last step and return the time of each stage. Called by all ranks.

    fill: make the rollouts and scores that a step lacks, and evaluate the student at the steps of eval.every_steps.
    Otherwise only updates are made, on the artifacts of other jobs. follow: wait for these artifacts.

    Raises:
        OpdctlError: training collapsed by the recipe's bounds; another process trains this run; a stage failed.
    """
    clock, steps = Clock(), run.recipe.train.steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exclusive_training(run))
        report = stack.enter_context(report_steps(run))
        engines = stack.enter_context(open_engine_pool(run.recipe, device))
        track = stack.enter_context(tracking.open_trackers(run.recipe, run.path))
        if fill:
            produce_inputs: ProduceInputs = partial(_make_inputs, run, engines, clock)
        else:
            heartbeat = stack.enter_context(send_heartbeats(run, "train")) if follow else None
            produce_inputs = partial(_find_inputs, run, heartbeat)
        trainer = Trainer(run, device) if _needs_trainer_now(run, follow) else None
        if trainer is None:
            check_trainable(run.student, run.recipe)  # before rollouts are made
        for step in range(run.current_step(), steps):
            distributed.main_process_first(partial(check_collapse, run))
            written = ("rollout", "score", "update") if fill else ("update",)
            distributed.main_process_first(partial(check_space, run, written))
            seconds = produce_inputs(step)
            if seconds is None:
                break
            with clock.time("update"):
                trainer = trainer or Trainer(run, device)
                metrics = trainer.train_step(step, seconds)
            if distributed.is_main():
                report(metrics)
                track(metrics)
                prune_students(run)
        if fill:
            evaluate_if_due(run, run.current_step(), engines, clock)
    return clock


@contextlib.contextmanager
def _exclusive_training(run: Run) -> Iterator[None]:
    """Hold the run's training lease on rank 0, after cleaning up what a killed training left."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(leases.hold_lease(run.path, "train"))
            for directory in (run.path / "student", run.path / "trainer"):
                # Their owners are dead: this process holds the lease.
                files.remove_temporary_files(directory, include_running=True)
            files.write_lines(run.metrics_path, [run.update(step)["metrics"] for step in run.finished_steps()])
            prune_students(run)
        distributed.barrier()
        yield


def _needs_trainer_now(run: Run, follow: bool) -> bool:
    """Whether the model is loaded before the first step: to be ready, or to write a newest student that is missing."""
    is_missing = bool(distributed.broadcast_object(run.must_rewrite_student()))
    return is_missing or (follow and run.current_step() < run.recipe.train.steps)


def _make_inputs(run: Run, engines: EnginePool, clock: Clock, step: int) -> dict[str, float] | None:
    """Evaluate if due, then make a step's rollout and scores; the ranks share the parts by leases."""
    if not run.rollout_stage(step).is_finished():
        for name in run.scorers():  # a teacher that cannot be loaded must not cost a rollout
            engines.get(name, run.recipe.score.engine, run.models[name])
    evaluate_if_due(run, step, engines, clock)
    num_parts, seconds = run.recipe.rollout.num_parts, {}
    stages: dict[str, tuple[Callable[..., int], int]] = {
        "rollout": (run_rollout, num_parts),
        "score": (run_scoring, num_parts * len(run.scorers())),
    }
    for name, (make, total) in stages.items():
        start = time.monotonic()
        with clock.time(name):
            made = distributed.all_reduce_sum({"parts": make(run, step, engines, wait=True)})["parts"]
        if made == total:
            seconds[name] = time.monotonic() - start
    return seconds


def _find_inputs(run: Run, heartbeat: StageHeartbeat | None, step: int) -> dict[str, float] | None:
    """Wait for a step's scores if there is a heartbeat to wait with; return None if they do not exist."""
    if heartbeat is not None:
        is_scored = partial(run.is_scored, step)
        distributed.main_process_first(partial(heartbeat.wait_for, step, is_scored, "teacher scores"))
    elif not run.is_scored(step):
        return None
    return {}


def check_collapse(run: Run) -> None:
    """Check that training has not collapsed.

    Raises:
        OpdctlError: each of the last COLLAPSE_STEPS steps is beyond a bound of the recipe.
    """
    bounds, recent = run.recipe.train, run.finished_steps()[-COLLAPSE_STEPS:]
    if len(recent) < COLLAPSE_STEPS:
        return
    metrics = [run.update(step)["metrics"] for step in recent]
    truncated, entropies = [m["truncated_fraction"] for m in metrics], [m["entropy"] for m in metrics]
    if min(truncated) > bounds.max_truncated_fraction:
        values = ", ".join(f"{fraction:.0%}" for fraction in truncated)
        what, key = f"{values} of the responses were truncated", "train.max_truncated_fraction"
    elif max(entropies) < bounds.min_entropy:
        values = ", ".join(f"{entropy:.3g}" for entropy in entropies)
        what, key = f"the policy's entropy was {values} nats per token", "train.min_entropy"
    else:
        return
    raise OpdctlError(
        "collapsed_training",
        f"{run.path}: in steps {recent[0] + 1} to {recent[-1] + 1} {what}; the bound is {key}",
        hint="relax the bound to continue, or start again with a lower train.learning_rate; students are kept for "
        f"steps {', '.join(map(str, run.kept_steps()))}",
    )


def evaluate_if_due(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    """Evaluate the student before the first step, every eval.every_steps, and after the last; the teachers once."""
    every = run.recipe.eval.every_steps
    if not every or (step % every and step < run.recipe.train.steps):
        return
    if distributed.is_main():
        _evaluate(run, step, engines, clock)
    distributed.barrier()


def _evaluate(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    targets = [evaluate.student_target(run, step)]
    if step == run.start_step:
        targets += [evaluate.scorer_target(run, name) for name in run.recipe.teacher_models()]
    for bench in run.recipe.eval.bench:
        for target in targets:
            if not evaluate.is_evaluated(run, bench, target.name):
                with clock.time("eval"):
                    summary, _ = evaluate.run_eval(run, bench, target, engines, wait=True)
                assert summary is not None  # waited for
                console.info(accuracy_line(summary), style="bold")
