"""A recipe bound to its run directory: where everything lies, which step is next, what each stage depends on.

Knows no stage's work. Opening a new run writes recipe.toml and prompts.parquet, then run.json, the mark that the run
directory is whole. Opening an old one compares the recipe and the models with what is recorded, and refuses a change.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opdctl.artifacts import directories, files, leases, stage_dir, tables
from opdctl.artifacts.files import digest_of
from opdctl.artifacts.manifests import PolicyRecord, RunRecord, UpdateRecord
from opdctl.artifacts.records import Ids, Prompt, Response, sample_id
from opdctl.artifacts.stage_dir import Fingerprint, FingerprintMismatchError, StageDir
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.models.directory import ModelDir
from opdctl.recipe.dependencies import describe_changes, fingerprint_settings, scorer_fingerprint_settings
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe, is_data_file
from opdctl.registry import plugin_file
from opdctl.runs.layout import list_steps, step_name

REFERENCE = "reference"


@dataclass(frozen=True)
class Run:
    """One run directory and its recipe. Steps count updates: step k draws with the student that has seen k updates."""

    recipe: Recipe
    path: Path
    models: Mapping[str, ModelDir]
    """`student`, the teachers and `reference`, by name."""
    digests: Mapping[str, str]
    earlier: Mapping[int, Recipe] = field(default_factory=dict)
    """Recipes that were changed since, each by the step from which on it no longer holds."""

    def at(self, step: int) -> "Run":
        """Return the run as it is, or was, at a step: under the recipe that holds there."""
        changed_at = min((changed for changed in self.earlier if changed > step), default=None)
        return self if changed_at is None else replace(self, recipe=self.earlier[changed_at], earlier={})

    @property
    def student(self) -> ModelDir:
        return self.models["student"]

    def scorers(self) -> list[str]:
        """Return the names of the models that score responses."""
        return list(self.recipe.scorers())

    # ── Where things lie ─────────────────────────────────────────────────────────────────────────────────────────────

    def step_path(self, step: int) -> Path:
        return self.path / step_name(step)

    def student_path(self, step: int) -> Path:
        return self.path / "student" / step_name(step)

    def trainer_path(self, step: int) -> Path:
        return self.path / "trainer" / step_name(step)

    def update_path(self, step: int) -> Path:
        return self.step_path(step) / "update.json"

    def evaluation_path(self, bench: str, subject: str) -> Path:
        return self.path / "eval" / (Path(bench).stem if is_data_file(bench) else bench) / subject

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    # ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def count_finished_steps(self, stage: str) -> int:
        """Return in how many steps `rollout`, or `score`, is finished, whatever recipe that was under."""
        names = ["rollout"] if stage == "rollout" else self.scorers()
        folders = list_steps(self.path).values()
        return sum(all((folder / name / "manifest.json").exists() for name in names) for folder in folders)

    def current_step(self) -> int:
        """Return the first step without an update: the number of updates done."""
        step = 0
        while self.update_path(step).exists():
            step += 1
        return step

    def update(self, step: int) -> UpdateRecord:
        """Return what the update of `step` recorded."""
        path = self.update_path(step)
        return files.read_json(
            path, UpdateRecord, f"remove {path} and run `{self.command_line('train')}`: it is made again"
        )

    def student_at(self, step: int) -> ModelDir:
        """Return the student that has seen `step` updates. Raises OpdctlError when it is not there, or not whole."""
        if step == 0:
            return self.student
        path = self.student_path(step)
        if not self.update_path(step - 1).exists():
            raise OpdctlError(
                f"{path}: step {step} has no student yet, {self.current_step()} updates are done",
                hint=f"run `{self.command_line('train')}`",
            )
        newest = step == self.current_step()
        if not path.is_dir() and not newest:
            raise OpdctlError(
                f"{path}: this student is not kept (train.keep_every_steps = {self.recipe.train.keep_every_steps})",
                hint=f"steps that are kept: {', '.join(map(str, self.kept_steps()))}",
            )
        hint = f"run `{self.command_line('train')} --repair`: it is made again" if newest else f"remove {path}"
        directories.check_directory(path, self.update(step - 1)["student"], hint)
        return self.student.with_path(path)

    def kept_steps(self) -> list[int]:
        """Return the steps whose student is there to be used."""
        return [0, *(step for step in list_steps(self.path / "student") if self.update_path(step - 1).exists())]

    def student_digest(self, step: int) -> str:
        return self.digests["student"] if step == 0 else digest_of(self.update(step - 1)["student"])

    # ── Policies ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _policy_version_path(self, step: int) -> Path:
        return self.step_path(step) / "rollout" / "policy_version.json"

    def policy_version(self, step: int) -> int:
        """Return how many updates the student has seen that draws a step's responses: `step`, or what was settled."""
        path = self._policy_version_path(step)
        return int(files.read_json(path, PolicyRecord)["policy_version"]) if path.exists() else step

    def _check_staleness(self, step: int) -> None:
        """Raise OpdctlError (code 4) where a step that is still to be learnt from is too stale for the recipe."""
        policy, bound = self.policy_version(step), self.recipe.pipeline.max_staleness
        if step - policy > bound and not self.update_path(step).exists():
            raise OpdctlError(
                f"{self.step_path(step)}: drawn by the student of step {policy}; "
                f"pipeline.max_staleness = {bound} wants that of step {step - bound} at least",
                hint=f"put the old value back; or remove {self.step_path(step)} to draw it again",
                code=ExitCode.RECIPE_MISMATCH,
            )

    def can_sample(self, step: int) -> bool:
        """Whether there is a student that is new enough to draw a step's responses."""
        return (
            self._policy_version_path(step).exists() or self.current_step() + self.recipe.pipeline.max_staleness >= step
        )

    def pin_policy_version(self, step: int) -> None:
        """Settle that the newest student there is draws a step's responses. Who comes first decides for all workers;
        without staleness, or where parts were drawn already, there is nothing to settle."""
        path = self._policy_version_path(step)
        if not self.recipe.pipeline.max_staleness or path.exists():
            return
        with leases.hold_lease(self.step_path(step), "rollout-policy", wait=True):
            policy = min(self.current_step(), step)
            if self.can_sample(step) and not any(
                (path.parent / name).exists() for name in (path.name, *stage_dir.STAGE_MARKERS)
            ):
                files.write_json(path, {"policy_version": policy})

    def is_started(self, step: int) -> bool:
        """Whether a step's rollout was begun: it may be ahead of the updates."""
        return step <= self.current_step() or self._policy_version_path(step).exists()

    # ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts in the order drawn. Raises OpdctlError (code 3) when the file is not the one recorded."""
        path, recorded = self.path / "prompts.parquet", read_run_record(self.path)["prompts"]
        if not path.exists() or files.sha256_file(path) != recorded["sha256"]:
            raise files.corrupt_artifact(
                path, "not the prompts that this run began with", "start again in another --output"
            )
        return tables.read_rows(path, Prompt)

    def samples(self, step: int) -> list[tuple[str, Prompt]]:
        """Return (sample id, prompt) of every response of a step, in order.

        An epoch is as many whole steps as the prompts give; each later epoch has an order of its own.
        """
        settings = self.at(step).recipe.rollout
        size, samples = settings.prompts_per_step, settings.samples_per_prompt
        epoch, within = divmod(step, len(self.prompts) // size)
        order = np.arange(len(self.prompts))
        if epoch:
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(order)
        drawn = [self.prompts[i] for i in order[within * size : (within + 1) * size]]
        return [(sample_id(prompt.prompt_id, step, n), prompt) for prompt in drawn for n in range(samples)]

    @cached_property
    def _teacher_prompts(self) -> dict[str, Ids]:
        found = ((prompt.prompt_id, prompt.teacher_prompt_ids) for prompt in self.prompts)
        return {name: ids for name, ids in found if ids is not None}

    def prompt_ids(self, name: str, response: Response) -> Ids:
        """Return the prompt that the model `name` reads before a response: a teacher may have one of its own."""
        if name in ("student", REFERENCE) or self.recipe.prompts.teacher_prompt_column is None:
            return response.prompt_ids
        return self._teacher_prompts[response.prompt_id]

    # ── Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def rollout_stage(self, step: int) -> StageDir:
        """Return the stage that draws a step's responses. Raises OpdctlError (code 4) where they are too stale."""
        self._check_staleness(step)
        recipe = self.at(step).recipe
        return open_stage_dir(
            self.step_path(step) / "rollout",
            stage="rollout",
            parts=recipe.rollout.num_parts,
            suffix=".parquet",
            fingerprint=Fingerprint(
                fingerprint_settings(recipe, "rollout"),
                {"prompts": str(self.prompts_digest), "policy": self.student_digest(self.policy_version(step))},
            ),
            rerun_command=self.command_line("rollout", step),
        )

    def score_stage(self, step: int, name: str) -> StageDir:
        """Return the stage in which the model `name` scores a step's responses."""
        recipe = self.at(step).recipe
        return open_stage_dir(
            self.step_path(step) / name,
            stage="score",
            parts=recipe.rollout.num_parts,
            suffix=".safetensors",
            fingerprint=Fingerprint(
                scorer_fingerprint_settings(recipe, name),
                {"rollout": self.rollout_stage(step).digest, name: self.digests[name]},
            ),
            rerun_command=self.command_line("score-teacher", step) + f" --only {name}",
        )

    def score_stages(self, step: int) -> dict[str, StageDir]:
        """Return the stages of all models that score a step's responses, by name."""
        return {name: self.score_stage(step, name) for name in self.scorers()}

    def is_sampled(self, step: int) -> bool:
        """Whether a step's rollout is finished."""
        return self.is_started(step) and self.rollout_stage(step).is_finished()

    def is_scored(self, step: int) -> bool:
        """Whether a step's rollout and all its scores are finished."""
        return self.is_sampled(step) and all(stage.is_finished() for stage in self.score_stages(step).values())

    def update_input_digests(self, step: int) -> dict[str, str]:
        """Return the digests of what a step's update is made from. Raises OpdctlError (code 1) where unfinished."""
        plugins = {f"plugin {name}": _plugin_digest(name) for name in self.recipe.plugins}
        scores = {name: stage.digest for name, stage in self.score_stages(step).items()}
        return {"rollout": self.rollout_stage(step).digest, **scores, **plugins}

    @cached_property
    def prompts_digest(self) -> str | None:
        """The digest of the prompts, or None where a model is only evaluated."""
        return read_run_record(self.path)["prompts"]["sha256"] if (self.path / "run.json").exists() else None

    def command_line(self, stage: str, step: int | None = None) -> str:
        """Return the command line that runs a stage of this run."""
        at = f" --step {step}" if step is not None else ""
        return f"opdctl {stage} --output {shlex.quote(str(self.path))}{at}"


def open_stage_dir(path: Path, **definition: Any) -> StageDir:
    """Return the stage directory in `path`.

    Raises OpdctlError (code 4) when it was made from other settings, with what each of them affects.
    """
    try:
        return StageDir(path, **definition)
    except FingerprintMismatchError as error:
        if error.changes:
            error.kind = f"{path}: was made under other settings\n{describe_changes(error.changes)}"
        raise


def _plugin_digest(name: str) -> str:
    file = plugin_file(name)
    return files.sha256_file(file) if file and file.is_file() else "no file of its own"


def read_run_record(path: Path) -> RunRecord:
    """Return what the run in `path` was begun with. Raises OpdctlError (code 3) when that is damaged."""
    return files.read_json(path / "run.json", RunRecord)


def next_stage_command(run: Run) -> str:
    """Return the command for the next stage of the current step, or the analysis when the run is complete."""
    step = run.current_step()
    if step >= run.recipe.train.steps:
        return f"opdctl analyze-position {run.path}"
    if not run.rollout_stage(step).is_finished():
        return run.command_line("rollout")
    return run.command_line("train" if run.is_scored(step) else "score-teacher")


def load_run(path: Path) -> Run:
    """Open a run directory as it is recorded, for reading artifacts alone: the models need not be there any more."""
    recipe = read_recipe(path)
    if not (path / "run.json").exists():
        raise OpdctlError(f"{path}: this run was never begun: it has no run.json", hint="run `opdctl rollout` first")
    return _load_recorded(recipe, path)


def _load_recorded(recipe: Recipe, path: Path) -> Run:
    """Return the run with its models where run.json says: a hub's newer revision does not concern it."""
    recorded = read_run_record(path)["models"]
    if missing := sorted(recipe.models().keys() - recorded.keys()):
        raise files.corrupt_artifact(
            path / "run.json", f"does not tell of the {missing[0]}", "start again in another --output"
        )
    models = {
        name: ModelDir(Path(recorded[name]["path"]), settings.dtype, settings.trust_remote_code)
        for name, settings in recipe.models().items()
    }
    digests = {name: recorded[name]["digest"] for name in models}
    earlier = {int(file.stem.rpartition("-")[2]): load_recipe([file]) for file in path.glob("recipe-before-*.toml")}
    return Run(recipe, path, models, digests, earlier)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe recorded in the run directory `path`, with `overrides`. Raises OpdctlError when it is none."""
    if not (path / "recipe.toml").exists():
        runs = [file.parent.name for file in path.parent.glob("*/recipe.toml")]
        raise OpdctlError(
            f"{path}: no run directory: it has no recipe.toml{did_you_mean(path.name, runs)}",
            hint="give the path of a run; one is begun by `opdctl train` or `opdctl rollout` with --recipe",
        )
    return load_recipe([path / "recipe.toml"], overrides)
