"""A recipe bound to its run directory: where everything lies, which step is next, what each stage depends on.

Knows no stage's work. Opening a new run writes recipe.toml and prompts.parquet, then run.json, the mark that the run
directory is whole. Opening an old one compares the recipe and the models with what is recorded, and refuses a change.
"""

import importlib.metadata
import shlex
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import SCHEMA_VERSION, claims, log, store
from opdctl.config import (
    AUTO,
    CHAIN,
    FIXED,
    Model,
    Recipe,
    as_overrides,
    changed,
    describe_changes,
    is_free,
    is_table,
    load_recipe,
    model_key,
    settings_of,
    settings_of_scorer,
    untouched,
)
from opdctl.engines import has_vllm
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.manifests import PolicyRecord, RunRecord, UpdateRecord
from opdctl.model import ModelDir, check_same_tokenizer, locate
from opdctl.prompts import Problem, load_problems, tokenize
from opdctl.records import Ids, Prompt, Response, sample_id
from opdctl.registry import plugin_file
from opdctl.store import Fingerprint, StageDir, digest_of

REFERENCE = "reference"
LIBRARIES = ("opdctl", "torch", "transformers", "numpy", "pyarrow", "safetensors", "tokenizers")


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
        return self.path / f"step-{step:05d}"

    def student_path(self, step: int) -> Path:
        return self.path / "student" / f"step-{step:05d}"

    def trainer_path(self, step: int) -> Path:
        return self.path / "trainer" / f"step-{step:05d}"

    def update_path(self, step: int) -> Path:
        return self.step_path(step) / "update.json"

    def evaluation_path(self, bench: str, subject: str) -> Path:
        return self.path / "eval" / (Path(bench).stem if is_table(bench) else bench) / subject

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    # ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def finished(self, stage: str) -> int:
        """Return in how many steps `rollout`, or `score`, is finished, whatever recipe that was under."""
        names = ["rollout"] if stage == "rollout" else self.scorers()
        folders = self.path.glob("step-*")
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
        return store.read_json(path, UpdateRecord, f"remove {path} and run `{self.command('train')}`: it is made again")

    def student_at(self, step: int) -> ModelDir:
        """Return the student that has seen `step` updates. Raises OpdctlError when it is not there, or not whole."""
        if step == 0:
            return self.student
        path = self.student_path(step)
        if not self.update_path(step - 1).exists():
            raise OpdctlError(
                f"{path}: step {step} has no student yet, {self.current_step()} updates are done",
                hint=f"run `{self.command('train')}`",
            )
        newest = step == self.current_step()
        if not path.is_dir() and not newest:
            raise OpdctlError(
                f"{path}: this student is not kept (train.keep_every = {self.recipe.train.keep_every})",
                hint=f"steps that are kept: {', '.join(map(str, self.kept_steps()))}",
            )
        hint = f"run `{self.command('train')} --repair`: it is made again" if newest else f"remove {path}"
        store.check_directory(path, self.update(step - 1)["student"], hint)
        return self.student.trained(path)

    def kept_steps(self) -> list[int]:
        """Return the steps whose student is there to be used."""
        found = (int(p.name.removeprefix("step-")) for p in (self.path / "student").glob("step-*"))
        return [0, *sorted(step for step in found if self.update_path(step - 1).exists())]

    def student_digest(self, step: int) -> str:
        return self.digests["student"] if step == 0 else digest_of(self.update(step - 1)["student"])

    # ── Policies ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _policy_path(self, step: int) -> Path:
        return self.step_path(step) / "rollout" / "policy.json"

    def policy_step(self, step: int) -> int:
        """Return how many updates the student has seen that draws a step's responses: `step`, or what was settled."""
        path = self._policy_path(step)
        return int(store.read_json(path, PolicyRecord)["policy_step"]) if path.exists() else step

    def _refuse_stale(self, step: int) -> None:
        """Raise OpdctlError (code 4) where a step that is still to be learnt from is too stale for the recipe."""
        policy, bound = self.policy_step(step), self.recipe.pipeline.max_staleness
        if step - policy > bound and not self.update_path(step).exists():
            raise OpdctlError(
                f"{self.step_path(step)}: drawn by the student of step {policy}; "
                f"pipeline.max_staleness = {bound} wants that of step {step - bound} at least",
                hint=f"put the old value back; or remove {self.step_path(step)} to draw it again",
                code=ExitCode.SETTINGS,
            )

    def may_draw(self, step: int) -> bool:
        """Whether there is a student that is new enough to draw a step's responses."""
        return self._policy_path(step).exists() or self.current_step() + self.recipe.pipeline.max_staleness >= step

    def settle_policy(self, step: int) -> None:
        """Settle that the newest student there is draws a step's responses. Who comes first decides for all workers;
        without staleness, or where parts were drawn already, there is nothing to settle."""
        path = self._policy_path(step)
        if not self.recipe.pipeline.max_staleness or path.exists():
            return
        with claims.claimed(self.step_path(step), "rollout-policy", wait=True):
            policy = min(self.current_step(), step)
            if self.may_draw(step) and not any((path.parent / name).exists() for name in (path.name, *store.BEGUN)):
                store.write_json(path, {"policy_step": policy})

    def is_begun(self, step: int) -> bool:
        """Whether a step's rollout was begun: it may be ahead of the updates."""
        return step <= self.current_step() or self._policy_path(step).exists()

    # ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts in the order drawn. Raises OpdctlError (code 3) when the file is not the one recorded."""
        path, recorded = self.path / "prompts.parquet", read_record(self.path)["prompts"]
        if not path.exists() or store.sha256_file(path) != recorded["sha256"]:
            raise store.damaged(path, "not the prompts that this run began with", "start again in another --output")
        return store.read_rows(path, Prompt)

    def draws(self, step: int) -> list[tuple[str, Prompt]]:
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

    def rollout(self, step: int) -> StageDir:
        """Return the stage that draws a step's responses. Raises OpdctlError (code 4) where they are too stale."""
        self._refuse_stale(step)
        recipe = self.at(step).recipe
        return StageDir(
            self.step_path(step) / "rollout",
            stage="rollout",
            parts=recipe.rollout.parts,
            suffix=".parquet",
            fingerprint=Fingerprint(
                settings_of(recipe, "rollout"),
                {"prompts": str(self.prompts_digest), "policy": self.student_digest(self.policy_step(step))},
            ),
            redo=self.command("rollout", step),
        )

    def score(self, step: int, name: str) -> StageDir:
        """Return the stage in which the model `name` scores a step's responses."""
        recipe = self.at(step).recipe
        return StageDir(
            self.step_path(step) / name,
            stage="score",
            parts=recipe.rollout.parts,
            suffix=".safetensors",
            fingerprint=Fingerprint(
                settings_of_scorer(recipe, name),
                {"rollout": self.rollout(step).digest, name: self.digests[name]},
            ),
            redo=self.command("score-teacher", step) + f" --only {name}",
        )

    def scores(self, step: int) -> dict[str, StageDir]:
        """Return the stages of all models that score a step's responses, by name."""
        return {name: self.score(step, name) for name in self.scorers()}

    def is_drawn(self, step: int) -> bool:
        """Whether a step's rollout is finished."""
        return self.is_begun(step) and self.rollout(step).done()

    def is_scored(self, step: int) -> bool:
        """Whether a step's rollout and all its scores are finished."""
        return self.is_drawn(step) and all(stage.done() for stage in self.scores(step).values())

    def inputs(self, step: int) -> dict[str, str]:
        """Return the digests of what a step's update is made from. Raises OpdctlError (code 1) where unfinished."""
        plugins = {f"plugin {name}": _plugin_digest(name) for name in self.recipe.plugins}
        scores = {name: stage.digest for name, stage in self.scores(step).items()}
        return {"rollout": self.rollout(step).digest, **scores, **plugins}

    @cached_property
    def prompts_digest(self) -> str | None:
        """The digest of the prompts, or None where a model is only evaluated."""
        return read_record(self.path)["prompts"]["sha256"] if (self.path / "run.json").exists() else None

    def command(self, stage: str, step: int | None = None) -> str:
        """Return the command line that runs a stage of this run."""
        at = f" --step {step}" if step is not None else ""
        return f"opdctl {stage} --output {shlex.quote(str(self.path))}{at}"


def with_engines(recipe: Recipe, path: Path, sections: Sequence[str] = ("rollout", "score")) -> Recipe:
    """Return the recipe with the engine in the place of each `auto`: the one that the run in `path` was begun with, or
    the one that is right here. Says the choice."""
    begun = read_recipe(path) if (path / "recipe.toml").exists() else None
    update = {}
    for section in sections:
        settings = getattr(recipe, section)
        if settings.engine == AUTO:
            name = getattr(begun, section).engine if begun else ("vllm" if has_vllm() else "transformers")
            update[section] = settings.model_copy(update={"engine": name})
            if not begun:
                log.say(f"{section}.engine: auto is `{name}` here")
    return recipe.model_copy(update=update)


def run_path(recipe: Recipe, output: Path | None) -> Path:
    return output or Path("runs") / recipe.name


def newest_run() -> Path:
    """Return the run under runs/ that was worked on last."""
    runs = [record.parent for record in Path("runs").glob("*/run.json")]
    if not runs:
        raise OpdctlError("there is no run under runs/", hint="give --recipe FILE or --output RUN_DIR")
    return max(runs, key=lambda run: run.stat().st_mtime)


def _plugin_digest(name: str) -> str:
    file = plugin_file(name)
    return store.sha256_file(file) if file and file.is_file() else "no file of its own"


def open_run(
    recipe: Recipe, output: Path | None = None, *, needs: Collection[str] | None = None, record: bool = True
) -> Run:
    """Open the run directory of `recipe`, or begin it.

    needs: the models that must be at hand, all if None; a begun run's others are taken as recorded. record: write
    settings that may change down. Raises OpdctlError: 2 for a missing model or tokenizers that differ, 3 for bad
    prompts, 4 when the run was begun with another recipe or other models, 5 when a hub is out of reach.
    """
    path = run_path(recipe, output)
    recipe = with_engines(recipe, path)
    _begin_once(recipe, path)
    refuse_another_recipe(recipe, path)
    if record:
        _check_source(recipe, path)
    if record and store.read_text(path / "recipe.toml") != recipe.to_toml():
        store.write_text(path / "recipe.toml", recipe.to_toml())
    run = _as_recorded(recipe, path)
    needed = [name for name in run.models if needs is None or name in needs]
    run = replace(run, models={**run.models, **{name: _found_again(run, name) for name in needed}})
    for name in needed:
        _check_model(path, name, run.models[name])
        _warn_of_code(recipe.models()[name])
    for folder in (path, path / "student", path / "trainer", run.step_path(run.current_step())):
        store.sweep(folder)
    return run


def _found_again(run: Run, name: str) -> ModelDir:
    """Return where a model lies: as recorded, or where this machine has what is known by a name, not by a path."""
    model, settings = run.models[name], run.recipe.models()[name]
    if model.path.is_dir() or Path(settings.model).is_absolute():
        return model
    return replace(model, path=locate(settings, f"{model_key(name)}.model"))


def _check_source(recipe: Recipe, path: Path) -> None:
    """Raise OpdctlError (code 4) where the file that the prompts came from is there, and is another one by now."""
    recorded, source = read_record(path)["prompts"]["source_sha256"], Path(recipe.prompts.source)
    if recorded and source.is_file() and store.sha256_file(source) != recorded:
        raise OpdctlError(
            f"{path}: {source} is not what it was when this run took its prompts from it",
            hint="restore it, or use another --output for the new prompts; removed, it is not missed",
            code=ExitCode.SETTINGS,
        )


def _check_model(path: Path, name: str, model: ModelDir) -> None:
    """Raise OpdctlError (code 4) unless a model's files are those that the run began with."""
    recorded = read_record(path)["models"][name]
    # Files with the recorded sizes and times are not hashed again.
    if not model.path.is_dir() or (_stamp(model) != recorded["stamp"] and model.digest() != recorded["digest"]):
        raise OpdctlError(
            f"{path}: the {name} at {model.path} is not the one this run began with",
            hint="restore it, or use another --output",
            code=ExitCode.SETTINGS,
        )


def refuse_foreign_folder(recipe: Recipe, path: Path) -> None:
    """Raise OpdctlError unless `path` is a folder, or can be one, that holds nothing but the start of this very run."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            what = "is" if part == path else f"{part} is"
            raise OpdctlError(f"{path}: {what} a file, not a folder", hint="use another --output")
    own, recorded = {"recipe.toml", "prompts.parquet"}, path / "recipe.toml"
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} if path.is_dir() else set()
    if found - own or (recorded.exists() and store.read_text(recorded) != recipe.to_toml()):
        raise OpdctlError(f"{path}: is not empty and is no run directory", hint="use another --output")


def bare_run(recipe: Recipe, path: Path) -> Run:
    """Return what an evaluation in `path` needs of a run where there is none: the model is no part of it."""
    return Run(with_engines(recipe, path, ("rollout",)), path, {}, {})


def recorded_run(path: Path) -> Run:
    """Open a run directory as it is recorded, for reading artifacts alone: the models need not be there any more."""
    recipe = read_recipe(path)
    if not (path / "run.json").exists():
        raise OpdctlError(f"{path}: this run was never begun: it has no run.json", hint="run `opdctl rollout` first")
    return _as_recorded(recipe, path)


def _as_recorded(recipe: Recipe, path: Path) -> Run:
    """Return the run with its models where run.json says: a hub's newer revision does not concern it."""
    recorded = read_record(path)["models"]
    if missing := sorted(recipe.models().keys() - recorded.keys()):
        raise store.damaged(path / "run.json", f"does not tell of the {missing[0]}", "start again in another --output")
    models = {
        name: ModelDir(Path(recorded[name]["path"]), settings.dtype, settings.trust_remote_code)
        for name, settings in recipe.models().items()
    }
    digests = {name: recorded[name]["digest"] for name in models}
    earlier = {int(file.stem.rpartition("-")[2]): load_recipe([file]) for file in path.glob("recipe-before-*.toml")}
    return Run(recipe, path, models, digests, earlier)


def read_record(path: Path) -> RunRecord:
    """Return what the run in `path` was begun with. Raises OpdctlError (code 3) when that is damaged."""
    return store.read_json(path / "run.json", RunRecord)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe recorded in the run directory `path`, with `overrides`. Raises OpdctlError when it is none."""
    if not (path / "recipe.toml").exists():
        runs = [file.parent.name for file in path.parent.glob("*/recipe.toml")]
        raise OpdctlError(
            f"{path}: no run directory: it has no recipe.toml{did_you_mean(path.name, runs)}",
            hint="give the path of a run; one is begun by `opdctl train` or `opdctl rollout` with --recipe",
        )
    return load_recipe([path / "recipe.toml"], overrides)


def find_model(model: Model, key: str) -> ModelDir:
    """Return where a model lies and how to load it; `key` names it in errors. Raises OpdctlError as `locate` does."""
    _warn_of_code(model)
    return ModelDir(locate(model, key), model.dtype, model.trust_remote_code)


def _warn_of_code(model: Model) -> None:
    if model.trust_remote_code:
        log.warn(f"trust_remote_code is on: code that comes with {model.model} will run")


def _identify(model: ModelDir) -> dict[str, Any]:
    """Return what run.json says of a model."""
    names = {"path": str(model.path), "digest": model.digest(), "tokenizer": model.tokenizer_digest}
    return {**names, "stamp": _stamp(model)}


def _stamp(model: ModelDir) -> dict[str, list[int]]:
    """Return size and time of each file of a model."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in model.files()}


def refuse_another_recipe(recipe: Recipe, path: Path) -> None:
    """Raise OpdctlError (code 4) when the run in `path` was begun with a recipe that shapes other artifacts.

    The message says what is valid under the new one too, the hint the ways on.
    """
    changes = shaping(read_recipe(path), recipe)
    if changes:
        run = recorded_run(path)
        raise OpdctlError(
            "\n".join([f"{path}: was begun with another recipe", describe_changes(changes), *what_stays(run, changes)]),
            hint="\n".join(_ways_on(run, changes)),
            code=ExitCode.SETTINGS,
        )


def shaping(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) of the settings that differ and shape artifacts."""
    return [change for change in changed(old.flat(), new.flat()) if not is_free(change[0])]


def what_stays(run: Run, changes: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return how much of what was made is valid under changed settings too, as a line, if anything is."""
    counts = {CHAIN[stage]: run.finished(stage) for stage in untouched(key for key, _, _ in changes)}
    said = " and ".join(f"{count} steps of {name}" for name, count in counts.items() if count)
    return [f"{said} stay valid"] if said else []


def _ways_on(run: Run, changes: list[tuple[str, Any, Any]]) -> list[str]:
    where, overrides = shlex.quote(str(run.path)), as_overrides(changes)
    new = "--recipe FILE" if overrides is None else " ".join(f"--set {shlex.quote(text)}" for text in overrides)
    ways = [f"`opdctl train --output {where}` goes on under the recorded recipe"]
    if not any(key.startswith(FIXED) for key, _, _ in changes):
        ways += [
            f"`opdctl change {where} {new}` goes on from step {run.current_step()} under the new one, and records that",
            f"`opdctl change {where} {new} --branch NEW_RUN_DIR` does so in a run directory of its own",
        ]
    return [*ways, f"another --output, or removing {where}, starts over"]


def prepare_prompts(recipe: Recipe, problems: list[Problem], student: ModelDir) -> tuple[list[Prompt], int]:
    """Return the prompts as token ids and how many were too long. Raises OpdctlError (code 3) when too few are left."""
    prompts, dropped = tokenize(problems, student.tokenizer, recipe.prompts, list(recipe.teacher_models()))
    if len(prompts) < recipe.rollout.prompts_per_step:
        raise OpdctlError(
            f"{recipe.prompts.source}: {len(prompts)} prompts are fewer than rollout.prompts_per_step = "
            f"{recipe.rollout.prompts_per_step}",
            hint="lower rollout.prompts_per_step, or give more prompts",
            code=ExitCode.DATA,
        )
    return prompts, dropped


def check_top_k(recipe: Recipe, student: ModelDir) -> None:
    """Raise OpdctlError unless more tokens than the most probable ones that are to be stored are there."""
    for key, top_k in (("rollout.top_k", recipe.rollout.top_k), ("score.top_k", recipe.score.top_k)):
        if top_k >= student.vocab_size:
            raise OpdctlError(
                f"{key}: {top_k} of {student.vocab_size} tokens",
                hint='store fewer; or take the whole vocabulary by an objective with support = "full"',
            )


def _begin_once(recipe: Recipe, path: Path) -> None:
    """Begin the run if it is not begun. Workers that do so at the same time write the same files, each whole."""
    if (path / "run.json").exists():
        return
    try:
        refuse_foreign_folder(recipe, path)
    except OpdctlError:
        if (path / "run.json").exists():
            return  # another worker was faster, and is at work already
        raise
    _begin(recipe, path)


def _begin(recipe: Recipe, path: Path) -> None:
    found = {
        name: ModelDir(locate(model, f"{model_key(name)}.model"), model.dtype, model.trust_remote_code)
        for name, model in recipe.models().items()
    }
    student = found["student"]
    for name in recipe.scorers():
        check_same_tokenizer(student, found[name], name)
    check_top_k(recipe, student)
    for name, model in found.items():
        if (rows := model.rows()) > student.vocab_size:
            log.say(
                f"{name}: of {rows} rows of its output matrix the tokenizer knows {student.vocab_size}; the others "
                "are masked"
            )
    problems = load_problems(recipe.prompts)
    prompts, dropped = prepare_prompts(recipe, problems, student)
    if dropped:
        log.warn(f"{dropped} of {len(problems)} prompts are longer than prompts.max_tokens and were dropped")
    models = {name: _identify(model) for name, model in found.items()}
    for name in recipe.teacher_models():
        if models[name]["digest"] == models["student"]["digest"] and not recipe.prompts.teacher_prompt_column:
            log.warn(f"student and {name} are one and the same model: A is 0 on every token until the student changes")
    order = np.random.default_rng(recipe.seed).permutation(len(prompts))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, PermissionError) as error:
        raise OpdctlError(f"{path}: cannot be made: {error.strerror}", hint="use another --output") from None
    store.write_text(path / "recipe.toml", recipe.to_toml())
    sha256 = store.write_prompts(path / "prompts.parquet", [prompts[i] for i in order])
    source = store.sha256_file(Path(recipe.prompts.source)) if is_table(recipe.prompts.source) else None
    store.write_json(
        path / "run.json",
        {
            "schema_version": SCHEMA_VERSION,
            "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "git": _git_revision(),
            "models": models,
            "prompts": {"rows": len(prompts), "dropped": dropped, "sha256": sha256, "source_sha256": source},
        },
    )


def _git_revision() -> str | None:
    """Return the revision of the working directory, where it is a git checkout."""
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
