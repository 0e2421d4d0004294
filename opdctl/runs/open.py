"""TODO."""

import importlib.metadata
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.artifacts import files, tables
from opdctl.artifacts.records import SCHEMA_VERSION, Prompt
from opdctl.data.prompts import Problem, load_problems, tokenize
from opdctl.environment import has_vllm
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir, check_same_tokenizer, find_or_download
from opdctl.recipe.schema import AUTO, Model, Recipe, is_data_file, model_key
from opdctl.runs.compatibility import check_same_recipe
from opdctl.runs.layout import run_path
from opdctl.runs.run import Run, _load_recorded, read_recipe, read_run_record

LIBRARIES = ("opdctl", "torch", "transformers", "numpy", "pyarrow", "safetensors", "tokenizers")


def resolve_auto_engines(recipe: Recipe, path: Path, sections: Sequence[str] = ("rollout", "score")) -> Recipe:
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
                console.info(f"{section}.engine: auto is `{name}` here")
    return recipe.model_copy(update=update)


def open_run(
    recipe: Recipe, output: Path | None = None, *, needs: Collection[str] | None = None, record: bool = True
) -> Run:
    """Open the run directory of `recipe`, or begin it.

    needs: the models that must be at hand, all if None; a begun run's others are taken as recorded. record: write
    settings that may change down. Raises OpdctlError: 2 for a missing model or tokenizers that differ, 3 for bad
    prompts, 4 when the run was begun with another recipe or other models, 5 when a hub is out of reach.
    """
    path = run_path(recipe, output)
    recipe = resolve_auto_engines(recipe, path)
    _create_once(recipe, path)
    check_same_recipe(recipe, path)
    if record:
        _check_source(recipe, path)
    if record and files.read_text(path / "recipe.toml") != recipe.to_toml():
        files.write_text(path / "recipe.toml", recipe.to_toml())
    run = _load_recorded(recipe, path)
    needed = [name for name in run.models if needs is None or name in needs]
    run = replace(run, models={**run.models, **{name: _relocate_model(run, name) for name in needed}})
    for name in needed:
        _check_model(path, name, run.models[name])
        _warn_of_code(recipe.models()[name])
    for folder in (path, path / "student", path / "trainer", run.step_path(run.current_step())):
        files.remove_temporary_files(folder)
    return run


def _relocate_model(run: Run, name: str) -> ModelDir:
    """Return where a model lies: as recorded, or where this machine has what is known by a name, not by a path."""
    model, settings = run.models[name], run.recipe.models()[name]
    if model.path.is_dir() or Path(settings.model).is_absolute():
        return model
    return replace(model, path=find_or_download(settings, f"{model_key(name)}.model"))


def _check_source(recipe: Recipe, path: Path) -> None:
    """Raise OpdctlError (code 4) where the file that the prompts came from is there, and is another one by now."""
    recorded, source = read_run_record(path)["prompts"]["source_sha256"], Path(recipe.prompts.source)
    if recorded and source.is_file() and files.sha256_file(source) != recorded:
        raise OpdctlError(
            f"{path}: {source} is not what it was when this run took its prompts from it",
            hint="restore it, or use another --output for the new prompts; removed, it is not missed",
            code=ExitCode.RECIPE_MISMATCH,
        )


def _check_model(path: Path, name: str, model: ModelDir) -> None:
    """Raise OpdctlError (code 4) unless a model's files are those that the run began with."""
    recorded = read_run_record(path)["models"][name]
    # Files with the recorded sizes and times are not hashed again.
    if not model.path.is_dir() or (
        _file_stats(model) != recorded["file_stats"] and model.digest() != recorded["digest"]
    ):
        raise OpdctlError(
            f"{path}: the {name} at {model.path} is not the one this run began with",
            hint="restore it, or use another --output",
            code=ExitCode.RECIPE_MISMATCH,
        )


def check_output_dir(recipe: Recipe, path: Path) -> None:
    """Raise OpdctlError unless `path` is a folder, or can be one, that holds nothing but the start of this very run."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            what = "is" if part == path else f"{part} is"
            raise OpdctlError(f"{path}: {what} a file, not a folder", hint="use another --output")
    own, recorded = {"recipe.toml", "prompts.parquet"}, path / "recipe.toml"
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} if path.is_dir() else set()
    if found - own or (recorded.exists() and files.read_text(recorded) != recipe.to_toml()):
        raise OpdctlError(f"{path}: is not empty and is no run directory", hint="use another --output")


def standalone_eval_run(recipe: Recipe, path: Path) -> Run:
    """Return what an evaluation in `path` needs of a run where there is none: the model is no part of it."""
    return Run(resolve_auto_engines(recipe, path, ("rollout",)), path, {}, {})


def find_model(model: Model, key: str) -> ModelDir:
    """Return where a model lies and how to load it; `key` names it in errors. Raises OpdctlError as `locate` does."""
    _warn_of_code(model)
    return ModelDir(find_or_download(model, key), model.dtype, model.trust_remote_code)


def _warn_of_code(model: Model) -> None:
    if model.trust_remote_code:
        console.warn(f"trust_remote_code is on: code that comes with {model.model} will run")


def _model_record(model: ModelDir) -> dict[str, Any]:
    """Return what run.json says of a model."""
    names = {"path": str(model.path), "digest": model.digest(), "tokenizer": model.tokenizer_digest}
    return {**names, "file_stats": _file_stats(model)}


def _file_stats(model: ModelDir) -> dict[str, list[int]]:
    """Return size and time of each file of a model."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in model.files()}


def prepare_prompts(recipe: Recipe, problems: list[Problem], student: ModelDir) -> tuple[list[Prompt], int]:
    """Return the prompts as token ids and how many were too long. Raises OpdctlError (code 3) when too few are left."""
    prompts, dropped = tokenize(problems, student.tokenizer, recipe.prompts, list(recipe.teacher_models()))
    if len(prompts) < recipe.rollout.prompts_per_step:
        raise OpdctlError(
            f"{recipe.prompts.source}: {len(prompts)} prompts are fewer than rollout.prompts_per_step = "
            f"{recipe.rollout.prompts_per_step}",
            hint="lower rollout.prompts_per_step, or give more prompts",
            code=ExitCode.BAD_DATA,
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


def _create_once(recipe: Recipe, path: Path) -> None:
    """Begin the run if it is not begun. Workers that do so at the same time write the same files, each whole."""
    if (path / "run.json").exists():
        return
    try:
        check_output_dir(recipe, path)
    except OpdctlError:
        if (path / "run.json").exists():
            return  # another worker was faster, and is at work already
        raise
    _create(recipe, path)


def _create(recipe: Recipe, path: Path) -> None:
    found = {
        name: ModelDir(find_or_download(model, f"{model_key(name)}.model"), model.dtype, model.trust_remote_code)
        for name, model in recipe.models().items()
    }
    student = found["student"]
    for name in recipe.scorers():
        check_same_tokenizer(student, found[name], name)
    check_top_k(recipe, student)
    for name, model in found.items():
        if (rows := model.num_embeddings()) > student.vocab_size:
            console.info(
                f"{name}: of {rows} rows of its output matrix the tokenizer knows {student.vocab_size}; the others "
                "are masked"
            )
    problems = load_problems(recipe.prompts)
    prompts, dropped = prepare_prompts(recipe, problems, student)
    if dropped:
        console.warn(f"{dropped} of {len(problems)} prompts are longer than prompts.max_tokens and were dropped")
    models = {name: _model_record(model) for name, model in found.items()}
    for name in recipe.teacher_models():
        if models[name]["digest"] == models["student"]["digest"] and not recipe.prompts.teacher_prompt_column:
            console.warn(
                f"student and {name} are one and the same model: A is 0 on every token until the student changes"
            )
    order = np.random.default_rng(recipe.seed).permutation(len(prompts))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, PermissionError) as error:
        raise OpdctlError(f"{path}: cannot be made: {error.strerror}", hint="use another --output") from None
    files.write_text(path / "recipe.toml", recipe.to_toml())
    sha256 = tables.write_prompts(path / "prompts.parquet", [prompts[i] for i in order])
    source = files.sha256_file(Path(recipe.prompts.source)) if is_data_file(recipe.prompts.source) else None
    files.write_json(
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
