"""Run rollout or score-teacher alone: on one step, or with `--follow` on each step as its inputs appear."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from opdctl import console
from opdctl.artifacts.stage_dir import StageDir
from opdctl.cluster import open_engines
from opdctl.errors import OpdctlError
from opdctl.models.startup import measure_stage
from opdctl.pipeline.plan import check_space
from opdctl.pipeline.rollout import run_rollout
from opdctl.pipeline.score import run_scoring
from opdctl.runs.heartbeats import send_heartbeats
from opdctl.runs.run import Run

StageName = Literal["rollout", "score-teacher"]


@dataclass(frozen=True)
class StageResult:
    """The result of a stage on one step. seconds: of the work, without the start of the engine."""

    run: Run
    name: StageName
    step: int
    stages: list[StageDir]
    parts_made: int
    seconds: float
    startup_seconds: float

    @property
    def is_finished(self) -> bool:
        return all(stage.is_finished() for stage in self.stages)

    @property
    def total_parts(self) -> int:
        return sum(len(stage.names) for stage in self.stages)

    def count_finished_parts(self) -> int:
        return sum(stage.count_made() for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        manifests = [manifest for stage in self.stages if (manifest := stage.manifest())]
        parts = [part for manifest in manifests for part in manifest["parts"]]
        return {
            "run_dir": str(self.run.path),
            "stage": self.name,
            "step": self.step,
            "parts": len(parts),
            "parts_made": self.parts_made,
            "rows": sum(part["rows"] for part in parts),
            "tokens": sum(part["tokens"] for part in parts),
            "seconds": self.seconds,
            "startup_seconds": self.startup_seconds,
            "next": self.next_command(),
        }

    def next_command(self) -> str:
        """Return the command for the next stage of the run, or of a step that the run does not train on."""
        run, step = self.run, self.step
        if step < run.recipe.train.steps or run.is_scored(step):
            return run.next_command()
        return run.command_line("score-teacher", step) if run.is_sampled(step) else run.rollout_command_line(step)


def run_stage(run: Run, device: str, name: StageName, step: int, scorers: Collection[str] = ()) -> StageResult:
    """Make the missing parts of a step's rollout, or of its scores by `scorers`.

    Raises:
        OpdctlError: an input is missing; the stage was made with different settings; the disk is full.
    """
    check_space(run, [name.removesuffix("-teacher")])
    with open_engines(run, device, keep_idle=len(scorers) > 1) as engines, measure_stage() as times:
        if name == "rollout":
            made, stages = run_rollout(run, step, engines), [run.rollout_stage(step)]
        else:
            made = run_scoring(run, step, engines, only=scorers)
            stages = [run.score_stage(step, scorer) for scorer in scorers]
    return StageResult(run, name, step, stages, made, times.work, times.startup)


def follow_stage(run: Run, device: str, name: StageName, scorers: Collection[str] = ()) -> None:
    """Run a stage on every step until the recipe's last, as soon as its inputs exist.

    Raises:
        OpdctlError: there were no inputs for pipeline.follow_timeout_seconds.
    """
    with open_engines(run, device) as engines, send_heartbeats(run, name) as heartbeat:
        for step in range(run.current_step(), run.recipe.train.steps):
            if name == "rollout":
                heartbeat.wait_for(step, partial(run.can_sample, step), "student")
                made = run_rollout(run, step, engines, wait=True)
                console.info(f"step {step}: {made} parts sampled by policy version {run.policy_version(step)}")
            else:
                heartbeat.wait_for(step, partial(run.is_sampled, step), "responses")
                made = run_scoring(run, step, engines, only=scorers, wait=True)
                console.info(f"step {step}: {made} parts scored")


def resolve_step(run: Run, step: int | None) -> int:
    """Return the step to work on: the current one by default; the last if all are done, in a fork at least its first.

    In a finished run, `step` may also be the number of updates: the final student then samples the responses of the
    step that would follow.

    Raises:
        OpdctlError: the run does not have the step, or no student for it yet.
    """
    steps = run.sampling_steps()
    if step is None:
        return max(run.start_step, min(run.current_step(), run.recipe.train.steps - 1))
    if step not in steps:
        raise OpdctlError("invalid_usage", f"--step {step}: {run.path} has steps {steps[0]} to {steps[-1]}")
    if not run.can_sample(step):
        raise OpdctlError(
            "missing_checkpoint",
            f"--step {step}: {run.path} has {run.current_step()} updates",
            hint=f"run `{run.command_line('train')}`",
        )
    return step
