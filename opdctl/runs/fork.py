"""A fork: a new run that continues from the current step of another with a different recipe.

The fork starts from that step's student and trainer state with their evaluations, and reuses the rollouts and scores of
unfinished steps that the changes do not affect. Files are hard-linked where the file system can. The other run stays as
it is, so every run has one recipe.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opdctl.artifacts import directories, files
from opdctl.artifacts.stage_dir import Changes
from opdctl.errors import OpdctlError
from opdctl.recipe.dependencies import IMMUTABLE_KEYS, as_overrides, describe_changes, unaffected_stages
from opdctl.recipe.schema import Recipe
from opdctl.runs.compatibility import artifact_changes, describe_reusable_artifacts
from opdctl.runs.layout import HELD_OUT_FILE, PROMPTS_FILE, free_path, step_name
from opdctl.runs.run import Run, describe_environment, read_run_record


@dataclass(frozen=True)
class ForkPlan:
    """A fork of `run` at `step` in the directory `path`: the changed settings, and the reused files and directories."""

    run: Run
    path: Path
    recipe: Recipe
    step: int
    changes: Changes
    reused: list[Path]

    def lines(self) -> list[str]:
        """Return the changes and their consequences as text."""
        return [
            describe_changes(self.changes),
            *describe_reusable_artifacts(self.run, self.changes),
            *self._moved_prompts(),
            f"the fork starts at step {self.step} of {self.recipe.train.steps}",
            *(["it has no step to make: give --set train.steps=N"] if self.step >= self.recipe.train.steps else []),
        ]

    def _moved_prompts(self) -> list[str]:
        """Return what another number of prompts per step means for the place in the data, which follows from the step.

        An epoch is as many complete steps as the prompts allow.
        """
        total = len(self.run.prompts)
        sizes = [recipe.rollout.prompts_per_step for recipe in (self.run.recipe, self.recipe)]
        if not self.step or sizes[0] == sizes[1]:
            return []
        epochs = [divmod(self.step, max(total // size, 1)) for size in sizes]
        places = [f"{index * size} of epoch {epoch}" for (epoch, index), size in zip(epochs, sizes, strict=True)]
        place = f"step {self.step} starts at prompt {places[1]} instead of {places[0]}"
        return [f"rollout.prompts_per_step: {place}, so prompts are used again or left out"]


def plan_fork(run: Run, path: Path, recipe: Recipe) -> ForkPlan:
    """Return the fork of `run` from its current step on with another recipe, in the directory `path`.

    Raises:
        OpdctlError: `path` exists; nothing changes that affects artifacts; a setting changes that is fixed for a run;
            or the current step has no trainer state to start from, or a corrupt one.
    """
    if path.exists():
        raise OpdctlError("unusable_output", f"{path} exists", hint="give the path of a directory that does not exist")
    step, changes = run.current_step(), artifact_changes(run.recipe, recipe)
    if not changes:
        raise OpdctlError("invalid_usage", f"{run.path}: no change affects artifacts", hint="give --set or --recipe")
    if fixed := [change for change in changes if change[0].startswith(IMMUTABLE_KEYS)]:
        raise OpdctlError(
            "immutable_setting",
            f"{run.path}: these settings are fixed when a run starts\n{describe_changes(fixed)}",
            hint=f"start a new run: `{new_run_command(run, changes)}`",
        )
    if run.must_save_trainer_state():
        raise OpdctlError(
            "missing_checkpoint",
            f"{run.trainer_path(step)}: not written yet: training writes it beside the next rollout",
            hint=f"fork in a moment; if no training runs, after `{run.command_line('train')}`, which writes it first",
        )
    if step and not run.trainer_path(step).is_dir():
        raise OpdctlError(
            "missing_checkpoint",
            f"{run.trainer_path(step)}: not saved (train.save_every_steps = {run.recipe.train.save_every_steps})",
            hint=f"train one more step, which is saved: `{run.command_line('train')} --set train.steps={step + 1}`",
        )
    if step:  # the state to start from is not corrupt
        run.student_at(step)
        run.check_trainer_state(step)
    return ForkPlan(run, path, recipe, step, changes, _reusable_paths(run, step, changes))


def new_run_command(run: Run, changes: Changes) -> str:
    """Return the command that starts a run with the recipe of another and changed settings."""
    overrides, recipe = as_overrides(changes), run.path / "recipe.toml"
    options = [word for text in overrides or [] for word in ("--set", text)]
    source = ["--recipe", "FILE" if overrides is None else str(recipe), *options]
    return shlex.join(["opdctl", "train", *source, "--output", str(free_path(run.path, "new"))])


def _reusable_paths(run: Run, step: int, changes: Changes) -> list[Path]:
    """Return the prompts, the state of the step, and the artifacts of unfinished steps that the changes do not affect.

    A rollout by a policy version before the step is not reused: the fork does not have that student.
    """
    stages = unaffected_stages(key for key, _, _ in changes)
    names = [*(["rollout"] if "rollout" in stages else []), *(run.scorers() if "score" in stages else [])]
    steps = [later for later in run.sampling_steps() if later >= step and run.policy_version(later) >= step]
    unfinished = [run.step_path(later) / name for later in steps for name in names]
    state = [run.student_path(step), run.trainer_path(step)] if step else []
    evaluated = (step_name(step), *run.scorers(), "benchmark.json")
    evaluations = [path for path in sorted(run.path.glob("eval/*/*")) if path.name in evaluated]
    prompts = [run.path / name for name in (PROMPTS_FILE, HELD_OUT_FILE)]
    return [path for path in (*prompts, *state, *unfinished, *evaluations) if path.exists()]


def create_fork(plan: ForkPlan) -> int:
    """Create the fork atomically and return the number of files that it reuses.

    Raises:
        OpdctlError: the state to start from is corrupt.
    """
    run, step = plan.run, plan.step
    start: Mapping[str, object] = {}
    if step:
        digests = {"student": run.student_digests(step), "trainer": run.check_trainer_state(step)}
        start = {"forked_from": {"run_dir": str(run.path), "step": step, **digests}}
    reused = 0

    def fill(directory: Path) -> None:
        nonlocal reused
        reused = directories.link_or_copy(plan.reused, run.path, directory)
        files.write_text(directory / "recipe.toml", plan.recipe.to_toml())
        recipe = {"recipe": plan.recipe.to_toml()}
        has_changed = plan.recipe.rollout.environment != run.recipe.rollout.environment
        environment = describe_environment(plan.recipe) if has_changed else {}
        files.write_json(directory / "run.json", {**read_run_record(run.path), **recipe, **environment, **start})

    files.remove_temporary_files(plan.path.parent)  # of forks that were killed
    directories.write_directory(plan.path, fill)
    return reused
