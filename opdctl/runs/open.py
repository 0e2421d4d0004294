"""Create a run directory, or open one and check it against the recipe and the models.

A new run gets recipe.toml and prompts.parquet, then run.json, which marks it as complete. An existing run is compared
with what it recorded: a change that affects artifacts is an error.
"""

import importlib.metadata
import shlex
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.stage_dir import changed_settings
from opdctl.artifacts.versions import versioned
from opdctl.data.formats import read_chat_templates
from opdctl.environment import MAX_BFLOAT16_RATIO, bfloat16_time_ratio, has_vllm, resolve_device
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import AUTO, Recipe, model_key
from opdctl.runs.compatibility import check_same_recipe
from opdctl.runs.layout import HELD_OUT_FILE, PROMPTS_FILE, list_steps, run_path
from opdctl.runs.models import check_lengths, prepare_models, print_lines, warn_of_code
from opdctl.runs.prompts import (
    PromptSet,
    check_chat_templates,
    check_source_files,
    describe_prompts,
    read_kept_prompts,
    read_prompts,
    restore_prompts,
    store_prompts,
)
from opdctl.runs.run import Run, describe_environment, read_recipe, read_run_record

ReadPrompts = Callable[[Recipe, ModelDir], PromptSet]
LIBRARIES = ("opdctl", "torch", "transformers", "numpy", "pyarrow", "safetensors", "tokenizers")


# ── Opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_run(
    recipe: Recipe,
    output: Path | None = None,
    *,
    needs: Collection[str] | None = None,
    check_source: bool = True,
    imported_prompts: ReadPrompts | None = None,
) -> Run:
    """Open the run directory of `recipe`, or create it. Settings that may change are used, and not recorded.

    needs: the models whose files the command reads, all if None. check_source: check that the file of the prompts is
    unchanged. imported_prompts: the prompts of a new run whose recipe has the source `imported`.

    Raises:
        OpdctlError: a model or a tokenizer does not fit; prompts are invalid; the run was started with a different
        recipe
            or with different models; a hub is unavailable.
    """
    path = run_path(recipe, output)
    recipe = resolve_open_settings(recipe, path)
    is_new = _create_once(recipe, path, imported_prompts)
    run = check_run(recipe, path, needs, check_source=check_source)
    restore_prompts(run)
    for name in [name for name in run.models if not is_new and (needs is None or name in needs)]:
        warn_of_code(recipe.models()[name])
    for directory in (path, path / "student", path / "trainer", run.step_path(run.current_step())):
        files.remove_temporary_files(directory)
    return run


def check_run(recipe: Recipe, path: Path, needs: Collection[str] | None = None, *, check_source: bool = True) -> Run:
    """Return the run in `path` after the checks of `open_run` on an existing run. Nothing is written.

    Raises:
        OpdctlError: as `open_run` does.
    """
    check_same_recipe(recipe, path)
    if check_source:
        check_source_files(recipe, path)
        check_chat_templates(recipe, path)
    run = Run.from_record(recipe, path)
    return locate_models(run, [name for name in run.models if needs is None or name in needs])


def locate_models(run: Run, names: Collection[str]) -> Run:
    """Return the run with the paths that models have on this machine, after a check that they are the recorded ones.

    Raises:
        OpdctlError: a model is missing, or another one.
    """
    run = replace(run, models={**run.models, **{name: _relocate_model(run, name) for name in names}})
    for name in names:
        _check_model(run.path, name, run.models[name])
    return run


def record_settings(run: Run) -> None:
    """Write changed settings, which affect no artifact, to recipe.toml, and report each."""
    recipe = run.recipe
    for key, old, new in changed_settings(read_recipe(run.path).flat(), recipe.flat()):
        console.info(f"recipe.toml: {key} {old!r} → {new!r}")
    if files.read_text(run.path / "recipe.toml") != recipe.to_toml():
        files.write_text(run.path / "recipe.toml", recipe.to_toml())


def standalone_eval_run(recipe: Recipe, path: Path) -> Run:
    """Return the run of an evaluation in `path` that belongs to no training run.

    Raises:
        OpdctlError: its results are, or contain, a link or a special file.
    """
    files.check_no_symlinks(path / "eval")
    files.check_tree(path / "eval")
    return Run(resolve_open_settings(recipe, path, ("rollout",)), path, {}, {})


def resolve_open_settings(recipe: Recipe, path: Path, sections: Sequence[str] = ("rollout", "score")) -> Recipe:
    """Return the recipe with what it leaves open and the run in `path` was started with: an engine for each `auto`, the
    number of parts, dtypes, the column of the prompts, and the template arguments of evaluations.

    Of a new run engine and dtypes are the best on this machine, which is logged.
    """
    recorded = read_recipe(path) if (path / "recipe.toml").exists() else None
    update = {}
    if recorded and "num_parts" not in recipe.rollout.model_fields_set:
        num_parts = {"num_parts": recorded.rollout.num_parts}
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=num_parts)})
    if recorded:  # earlier versions recorded defaults of these keys
        for section, key in (("prompts", "prompt_column"), ("eval", "template_arguments")):
            if getattr(getattr(recipe, section), key) is None:
                settings = {key: getattr(getattr(recorded, section), key)}
                recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=settings)})
    for section in sections:
        settings = getattr(recipe, section)
        if settings.engine == AUTO:
            on_gpus = (recipe.pipeline.launcher, recipe.pipeline.device) == ("ray", "cuda")
            best = "vllm" if has_vllm(on_gpus=on_gpus) else "transformers"
            name = getattr(recorded, section).engine if recorded else best
            update[section] = settings.model_copy(update={"engine": name})
            if not recorded:
                console.info(f"{section}.engine: auto selects `{name}`")
    return _resolve_dtypes(recipe.model_copy(update=update), recorded)


def _resolve_dtypes(recipe: Recipe, recorded: Recipe | None) -> Recipe:
    """Return the recipe with the dtypes that it leaves open and the run was started with. A new run has float32 for the
    models of the engine transformers on a CPU without fast products of bfloat16 numbers, which is logged."""
    models = {name: model for name, model in recipe.models().items() if "dtype" not in model.model_fields_set}
    if recorded:
        earlier = recorded.models()
        return recipe.with_dtypes({name: earlier[name].dtype for name in models if name in earlier})
    engines = {name: recipe.rollout.engine if name == "student" else recipe.score.engine for name in models}
    names = [name for name in models if engines[name] == "transformers"]
    if recipe.train.master_dtype == "bfloat16" and "student" in names:  # which needs a student of the same dtype
        names.remove("student")
    if not names or recipe.pipeline.launcher == "ray" or resolve_device(recipe.pipeline.device) != "cpu":
        return recipe
    if (ratio := bfloat16_time_ratio()) <= MAX_BFLOAT16_RATIO:
        return recipe
    keys = ", ".join(f"{model_key(name)}.dtype" for name in names)
    console.info(f'{keys}: "float32", since bfloat16 products take {ratio:.0f} times as long on this CPU')
    return recipe.with_dtypes(dict.fromkeys(names, "float32"))


def _relocate_model(run: Run, name: str) -> ModelDir:
    """Return a model at its recorded path, or where this machine has the model of that name."""
    model, settings = run.models[name], run.recipe.models()[name]
    if model.path.is_dir() or Path(settings.model).is_absolute():
        return model
    return replace(model, path=find_or_download(settings, f"{model_key(name)}.model"))


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_model(path: Path, name: str, model: ModelDir) -> None:
    """Check that a model's files are those that the run was started with."""
    record = read_run_record(path)["models"][name]
    # Files with the recorded sizes and times need no new hash.
    is_same = model.path.is_dir() and (_file_stats(model) == record["file_stats"] or model.digest() == record["digest"])
    if not is_same:
        raise OpdctlError(
            "model_mismatch",
            f"{model.path}: not the {name} that the run {path} was started with",
            hint="restore the model, or use another --output",
        )


def check_output_dir(recipe: Recipe, path: Path) -> None:
    """Check that `path` can be the directory of a new run: it is empty, or holds this very run without its run.json.

    Raises:
        OpdctlError: it holds other files, or is a file.
    """
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise OpdctlError("unusable_output", f"{path}: {part} is a file", hint="use another --output")
    start, recorded = {"recipe.toml", PROMPTS_FILE, HELD_OUT_FILE}, path / "recipe.toml"
    present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} if path.is_dir() else set()
    is_same = recorded.exists() and _is_recorded_as(recipe, path)
    is_other = recorded.exists() and not is_same
    if is_other or (present - start and not (is_same and list_steps(path))):
        hint = f"run `opdctl train {shlex.quote(str(path))}`, or use another --output"
        raise OpdctlError(
            "unusable_output",
            f"{path} is not empty and not a run directory" + "; it has a recipe.toml of a run" * is_other,
            hint=hint if is_other else "use another --output",
        )


def _is_recorded_as(recipe: Recipe, path: Path) -> bool:
    """Whether recipe.toml is this recipe. It lacks the keys that were added after it was written."""
    if files.read_text(path / "recipe.toml") == recipe.to_toml():
        return True
    try:
        return read_recipe(path).to_toml() == recipe.to_toml()
    except OpdctlError:  # it is not that of a run
        return False


# ── Creation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _create_once(recipe: Recipe, path: Path, imported_prompts: ReadPrompts | None) -> bool:
    """Create the run if it does not exist, and return whether it was created. Workers that do so at the same time write
    the same complete files."""
    if (path / "run.json").exists():
        return False
    try:
        check_output_dir(recipe, path)
    except OpdctlError:
        if (path / "run.json").exists():
            return False  # another worker was faster
        raise
    _create(recipe, path, imported_prompts if recipe.prompts.is_imported else None)
    return True


def _create(recipe: Recipe, path: Path, imported_prompts: ReadPrompts | None) -> None:
    """Write the records of a new run, or those of a run whose run.json was lost: that one keeps its prompts."""
    environment = describe_environment(recipe)
    models, lines = prepare_models(recipe)
    kept = read_kept_prompts(path) if list_steps(path) else None
    templates = read_chat_templates(recipe)
    read = imported_prompts or partial(read_prompts, templates=templates)
    prompts = kept or read(recipe, models["student"])
    check_lengths(recipe, models, prompts.training)
    records = {name: _model_record(model) for name, model in models.items()}
    _warn_of_identical_models(recipe, records)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, PermissionError) as error:
        raise OpdctlError("unusable_output", f"{path}: {error.strerror}", hint="use another --output") from None
    print_lines(lines)
    files.write_text(path / "recipe.toml", recipe.to_toml())
    if not kept:
        store_prompts(path, prompts)
    record = {
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "git": _git_revision(),
        "models": records,
        "vocab_size": models["student"].vocab_size,
        "prompts": describe_prompts(recipe, path, prompts, templates),
        "recipe": recipe.to_toml(),
        **environment,
    }
    files.write_json(path / "run.json", versioned("run") | record)


def _warn_of_identical_models(recipe: Recipe, records: Mapping[str, Mapping[str, Any]]) -> None:
    for name in recipe.teacher_models():
        is_same = records[name]["digest"] == records["student"]["digest"]
        if is_same and not recipe.has_teacher_prompts(name):
            console.warn(f"student and {name} are identical: the advantage is 0 until the student changes")


def _model_record(model: ModelDir) -> dict[str, Any]:
    """Return the entry of a model in run.json."""
    record = {"path": str(model.path), "digest": model.digest(), "tokenizer": model.tokenizer_digest}
    stored = {"parameters": model.weights.num_parameters} if model.weights.files else {}
    return {**record, "file_stats": _file_stats(model), **stored}


def _file_stats(model: ModelDir) -> dict[str, list[int]]:
    """Return size in bytes and modification time in nanoseconds of each file of a model."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in model.files()}


def _git_revision() -> str | None:
    """Return the revision of the working directory, if it is a git checkout."""
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
