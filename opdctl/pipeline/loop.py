"""The training loop: rollout, scores, update, and a periodic evaluation."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from opdctl import console, distributed
from opdctl.artifacts import files, leases
from opdctl.artifacts.directories import CARD_FILE
from opdctl.cluster import open_engines
from opdctl.engines.pool import EnginePool
from opdctl.errors import OpdctlError
from opdctl.evaluation import evaluate
from opdctl.models.startup import StageTime, measure_stage, measure_startup
from opdctl.pipeline.plan import check_space, warn_of_zero_rate
from opdctl.pipeline.progress import AccuracyLog, accuracy_line, report_steps
from opdctl.pipeline.pruning import kept_by_earlier_settings, prune_students
from opdctl.pipeline.rollout import run_rollout
from opdctl.pipeline.score import run_scoring, score_by_base
from opdctl.runs.heartbeats import StageHeartbeat, send_heartbeats
from opdctl.runs.open import record_settings
from opdctl.runs.run import REFERENCE, Run
from opdctl.training import tracking
from opdctl.training.policy import check_trainable
from opdctl.training.sharding import check_fsdp_size
from opdctl.training.trainer import Trainer

COLLAPSE_STEPS = 3  # consecutive steps beyond a bound that count as a collapse


@dataclass
class Clock:
    """Seconds spent in each stage, and apart from them in the start of engines and the loading of models."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("startup", "rollout", "score", "update", "eval"), 0.0)
    )

    reported_startup: float = 0.0
    """In the metrics of steps."""

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        times = StageTime()
        try:
            with measure_stage() as times:
                yield
        finally:
            self.seconds[stage] += times.work
            self.seconds["startup"] += times.startup


ProduceInputs = Callable[[int], dict[str, float] | None]
"""step → the seconds of the stages that were made completely now, or None if the step's scores do not exist. Tokens of
parts that another process or an earlier call made would not belong to the measured time."""


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
        engines = stack.enter_context(open_engines(run, device))
        trackers = stack.enter_context(tracking.open_trackers(run.recipe, run.path))
        accuracies = AccuracyLog(run, trackers)
        holds_students = fill and engines.read_this_memory
        open_trainer = cache(partial(_open_trainer, run, device, stack, holds_students=holds_students))
        if fill:
            produce_inputs: ProduceInputs = partial(_make_inputs, run, engines, open_trainer, clock)
        else:
            heartbeat = stack.enter_context(send_heartbeats(run, "train")) if follow else None
            produce_inputs = partial(_find_inputs, run, heartbeat)
        check_fsdp_size(run.recipe)
        first = distributed.call_on_main(run.current_step)
        earlier = distributed.call_on_main(partial(kept_by_earlier_settings, run))
        # With --follow, to be ready. Otherwise only to write a newest student or trainer state that is missing.
        needs_trainer_now = (follow and first < steps) or distributed.call_on_main(run.is_state_incomplete)
        if needs_trainer_now:
            with clock.time("startup"):
                open_trainer()
        else:
            check_trainable(run.student, run.recipe)  # before rollouts are made
        if first < steps:
            warn_of_zero_rate(run.recipe.train, first)
            distributed.call_on_main(partial(_check_first_step, run, fill))
        distributed.call_on_main(partial(record_settings, run))  # a command that fails before changes nothing
        for step in range(first, steps):
            distributed.call_on_main(partial(_check_before_step, run, fill))
            seconds = produce_inputs(step)
            run.finish_update()
            if seconds is None:
                break
            if distributed.is_main():
                accuracies.log_new()
                prune_students(run, earlier)  # by now the last trainer state is complete
            _release_gpus(engines)
            metrics = _train_step(open_trainer, clock, step, seconds)
            if distributed.is_main():
                report(metrics)
                trackers.log(metrics)
        if fill:
            evaluate_if_due(run, max(first, steps), engines, clock)
        if open_trainer.cache_info().currsize:
            open_trainer().finish_save()
        if distributed.is_main():
            accuracies.log_new()
            trackers.save(run.student_path(run.current_step()) / CARD_FILE)
            prune_students(run, earlier)
    return clock


def _train_step(
    open_trainer: Callable[[], Trainer], clock: Clock, step: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Update the student, and return the step's metrics with the time of start-up since the previous step."""
    with clock.time("startup"):
        trainer = open_trainer()
    startup = clock.seconds["startup"] - clock.reported_startup
    with clock.time("update"):
        metrics = trainer.train_step(step, {**seconds, "startup": startup})
    clock.reported_startup = clock.seconds["startup"]
    return metrics


def _open_trainer(run: Run, device: str, stack: contextlib.ExitStack, *, holds_students: bool) -> Trainer:
    """Return a trainer. At the end of `stack` it finishes the trainer state that it is writing."""
    with measure_startup():
        trainer = Trainer(run, device, holds_students=holds_students)
    stack.callback(trainer.close)
    return trainer


@contextlib.contextmanager
def _exclusive_training(run: Run) -> Iterator[None]:
    """Hold the run's training lease on rank 0, after cleaning up what a killed training left."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(leases.hold_lease(run.path, "train"))
            for directory in (run.path / "student", run.path / "trainer"):
                # Their owners are dead: this process holds the lease.
                files.remove_temporary_files(directory, include_running=True)
            files.write_lines(run.metrics_path, _recorded_metrics(run))
        distributed.barrier()
        yield


def _recorded_metrics(run: Run) -> list[dict[str, Any]]:
    """Return the metrics of all steps: of a step whose update.json was removed, those in metrics.jsonl."""
    metrics: dict[int, dict[str, Any]] = {}
    try:
        lines = files.read_text(run.metrics_path).splitlines() if run.metrics_path.exists() else []
    except OpdctlError:  # a corrupt copy
        files.discard(run.metrics_path)
        lines = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a corrupt line
            values = json.loads(line)
            metrics[int(values["step"])] = values
    metrics |= {step: dict(run.update(step)["metrics"]) for step in run.finished_steps()}
    return [metrics[step] for step in sorted(metrics) if run.start_step <= step < run.current_step()]


def _check_first_step(run: Run, fill: bool) -> None:
    _check_before_step(run, fill)
    step = run.current_step()
    if fill and not run.rollout_stage(step).is_finished():
        run.student_at(step)


def _check_before_step(run: Run, fill: bool) -> None:
    check_collapse(run)
    check_space(run, ("rollout", "score", "update") if fill else ("update",))


def _release_gpus(engines: EnginePool) -> None:
    """Give the memory of the GPUs to the trainer. An engine may be on those of several ranks."""
    engines.release()
    distributed.barrier()


def _make_inputs(
    run: Run, engines: EnginePool, open_trainer: Callable[[], Trainer], clock: Clock, step: int
) -> dict[str, float] | None:
    """Evaluate if due, then make a step's rollout and scores; the ranks share the parts by leases.

    A reference that is the student without its adapters is scored by the trainer.
    """
    by_engine = [name for name in run.scorers() if name != REFERENCE or not run.recipe.has_base_as_reference()]
    if not distributed.call_on_main(run.rollout_stage(step).is_finished):
        with clock.time("startup"):
            student = run.student_at(step)  # on each machine, before any rank loads it
            distributed.barrier()
            # A teacher that cannot be loaded must not cost a rollout.
            scorers = {name: (run.recipe.score.engine, run.models[name]) for name in by_engine}
            engines.start(scorers | {"student": (run.recipe.rollout.engine, student)})
    evaluate_if_due(run, step, engines, clock)

    def score() -> int:
        made = run_scoring(run, step, engines, only=by_engine, wait=True)
        if len(by_engine) < len(run.scorers()) and not distributed.call_on_main(partial(run.is_scored, step)):
            _release_gpus(engines)
            made += score_by_base(run, step, open_trainer().base_scorer())
        return made

    num_parts, seconds = run.recipe.rollout.num_parts, {}
    stages: dict[str, tuple[Callable[[], int], int]] = {
        "rollout": (partial(run_rollout, run, step, engines, wait=True), num_parts),
        "score": (score, num_parts * len(run.scorers())),
    }
    for name, (make, total) in stages.items():
        earlier = clock.seconds[name]
        with clock.time(name):
            made = distributed.all_reduce_sum({"parts": make()})["parts"]
        if made == total:
            seconds[name] = clock.seconds[name] - earlier
    return seconds


def _find_inputs(run: Run, heartbeat: StageHeartbeat | None, step: int) -> dict[str, float] | None:
    """Wait for a step's scores if there is a heartbeat to wait with; return None if they do not exist."""
    is_scored = partial(run.is_scored, step)
    if heartbeat is not None:
        distributed.call_on_main(partial(heartbeat.wait_for, step, is_scored, "teacher scores"))
    elif not distributed.call_on_main(is_scored):
        return None
    distributed.wait_until_visible(is_scored, f"the scores of step {step}")
    return {}


def check_collapse(run: Run) -> None:
    """Check that training has not collapsed.

    Raises:
        OpdctlError: each of the last COLLAPSE_STEPS steps is beyond a bound of the recipe.
    """
    bounds, recent = run.recipe.train, run.finished_steps()[-COLLAPSE_STEPS:]
    if len(recent) < COLLAPSE_STEPS:
        return
    metrics = [run.metrics(step) for step in recent]
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
        f"{run.path}: in steps {recent[0]} to {recent[-1]} {what}; the bound is {key}",
        hint="relax the bound to continue, or start again with a lower train.learning_rate; students are kept for "
        f"steps {', '.join(map(str, run.kept_steps()))}",
    )


def evaluate_if_due(run: Run, step: int, engines: EnginePool, clock: Clock) -> None:
    """Evaluate the student before the first step, every eval.every_steps, and after the last; the teachers once.

    The ranks share the parts by leases, and rank 0 sums up.
    """
    every = run.recipe.eval.every_steps
    if not every or (step % every and step < run.recipe.train.steps):
        return
    targets = [evaluate.student_target(run, step)]
    if step == run.start_step:
        targets += [evaluate.scorer_target(run, name) for name in run.recipe.teacher_models()]
    for bench in run.recipe.eval.bench:
        for target in targets:
            if distributed.call_on_main(partial(evaluate.is_evaluated, run, bench, target.name)):
                continue
            with clock.time("eval"):
                summary, _ = evaluate.run_eval(run, bench, target, engines, wait=True)
            if summary is not None:
                console.info(accuracy_line(summary), style="bold")
