"""A recipe bound to its run directory: paths, the current step, and what each stage depends on.

Knows no stage's work. Only files are read here; runs/open.py creates a run directory and checks it against a recipe.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from opdctl import distributed
from opdctl.artifacts import directories, files, leases, stage_dir, tables
from opdctl.artifacts.files import digest_of
from opdctl.artifacts.manifests import (
    DEFAULT_PROMPT_ORDER,
    ImportRecord,
    PolicyRecord,
    ProbeRecord,
    RunRecord,
    StartRecord,
    StateRecord,
    UpdateRecord,
)
from opdctl.artifacts.records import Ids, Prompt, Response, sample_id
from opdctl.artifacts.stage_dir import Fingerprint, FingerprintMismatchError, StageDir
from opdctl.data.formats import read_chat_templates
from opdctl.data.order import step_order
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.models.directory import ModelDir, Probe
from opdctl.recipe.data_names import benchmark_directory
from opdctl.recipe.dependencies import describe_changes, fingerprint_settings, scorer_settings
from opdctl.recipe.load import Purpose, load_recorded_recipe
from opdctl.recipe.schema import Recipe
from opdctl.registry import load_function, plugin_file
from opdctl.runs.layout import IMPORT_FILE, PROMPTS_FILE, list_steps, parse_step, step_name

REFERENCE = "reference"
IMPORT_KEYS = ("rollout.engine", "rollout.entropy", "rollout.num_parts", "rollout.top_k")
"""The settings that imported responses depend on: what the student computes for them, and their parts."""
_checked_students: set[tuple[object, ...]] = set()


@dataclass(frozen=True)
class UnrecordedUpdate:
    """An update whose student this process has written, and whose update.json it is writing in the background.

    written: of update.json.
    """

    step: int
    metrics: Mapping[str, Any]
    probe: ProbeRecord
    written: Future[Any]


@dataclass(frozen=True)
class Run:
    """One run directory and its recipe.

    A step is one rollout, its scores and one update. Policy version k is the student after k updates; without staleness
    it samples the responses of step k.
    """

    recipe: Recipe
    path: Path
    models: Mapping[str, ModelDir]
    """`student`, the teachers and `reference`, by name."""
    digests: Mapping[str, str]
    """The digest of each model."""
    forked_from: StartRecord | None = None
    """The run and the step that a fork starts from."""
    held_students: dict[int, Path] = field(default_factory=dict, repr=False, compare=False)
    """The directories, by policy version, from which this process reads students instead of from the run's."""
    _unrecorded: list[UnrecordedUpdate] = field(default_factory=list, repr=False, compare=False)  # at most one

    @classmethod
    def load(cls, path: Path, purpose: Purpose = "read") -> "Run":
        """Return the run as it is recorded, to read its artifacts: its models need not exist any more, and run no code
        of theirs.

        Raises:
            OpdctlError: there is no run in `path`, or its record is corrupt.
        """
        recipe = read_recipe(path, purpose=purpose)
        if not (path / "run.json").exists():
            command = f"opdctl train {shlex.quote(str(path))}"
            raise OpdctlError("missing_run", f"{path}: run.json is missing", hint=f"run `{command}`, which writes it")
        run = cls.from_record(recipe, path)
        return replace(run, models={name: model.without_code() for name, model in run.models.items()})

    @classmethod
    def from_record(cls, recipe: Recipe, path: Path) -> "Run":
        """Return the run in `path` under a recipe. Its models are pinned by run.json: a newer hub revision is
        ignored."""
        record = read_run_record(path)
        models = record["models"]
        if missing := sorted(recipe.models().keys() - models.keys()):
            hint = "start again in another --output"
            raise files.corrupt_artifact(path / "run.json", f"has no entry for model `{missing[0]}`", hint)
        pinned = {
            name: ModelDir.from_recipe(Path(models[name]["path"]), model, recipe, record.get("vocab_size"))
            for name, model in recipe.models().items()
        }
        return cls(recipe, path, pinned, {name: models[name]["digest"] for name in pinned}, record.get("forked_from"))

    @property
    def student(self) -> ModelDir:
        """The student before training."""
        return self.models["student"]

    def scorers(self) -> list[str]:
        """Return the names of the models that score responses."""
        return list(self.recipe.scorers())

    # ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def step_path(self, step: int) -> Path:
        return self.path / step_name(step)

    def student_path(self, step: int) -> Path:
        return self.path / "student" / step_name(step)

    def trainer_path(self, step: int) -> Path:
        return self.path / "trainer" / step_name(step)

    def update_path(self, step: int) -> Path:
        return self.step_path(step) / "update.json"

    def evaluation_path(self, bench: str, target: str) -> Path:
        return self.path / "eval" / benchmark_directory(bench) / target

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def command_line(self, command: str, step: int | None = None) -> str:
        """Return the command line that runs a stage of this run."""
        option = f" --step {step}" if step is not None else ""
        return f"opdctl {command} {shlex.quote(str(self.path))}{option}"

    def rollout_command_line(self, step: int) -> str:
        """Return the command line that makes a step's rollout."""
        if imported := self.imported_files(step):
            return shlex.join(["opdctl", "run", "import", str(self.path), *imported, "--step", str(step)])
        return self.command_line("rollout", step)

    def manage_command_line(self, verb: str, step: int | None = None) -> str:
        """Return the command line of `opdctl run VERB` for this run."""
        option = f" --step {step}" if step is not None else ""
        return f"opdctl run {verb} {shlex.quote(str(self.path))}{option}"

    def evaluation_command_line(self, bench: str, target: str = "") -> str:
        """Return the command line that makes the evaluation in eval/`bench`/`target` again. That of a model outside of
        the run lacks the path of the model. Without a target it evaluates the newest student."""
        names = {self.evaluation_path(name, "").name: name for name in self.recipe.eval.bench}
        step = parse_step(target)
        option = f" --model {target}" if target in self.recipe.scorers() else f" --step {step}" * (step is not None)
        return f"{self.command_line('eval')} --bench {shlex.quote(names.get(bench, bench))}{option}"

    # ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def start_step(self) -> int:
        """The first step: 0, or that of the fork."""
        return self.forked_from["step"] if self.forked_from else 0

    def current_step(self) -> int:
        """Return the step after the last one with an update. Directories of earlier steps may have been removed."""
        if self._unrecorded:
            return self._unrecorded[0].step + 1
        updated = (step for step in reversed(list_steps(self.path)) if self.update_path(step).exists())
        return max(self.start_step, next(updated, -1) + 1)

    def finished_steps(self) -> list[int]:
        """Return the steps that have an update, recorded or not yet."""
        steps = range(self.start_step, self.current_step())
        return [step for step in steps if self._unrecorded_update(step) or self.update_path(step).exists()]

    def removed_steps(self) -> list[int]:
        """Return the steps before the current one whose responses were removed."""
        steps = range(self.start_step, self.current_step())
        return [step for step in steps if not (self.step_path(step) / "rollout").is_dir()]

    def sampling_steps(self) -> range:
        """Return the steps whose responses can be sampled: those of the recipe and, in a finished run, the one after
        them.

        The final student samples the responses of the latter. No update uses them until train.steps is raised.
        """
        return range(self.start_step, max(self.recipe.train.steps, self.current_step() + 1))

    def count_ready_steps(self, stage: str) -> int:
        """Return the number of steps without an update whose `rollout`, or whose `score` by every scorer, is
        finished."""
        names, current = ["rollout"] if stage == "rollout" else self.scorers(), self.current_step()
        steps = [path for step, path in list_steps(self.path).items() if step >= current]
        return sum(all((path / name / "manifest.json").exists() for name in names) for path in steps)

    def begin_update(self, update: UnrecordedUpdate) -> None:
        """Let this process continue with the student of an update before the update is recorded.

        What needs the record waits for it: so nothing is written that depends on an update that a kill may undo. What
        other processes do must call `finish_update` before.
        """
        self.finish_update()
        self._unrecorded.append(update)

    def finish_update(self) -> None:
        """Wait until the latest update is recorded.

        Raises:
            OpdctlError: it could not be written.
        """
        for update in self._unrecorded:
            update.written.result()
        self._unrecorded.clear()

    def _unrecorded_update(self, step: int) -> UnrecordedUpdate | None:
        return next((update for update in self._unrecorded if update.step == step), None)

    def update(self, step: int) -> UpdateRecord:
        """Return the record of a step's update."""
        if self._unrecorded_update(step):
            self.finish_update()
        path = self.update_path(step)
        hint = f"run `{self.manage_command_line('repair')}`, which moves it away"
        record: UpdateRecord = files.read_json(path, UpdateRecord, hint)
        return record

    def metrics(self, step: int) -> Mapping[str, Any]:
        """Return the metrics of a step's update, recorded or not yet."""
        unrecorded = self._unrecorded_update(step)
        return unrecorded.metrics if unrecorded else self.update(step)["metrics"]

    def is_started(self, step: int) -> bool:
        """Whether a step's rollout was started. It may be ahead of the updates."""
        return step <= self.current_step() or self._policy_version_path(step).exists()

    def is_sampled(self, step: int) -> bool:
        """Whether a step's rollout is finished."""
        return self.is_started(step) and self.rollout_stage(step).is_finished()

    def is_scored(self, step: int) -> bool:
        """Whether a step's rollout and all its scores are finished."""
        return self.is_sampled(step) and all(stage.is_finished() for stage in self.score_stages(step).values())

    def next_command(self) -> str:
        """Return the command for the next stage of the current step, or the analysis if training is complete.

        Training writes a missing newest student from its checkpoint.
        """
        step = self.current_step()
        if self.is_newest_student_missing():
            return self.command_line("train")
        if step >= self.recipe.train.steps:
            return self.command_line("analyze-position")
        if not self.rollout_stage(step).is_finished():
            return self.rollout_command_line(step) if self.imported_files(step) else self.command_line("rollout")
        return self.command_line("train" if self.is_scored(step) else "score-teacher")

    # ── Students ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _state_record(self, step: int) -> StartRecord | UpdateRecord:
        """Return the record with the digests of the student after `step` updates."""
        is_start = self.forked_from is not None and step == self.start_step
        return self.forked_from if is_start and self.forked_from else self.update(step - 1)

    def _is_recorded(self, step: int) -> bool:
        """Whether there is a record of policy version `step`: that of an earlier update may have been removed."""
        if self._unrecorded_update(step - 1):
            self.finish_update()
        return step == self.start_step or self.update_path(step - 1).exists()

    def student_digests(self, step: int) -> Mapping[str, str]:
        """Return the SHA-256 of the files of policy version `step`, after the first.

        Raises:
            OpdctlError: the update was removed, and the student is not the one that sampled the step's responses.
        """
        if self._is_recorded(step):
            return self._state_record(step)["student"]
        path = self.student_path(step)
        digests = directories.directory_digests(path)
        if digest_of(digests) != self.student_digest(step):
            why = f"{self.update_path(step - 1)} was removed, and no rollout was sampled by these files"
            raise files.corrupt_artifact(path, why, "restore them from a copy, or use a later step")
        return digests

    def saves_trainer_state(self, step: int) -> bool:
        """Whether the recipe saves the trainer state after `step` updates."""
        settings = self.recipe.train
        return step % settings.save_every_steps == 0 or step == settings.steps

    def must_save_trainer_state(self) -> bool:
        """Whether the current step's trainer state should exist and does not: training was killed while it wrote it.

        In a finished run it was removed on purpose: there it is complete before the step is.
        """
        step = self.current_step()
        is_due = self.start_step < step < self.recipe.train.steps and self.saves_trainer_state(step)
        return is_due and not self.trainer_path(step).is_dir()

    def check_trainer_state(self, step: int) -> Mapping[str, str]:
        """Check the trainer state after `step` updates file by file, and return the SHA-256 of each.

        Raises:
            OpdctlError: it is missing or corrupt.
        """
        path = self.trainer_path(step)
        digests = self._state_record(step).get("trainer") if self._is_recorded(step) else None
        if not digests:
            record: StateRecord = files.read_json(path / directories.DIGESTS_FILE, StateRecord)
            if record["student"] != self.student_digest(step):
                raise files.corrupt_artifact(path, "the state of another student")
            digests = record["files"]
        directories.check_directory(path, digests, self.student_hint(step))
        return digests

    def student_digest(self, step: int) -> str:
        """Return the digest of policy version `step`, after the removal of its update that of the next rollout's."""
        if step == 0:
            return self.digests["student"]
        if self._is_recorded(step):
            return digest_of(self._state_record(step)["student"])
        stage = stage_dir.recorded_stage(self.step_path(step) / "rollout", self.command_line("rollout", step))
        return stage.fingerprint.inputs.get("policy", "") if stage else ""

    def is_newest_student_missing(self) -> bool:
        """Whether the directory of the current step's student was removed."""
        step = self.current_step()
        return step > 0 and not self.student_path(step).is_dir()

    def must_rewrite_student(self) -> bool:
        """Whether the newest student is missing and was written by this run: training writes it again."""
        return self.current_step() > self.start_step and self.is_newest_student_missing()

    def is_state_incomplete(self) -> bool:
        """Whether training must write the current step's student or trainer state, before anything else."""
        return self.must_rewrite_student() or self.must_save_trainer_state()

    def student_hint(self, step: int) -> str:
        """Return what to do if the student of `step` is corrupt."""
        if self.forked_from and step == self.start_step == self.current_step():
            return f"fork {self.forked_from['run_dir']} again"
        return f"run `{self.manage_command_line('repair')}`"

    def student_at(self, step: int) -> ModelDir:
        """Return policy version `step`, checked file by file: by one rank of a machine, once until a file changes.

        Raises:
            OpdctlError: it does not exist yet, was pruned, or is corrupt.
        """
        if step == 0:
            return self.student
        if step in self.held_students:
            return self._trained_student(self.held_students[step], step)
        path, current = self.student_path(step), self.current_step()
        if not self.start_step <= step <= current:
            raise OpdctlError(
                "missing_checkpoint",
                f"{path}: the run has steps {self.start_step} to {current}",
                hint=f"run `{self.command_line('train')}`",
            )
        if not path.is_dir() and step != current:
            raise OpdctlError(
                "missing_checkpoint",
                f"{path}: pruned (train.keep_every_steps = {self.recipe.train.keep_every_steps})",
                hint=f"use one of the steps {', '.join(map(str, self.kept_steps()))}",
            )
        if not path.is_dir() and step > self.start_step:
            raise files.corrupt_artifact(path, "is missing", f"run `{self.command_line('train')}`")
        unrecorded = self._unrecorded_update(step - 1)
        if distributed.local_rank() == 0 and not (unrecorded and distributed.is_main()):
            state = (path, self.student_digest(step), *directories.file_states(path))  # before the check
            if state not in _checked_students:
                directories.check_directory(path, self.student_digests(step), self.student_hint(step))
                _checked_students.add(state)
        return self._trained_student(path, step)

    def _trained_student(self, path: Path, step: int) -> ModelDir:
        return self.student.with_path(path, self._probe(step), has_adapter=self.recipe.lora.rank > 0)

    def mark_student_checked(self, step: int, digest: str, states: Iterable[tuple[Path, int, int]]) -> None:
        """Let `student_at` not check the files of policy version `step`, which this process has just written.

        digest: of the student. states: of its files, before they were read for it.
        """
        _checked_students.add((self.student_path(step), digest, *states))

    def _probe(self, step: int) -> Probe | None:
        """Return the probe of policy version `step`. A fork's first student has none, nor has one of opdctl 0.2.0."""
        unrecorded = self._unrecorded_update(step - 1)
        record = unrecorded.probe if unrecorded else None
        if record is None and step > self.start_step and self._is_recorded(step):
            record = self.update(step - 1).get("probe")
        return Probe(tuple(record["ids"]), tuple(record["logprobs"])) if record else None

    def kept_steps(self) -> list[int]:
        """Return the steps whose student exists."""
        first = [0] if self.start_step == 0 else []
        possible = range(self.start_step, self.current_step() + 1)
        return [*first, *(step for step in list_steps(self.path / "student") if step in possible)]

    # ── Policy versions ──────────────────────────────────────────────────────────────────────────────────────────────

    def _policy_version_path(self, step: int) -> Path:
        return self.step_path(step) / "rollout" / "policy_version.json"

    def policy_version(self, step: int) -> int:
        """Return the policy version that samples a step's responses: `step`, or the one that was pinned."""
        path = self._policy_version_path(step)
        return int(files.read_json(path, PolicyRecord)["policy_version"]) if path.exists() else step

    def pin_policy_version(self, step: int) -> None:
        """Pin the newest student as the policy that samples a step's responses. The first worker decides.

        Without staleness, or if a part of the rollout exists, there is nothing to decide.
        """
        path = self._policy_version_path(step)
        if not self.recipe.pipeline.max_staleness or path.exists():
            return
        self.finish_update()
        with leases.hold_lease(self.step_path(step), "rollout-policy", wait=True):
            version = min(self.current_step(), step)
            markers = (path.name, *stage_dir.STAGE_MARKERS)
            if self.can_sample(step) and not any((path.parent / name).exists() for name in markers):
                files.write_json(path, {"policy_version": version})

    def can_sample(self, step: int) -> bool:
        """Whether there is a student that is new enough to sample a step's responses."""
        newest = self.current_step() + self.recipe.pipeline.max_staleness
        return self._policy_version_path(step).exists() or newest >= step

    def _check_staleness(self, step: int) -> None:
        version, bound = self.policy_version(step), self.recipe.pipeline.max_staleness
        if step - version > bound and not self.update_path(step).exists():
            path = shlex.quote(str(self.step_path(step)))
            raise OpdctlError(
                "stale_rollout",
                f"{self.step_path(step)}: sampled by policy version {version}; pipeline.max_staleness = {bound} "
                f"requires version {step - bound} or newer",
                hint=f"restore the previous value, or remove {path} to sample it again",
            )

    # ── Imported responses ───────────────────────────────────────────────────────────────────────────────────────────

    def _import_path(self, step: int) -> Path:
        return self.step_path(step) / "rollout" / IMPORT_FILE

    def imported_files(self, step: int) -> Mapping[str, str]:
        """Return the SHA-256 by path of the files that a step's responses are imported from; none of sampled ones."""
        path = self._import_path(step)
        hint = f"remove {shlex.quote(str(path))} and import the files again"
        return files.read_json(path, ImportRecord, hint)["files"] if path.exists() else {}

    def record_import(self, step: int, digests: Mapping[str, str]) -> None:
        """Record that a step's responses are imported from files of these digests, by path.

        Raises:
            OpdctlError: the step has other responses.
        """
        path = self._import_path(step)
        with leases.hold_lease(self.step_path(step), "rollout-import", wait=True):
            recorded = self.imported_files(step)
            is_started = any((path.parent / name).exists() for name in stage_dir.STAGE_MARKERS)
            if [*recorded.values()] == [*digests.values()]:
                return
            if recorded or is_started:
                found = f"imported from {', '.join(recorded)}" if recorded else "sampled by the student"
                raise OpdctlError(
                    "settings_mismatch",
                    f"{path.parent}: its responses are {found}",
                    hint=f"use another --step, or remove {shlex.quote(str(path.parent))}",
                )
            files.make_directory(path.parent)
            files.write_json(path, {"files": dict(digests)})

    # ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts in the order of their file.

        Raises:
            OpdctlError: the file is missing, or differs from the one recorded.
        """
        path, record = self.path / PROMPTS_FILE, read_run_record(self.path)["prompts"]
        if not path.exists():
            raise files.corrupt_artifact(path, "is missing", f"run `{self.command_line('train')}`, which writes it")
        hint = f"run `{self.manage_command_line('repair')}`, then `{self.command_line('train')}`"
        try:
            tables.check_rows(path, record["rows"])  # before it is hashed: bounded
        except OpdctlError as error:
            raise OpdctlError("checksum_mismatch", error.message.partition(": ")[2], hint=hint) from error
        if files.sha256_file(path) != record["sha256"]:
            raise OpdctlError("checksum_mismatch", f"{path}: differs from the prompts of this run", hint=hint)
        return tables.read_rows(path, Prompt, record["rows"])

    @cached_property
    def _prompt_sources(self) -> list[tuple[int, int]]:
        """The prompts of each source, and those that it gives to every step."""
        total, per_step = len(self.prompts), self.recipe.rollout.prompts_per_step
        recorded = read_run_record(self.path)["prompts"].get("sources", {}).values()
        sources = [(source["rows"], source["per_step"]) for source in recorded] or [(total, per_step)]
        sums = tuple(map(sum, zip(*sources, strict=True)))
        if sums != (total, per_step) or any(size > rows for rows, size in sources):
            why = f"its sources do not make up {total} prompts and {per_step} of each step"
            raise files.corrupt_artifact(self.path / "run.json", why, f"run `{self.manage_command_line('repair')}`")
        return sources

    @cached_property
    def prompts_digest(self) -> str | None:
        """The digest of the prompts, or None if a model is only evaluated."""
        return read_run_record(self.path)["prompts"]["sha256"] if (self.path / "run.json").exists() else None

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The texts of the chat templates that the recipe names, by section, as they were at the start of the run."""
        return read_recorded_chat_templates(self.recipe, self.path)

    def samples(self, step: int) -> list[tuple[str, Prompt]]:
        """Return (sample id, prompt) of every response of a step, in order.

        An epoch is as many complete steps as the prompts allow. Each epoch has a different order.
        """
        rule = read_run_record(self.path)["prompts"].get("order", DEFAULT_PROMPT_ORDER)
        order = step_order(rule, self._prompt_sources, self.recipe.seed, step)
        prompts, samples = [self.prompts[i] for i in order], self.recipe.rollout.samples_per_prompt
        return [(sample_id(prompt.prompt_id, step, n), prompt) for prompt in prompts for n in range(samples)]

    @cached_property
    def _teacher_prompts(self) -> dict[str, Ids]:
        pairs = ((prompt.prompt_id, prompt.teacher_prompt_ids) for prompt in self.prompts)
        return {name: ids for name, ids in pairs if ids is not None}

    def prompt_ids(self, name: str, response: Response) -> Ids:
        """Return the prompt that the model `name` reads before a response: a teacher's may differ."""
        if name in ("student", REFERENCE) or not self.recipe.has_teacher_prompts(name):
            return response.prompt_ids
        return self._teacher_prompts.get(response.prompt_id, response.prompt_ids)

    @cached_property
    def fingerprint_settings(self) -> Callable[[str], dict[str, Any]]:
        """The function `fingerprint_settings` of the recipe, which finds those of each stage once."""
        return cache(partial(fingerprint_settings, self.recipe))

    # ── Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def rollout_stage(self, step: int) -> StageDir:
        """Return the stage that samples a step's responses.

        Raises:
            OpdctlError: it was made with different settings, or is too stale.
        """
        self._check_staleness(step)
        settings = self.fingerprint_settings("rollout")
        inputs = {"prompts": str(self.prompts_digest), **self._environment_inputs()}
        if imported := self.imported_files(step):
            settings = {key: settings[key] for key in IMPORT_KEYS}
            inputs = {"files": digest_of([*imported.values()])}
        version = self.policy_version(step)

        def find_fingerprint() -> Fingerprint:
            return Fingerprint(settings, {**inputs, "policy": self.student_digest(version)})

        return open_stage_dir(
            self.step_path(step) / "rollout",
            stage="rollout",
            num_parts=self.recipe.rollout.num_parts,
            suffix=".parquet",
            fingerprint=find_fingerprint if self._unrecorded else find_fingerprint(),
            rerun_command=self.rollout_command_line(step),
            repair_command=self.manage_command_line("repair"),
        )

    def _environment_inputs(self) -> dict[str, str]:
        """Return the digest of the environment's file as it was at the start of the run, if there is an environment."""
        digest = read_run_record(self.path).get("environment") if self.recipe.rollout.environment else None
        return {"environment": digest} if digest else {}

    def check_environment(self) -> None:
        """Check that the file of the environment is unchanged.

        Raises:
            OpdctlError: it has other contents than at the start of the run.
        """
        module = self.recipe.rollout.environment.partition(":")[0]
        if self._environment_inputs() != {"environment": plugin_digest(module)}:
            raise OpdctlError(
                "source_mismatch",
                f"rollout.environment: {plugin_file(module)} changed after the start of the run {self.path}",
                hint="restore it, or give the changed module another name and continue in a fork: "
                f"`{self.manage_command_line('fork')} NEW_RUN_DIR --set rollout.environment=MODULE:FUNCTION`",
            )

    def score_stage(self, step: int, name: str) -> StageDir:
        """Return the stage in which the model `name` scores a step's responses."""
        return open_stage_dir(
            self.step_path(step) / name,
            stage="score",
            num_parts=self.recipe.rollout.num_parts,
            suffix=".safetensors",
            fingerprint=Fingerprint(
                scorer_settings(self.fingerprint_settings("score"), name),
                {"rollout": self.rollout_stage(step).digest, name: self.digests[name]},
            ),
            rerun_command=self.command_line("score-teacher", step) + f" --only {name}",
            repair_command=self.manage_command_line("repair"),
        )

    def score_stages(self, step: int) -> dict[str, StageDir]:
        """Return the stages of all scorers of a step, by name."""
        return {name: self.score_stage(step, name) for name in self.scorers()}

    def update_input_digests(self, step: int) -> dict[str, str]:
        """Return the digests of the inputs of a step's update.

        Raises:
            OpdctlError: the rollout or a score is unfinished.
        """
        plugins = {f"plugin {name}": plugin_digest(name) for name in self.recipe.plugins}
        scores = {name: stage.digest for name, stage in self.score_stages(step).items()}
        return {"rollout": self.rollout_stage(step).digest, **scores, **plugins}


def open_stage_dir(path: Path, **definition: Any) -> StageDir:
    """Return the stage directory in `path`.

    Raises:
        OpdctlError: it was made with different settings; the message lists what each of them affects.
    """
    try:
        return StageDir(path, **definition)
    except FingerprintMismatchError as error:
        if error.changes:
            error.detail = f"{path} was made with different settings\n{describe_changes(error.changes)}"
        raise


def describe_environment(recipe: Recipe) -> dict[str, str]:
    """Return the entry of the environment in run.json; there is none without one.

    Raises:
        OpdctlError: the function of the environment is missing, or the import of its module fails.
    """
    if not recipe.rollout.environment:
        return {}
    load_function(recipe.rollout.environment, "rollout.environment")
    return {"environment": plugin_digest(recipe.rollout.environment.partition(":")[0])}


def plugin_digest(name: str) -> str:
    """Return the digest of a plugin's file."""
    file = plugin_file(name)
    return files.sha256_file(file) if file and file.is_file() else "no file"


def read_run_record(path: Path) -> RunRecord:
    """Return run.json of the run in `path`."""
    hint = f"run `opdctl run repair {shlex.quote(str(path))}`, which moves it away"
    record: RunRecord = files.read_json(path / "run.json", RunRecord, hint)
    return record


def read_recorded_chat_templates(recipe: Recipe, path: Path) -> dict[str, str]:
    """Return the texts of the chat templates that a recipe names, by section: those at the start of the run in `path`,
    or the present ones if it has not started.

    Raises:
        OpdctlError: a file is missing or invalid.
    """
    if not (path / "run.json").exists():
        return read_chat_templates(recipe)
    return read_run_record(path)["prompts"].get("chat_templates", {})


def read_recipe(path: Path, overrides: Sequence[str] = (), purpose: Purpose = "read") -> Recipe:
    """Return the recipe recorded in the run directory `path`, with `overrides`.

    Raises:
        OpdctlError: there is no recipe in `path`, it is invalid, or the run has a version that is not read; `path`
            contains a link or a special file; the recipe asks for code that this command does not trust.
    """
    files.check_tree(path, directories_only=purpose == "repair")
    is_run = (path / "run.json").exists()
    if is_run:
        read_run_record(path)  # its version, before the recipe of that version is read
    if not (path / "recipe.toml").exists():
        runs = [file.parent.name for file in path.parent.glob("*/recipe.toml")]
        raise OpdctlError(
            "missing_run",
            f"{path} has no recipe.toml{'' if is_run else did_you_mean(path.name, runs, path.parent)}",
            hint=f"run `opdctl run repair {shlex.quote(str(path))}`, which writes it from run.json"
            if is_run
            else "give the path of a run; `opdctl train --recipe FILE` starts one",
        )
    try:
        return load_recorded_recipe(path / "recipe.toml", overrides, purpose)
    except OpdctlError as error:
        if is_run and not overrides and error.kind == "invalid_recipe":
            error.hint = (
                f"correct it, or run `opdctl run repair {shlex.quote(str(path))}`, which writes that of the start"
            )
        raise
