"""The models of a recipe: found or downloaded, inspected, and checked against one another and against the lengths."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from opdctl import console
from opdctl.artifacts.records import Prompt
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, check_same_tokenizer, find_local, find_or_download, warn_of_other_eos
from opdctl.models.end_of_sequence import describe_tokens
from opdctl.recipe.schema import Model, Recipe, model_key

HubFiles = Literal["all", "settings", "none"]
"""What is downloaded of a hub model: all files, config and tokenizer only, or nothing: the model is omitted then."""


def find_model(recipe: Recipe, model: Model, key: str, engine: str, hub_files: HubFiles = "all") -> ModelDir:
    """Return the directory of a model that is not part of a run, after inspecting it.

    key: of its name, for errors. engine: that loads it.

    Raises:
        OpdctlError: the model is missing or unusable, or the hub is unavailable.
    """
    warn_of_code(model)
    directory = ModelDir.from_recipe(find_or_download(model, key, weights=hub_files == "all"), model, recipe)
    print_lines(_describe(Path(model.model).name, model, directory, engine, hub_files))
    return directory


def prepare_models(recipe: Recipe, hub_files: HubFiles = "all") -> tuple[dict[str, ModelDir], list[str]]:
    """Return the models of a recipe by name, inspected and checked against one another, and lines that describe them.

    The weights of a model that has none, because they were not downloaded, are not inspected.

    Raises:
        OpdctlError: a model is missing or unusable, the tokenizers differ, or the hub is unavailable.
    """
    find = find_local if hub_files == "none" else partial(find_or_download, weights=hub_files == "all")
    for settings in recipe.models().values():
        warn_of_code(settings)
    paths = {name: find(model, f"{model_key(name)}.model") for name, model in recipe.models().items()}
    models = {name: ModelDir.from_recipe(path, recipe.models()[name], recipe) for name, path in paths.items() if path}
    lines = []
    for name, model in models.items():
        lines += _describe(name, recipe.models()[name], model, _loading_engine(recipe, name), hub_files)
    if "student" not in models:
        return models, lines
    for name in [name for name in recipe.scorers() if name in models]:
        check_same_tokenizer(models["student"], models[name], name)
    for name in [name for name in recipe.teacher_models() if name in models]:
        warn_of_other_eos(models["student"], models[name], name)
    vocab_size = min(model.vocab_size for model in models.values())
    if unused := models["student"].num_ids - vocab_size:
        lines.append(f"{unused} ids of the tokenizer have no row in every model: they are masked")
    models = {name: model.with_vocab_size(vocab_size) for name, model in models.items()}
    check_top_k(recipe, models["student"])
    return models, lines


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        console.info(line)


def _loading_engine(recipe: Recipe, name: str) -> str:
    """Return the engine that loads a model; the trainer loads the student by transformers whatever the engine."""
    return "transformers" if name == "student" else recipe.score.engine


def _describe(name: str, settings: Model, model: ModelDir, engine: str, hub_files: HubFiles) -> list[str]:
    """Inspect a model unless its weights were not downloaded, and return lines that describe it."""
    if hub_files == "settings" and not model.weights.files and find_local(settings, name) is None:
        return [f"{name}: {model.path}: its weights are not on this machine, and were not checked"]
    return _inspect(name, model, engine)


def _inspect(name: str, model: ModelDir, engine: str) -> list[str]:
    """Inspect a model, and return lines that describe what was found."""
    from opdctl.models.inspection import inspect_model

    if engine == "server":
        return [f"{name}: served; tokenizer of {model.num_ids} ids in {model.path}"]
    found, weights = inspect_model(model, engine), model.weights
    if name == "student" and model.is_quantized:
        detail = f"student: {model.path}: quantized weights cannot be trained"
        raise OpdctlError("unsupported_model", detail, hint="use the model before its quantization")
    files = weights.files[0].name + (f" to {weights.files[-1].name}" if len(weights.files) > 1 else "")
    ignored = [file.name for file in weights.unused]
    ignored += [f"{len(found.ignored_tensors)} tensors outside the text model"] * bool(found.ignored_tensors)
    rows = f"{model.num_embeddings} rows" + " (those beyond are masked)" * (model.num_embeddings > model.vocab_size)
    ends = describe_tokens(model.named_eos_ids, model.tokenizer)
    dtypes = " and ".join(found.dtypes)
    return [
        f"{name}: {found.architecture}, {weights.num_parameters:,} parameters in {dtypes}, {model.path}",
        f"  weights: {files}" + (f"; ignored: {', '.join(ignored)}" if ignored else ""),
        f"  tokenizer: {type(model.tokenizer).__name__}, {model.num_ids} ids for {rows}; a response ends at {ends}",
    ]


def warn_of_code(model: Model) -> None:
    if model.trust_remote_code:
        console.warn(f"trust_remote_code is on: code in {model.model} will run")


def check_top_k(recipe: Recipe, student: ModelDir) -> None:
    """Check that top_k is smaller than the vocabulary. Raises OpdctlError if not."""
    for key, top_k in (("rollout.top_k", recipe.rollout.top_k), ("score.top_k", recipe.score.top_k)):
        if top_k >= student.vocab_size:
            raise OpdctlError(
                "unsupported_setting",
                f"{key} = {top_k}: the vocabulary has {student.vocab_size} tokens",
                hint='lower it, or use an objective on the full vocabulary with support = "full"',
            )


def check_lengths(recipe: Recipe, models: Mapping[str, ModelDir], prompts: Sequence[Prompt]) -> None:
    """Check that the longest prompt with the longest response fits into the positions of every model.

    Raises:
        OpdctlError: it does not fit into a model's table of positions, or into the student's rotary embedding.
    """
    from opdctl.models.architectures import check_rope

    for name, model in models.items():
        prompt_ids = [
            prompt.prompt_ids if name == "student" or prompt.teacher_prompt_ids is None else prompt.teacher_prompt_ids
            for prompt in prompts
        ]
        prompt_tokens = max(map(len, prompt_ids))
        if name == "student":
            check_rope(model.full_config, model.path, prompt_tokens, recipe.rollout.max_tokens)
        check_positions(model, prompt_tokens, recipe.rollout.max_tokens, "rollout.max_tokens")


def check_positions(model: ModelDir, prompt_tokens: int, max_tokens: int, key: str) -> None:
    """Check that prompts and responses of these lengths fit into the positions of a model. key: of `max_tokens`.

    Rotary positions continue beyond those of the training, with a warning.

    Raises:
        OpdctlError: they do not fit into a table of positions.
    """
    from opdctl.models.inspection import size_of_position_table

    limit = getattr(model.text_config, "max_position_embeddings", None)
    needed = prompt_tokens + max_tokens
    if not isinstance(limit, int) or needed <= limit:
        return
    detail = f"{model.path}: prompts of {prompt_tokens} + {key} = {max_tokens} tokens exceed its {limit} positions"
    if size_of_position_table(model) is not None:
        raise OpdctlError("unsupported_setting", detail, hint=f"lower {key}, or use shorter prompts")
    console.warn(f"{detail}, for which it was trained")
