"""Validation of a recipe beyond its schema: every error as (key, text), so that all are reported at once."""

import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opdctl.errors import did_you_mean
from opdctl.losses.objectives import Objective, PolicyGradient, Power
from opdctl.recipe.components import build_objective
from opdctl.recipe.conditions import parse_condition
from opdctl.recipe.data_names import is_local, is_named_by_data
from opdctl.recipe.prompts import SOURCE_OPTIONS, MixedSource, PromptSource, source_key
from opdctl.recipe.schema import (
    AUTO,
    DEFAULT_COMPONENTS,
    END_OF_THINKING,
    MIN_TEMPERATURE,
    TEACHER_NAME_PATTERN,
    Component,
    Eval,
    Recipe,
    WeightSettings,
    model_key,
)
from opdctl.recipe.section import Section
from opdctl.registry import BENCHMARKS, ENGINES, OBJECTIVES, WEIGHTS, Registry

Errors = list[tuple[str, str]]
MAX_VALUE_CHARS = 200
"""Of a value in an error."""
PASSWORD = re.compile(r"://[^\s/]*@")
"""In an address."""


def format_error(detail: Mapping[str, Any]) -> tuple[str, str]:
    """Return the (key, text) of an error of pydantic."""
    loc = [str(part) for part in detail["loc"]]
    key, value = ".".join(loc), PASSWORD.sub("://***@", repr(detail["input"]))
    value = value if len(value) <= MAX_VALUE_CHARS else f"{value[:MAX_VALUE_CHARS]}…"
    match detail["type"]:
        case "extra_forbidden":
            return key, f"unknown key{did_you_mean(loc[-1], _fields(loc[:-1]))}"
        case "missing":
            return key, "is required"
        case "literal_error":
            return key, f"must be {detail['ctx']['expected']}, got {value}"
        # Two values that are not printed, because they may contain a secret.
        case "string_pattern_mismatch" if loc[-1] == "server":
            address = "an address such as http://host:8000/v1, without a password or query"
            return key, f"must be {address}: an API key is in the environment variable that server.api_key_env names"
        case "string_pattern_mismatch" if loc[-1] == "api_key_env":
            return key, "must be the name of an environment variable, such as OPDCTL_API_KEY, and not the key itself"
        case "string_pattern_mismatch" if loc[-1] == "environment":
            return key, f'must be "module:function", got {value}'
        case "string_pattern_mismatch":
            return key, f"must consist of letters, digits, `.`, `_` and `-`, got {value}"
        case "int_type" | "int_from_float":
            return key, f"must be an integer, got {value}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return key, f"must be a table of settings, got {value}"
        case _:
            reason = detail["msg"].replace("Input should be", "must be").replace("a valid", "a")
            return key, f"{reason}, got {value}"


def _fields(loc: Iterable[str]) -> list[str]:
    """Return the keys of the section at a location in the recipe."""
    annotation: Any = Recipe
    for name in loc:
        if typing.get_origin(annotation) is dict:
            annotation = typing.get_args(annotation)[1]
        else:
            annotation = annotation.model_fields[name].annotation
        sections = [arg for arg in typing.get_args(annotation) if isinstance(arg, type) and issubclass(arg, Section)]
        if sections and typing.get_origin(annotation) is not dict:
            (annotation,) = sections  # an optional section
    return list(annotation.model_fields)


# ── Names and parameters of components, before the recipe is known to match the schema ───────────────────────────────


def component_errors(merged: Mapping[str, Any], *, accept_unknown: bool = False) -> Errors:
    """Validate the names and parameters of components, so that a typo is reported before any model is loaded.

    accept_unknown: a name that is not registered may be that of a plugin.
    """
    errors = []
    if "teacher" in merged and merged.get("teachers"):
        errors.append(("teacher", "[teacher] and [teachers] are mutually exclusive"))
    elif "teacher" not in merged and not merged.get("teachers"):
        errors.append(("teacher", "is required, or [teachers]"))
    return [*errors, *_parameter_errors(merged, accept_unknown), *([] if accept_unknown else _name_errors(merged))]


def _parameter_errors(merged: Mapping[str, Any], accept_unknown: bool) -> Errors:
    errors = []
    sections: list[tuple[str, Registry[Any], Any]] = [
        ("weight", WEIGHTS, merged.get("weight", {})),
        ("objective", OBJECTIVES, merged.get("objective", {})),
        ("weight.times", WEIGHTS, _get(merged, "weight", "times")),
    ]
    for section, registry, values in sections:
        if not isinstance(values, dict):
            continue
        name = values.get("name", DEFAULT_COMPONENTS[section] or None)
        if isinstance(name, str) and not (accept_unknown and name not in registry.names()):
            other_keys = WeightSettings.model_fields if section == "weight" else Component.model_fields
            params = {key: value for key, value in values.items() if key not in other_keys}
            errors += [(f"{section}.{key}".rstrip("."), text) for key, text in registry.validate(name, params)]
    return errors


def _name_errors(merged: Mapping[str, Any]) -> Errors:
    """Validate the names of engines and benchmarks."""
    errors = []
    engines = {f"{section}.engine": _get(merged, section, "engine") for section in ("rollout", "score")}
    names: list[tuple[str, Registry[Any], Any]] = [
        (key, ENGINES, [name]) for key, name in engines.items() if name != AUTO
    ]
    names += [("eval.bench", BENCHMARKS, _get(merged, "eval", "bench"))]
    for key, registry, values in names:
        for value in values if isinstance(values, list) else []:
            if isinstance(value, str) and value not in registry.names() and not is_named_by_data(value):
                errors.append((key, f"unknown {registry.kind} `{value}`{did_you_mean(value, registry.names())}"))
    return errors


def _get(merged: Mapping[str, Any], section: str, key: str) -> Any:
    values = merged.get(section)
    return values.get(key) if isinstance(values, dict) else None


# ── Combinations of settings ─────────────────────────────────────────────────────────────────────────────────────────


def combination_errors(recipe: Recipe) -> Errors:
    """Validate settings that are valid by themselves and not together."""
    checks = (
        _path_errors,
        _prompt_errors,
        _sampling_errors,
        _environment_errors,
        _teacher_errors,
        _train_errors,
        _eval_errors,
        _continuation_errors,
    )
    return [error for check in checks for error in check(recipe)]


def _path_errors(recipe: Recipe) -> Errors:
    """Validate what may be a path: the system rejects some before it looks for them."""
    values = [(f"{model_key(name)}.model", model.model) for name, model in recipe.models().items()]
    values += [(f"{key}.source", path) for key, part in _prompt_sources(recipe) for path in part.paths]
    values += [("eval.bench", name) for name in recipe.eval.bench]
    values += [("eval.few_shot_file", recipe.eval.few_shot_file)] if recipe.eval.few_shot_file else []
    errors = []
    for key, value in values:
        try:
            Path(value).expanduser().exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long; the home of an unknown user
            reason = error.strerror if isinstance(error, OSError) else str(error)
            errors.append((key, f"is no valid name of a file: {reason}"))
    return errors


def _prompt_sources(recipe: Recipe) -> list[tuple[str, PromptSource]]:
    """Return the key and the settings of each source of prompts."""
    return [(source_key(name), part) for name, part in recipe.prompts.parts().items()]


def _prompt_errors(recipe: Recipe) -> Errors:
    prompts, per_step = recipe.prompts, recipe.rollout.prompts_per_step
    errors = [error for key, part in _prompt_sources(recipe) for error in _source_errors(key, part)]
    if prompts.num_rows is not None and prompts.num_rows < per_step:
        text = f"{prompts.num_rows} is less than rollout.prompts_per_step, {per_step}"
        errors.append(("prompts.limit", text))
    if prompts.held_out and any(part.tools_column for part in prompts.parts().values()):
        errors.append(("prompts.held_out", "is not supported with prompts.tools_column: evaluations have no tools"))
    if invalid := [name for name in prompts.sources if not TEACHER_NAME_PATTERN.fullmatch(name)]:
        errors.append((source_key(invalid[0]), "the name must consist of letters, digits, `_` and `-`"))
    weights = {name: source.weight for name, source in prompts.sources.items()}
    if missing := [name for name, weight in weights.items() if weight is None and any(weights.values())]:
        errors.append((f"{source_key(missing[0])}.weight", "is required: other sources have a weight"))
    elif 0 in (shares := prompts.split_step(per_step)).values():
        name = next(name for name, count in shares.items() if not count)
        text = f"gives no prompt of {per_step}: raise it, or rollout.prompts_per_step"
        errors.append((f"{source_key(name)}.weight", text))
    return errors


def _source_errors(key: str, source: PromptSource) -> Errors:
    errors = []
    if not source.paths or "" in source.paths:
        errors.append((f"{key}.source", "is required"))
    if source.is_toy and source.limit is None:
        errors.append((f"{key}.limit", "is required: a toy task is an infinite stream"))
    for name in SOURCE_OPTIONS if source.is_toy or is_local(source.source) else ():
        if getattr(source, name) is not None:
            errors.append((f"{key}.{name}", f"is for a hub data set, and not for `{source.location}`"))
    for column, condition in source.where.items():
        try:
            parse_condition(condition)
        except ValueError as error:
            errors.append((f"{key}.where.{column}", str(error)))
    return errors


def _sampling_errors(recipe: Recipe) -> Errors:
    errors = []
    rollout = recipe.rollout
    if rollout.num_parts > recipe.responses_per_step():
        text = f"{rollout.num_parts} exceeds the number of responses of a step, {recipe.responses_per_step()}"
        errors.append(("rollout.num_parts", text))
    if rollout.temperature < MIN_TEMPERATURE:
        errors.append(("rollout.temperature", f"must be at least {MIN_TEMPERATURE}, got {rollout.temperature:g}"))
    if rollout.modifications and rollout.engine == "server":
        text = "a server does not return two log-probs of a token: use another rollout.engine"
        errors += [(f"rollout.{name}", text) for name in rollout.modifications]
    if rollout.routed_experts or recipe.train.router_replay:
        key = "train.router_replay" if recipe.train.router_replay else "rollout.routed_experts"
        if rollout.engine == "server":
            errors.append((key, "a server does not return the experts that it chose: use another rollout.engine"))
        if (rollout.engine, recipe.pipeline.device) == ("vllm", "cpu"):
            errors.append((key, "vLLM returns no experts on a CPU: use another rollout.engine"))
        if recipe.vllm.pipeline_parallel_size > 1:
            errors.append((key, "vLLM returns no experts with vllm.pipeline_parallel_size above 1"))
    return errors


def _environment_errors(recipe: Recipe) -> Errors:
    """Validate what trajectories of an environment cannot have."""
    rollout = recipe.rollout
    if not rollout.environment:
        return []
    errors = []
    if rollout.engine == "server":
        text = "is not supported with the engine `server`, whose weights are fixed: use another rollout.engine"
        errors.append(("rollout.environment", text))
    if rollout.routed_experts or recipe.train.router_replay:
        key = "train.router_replay" if recipe.train.router_replay else "rollout.routed_experts"
        errors.append((key, "is not supported with rollout.environment"))
    if any(recipe.has_teacher_prompts(name) for name in recipe.teacher_models()):
        text = "is not supported with a teacher that reads other prompts: the environment writes the prompts"
        errors.append(("rollout.environment", text))
    return errors


def _teacher_errors(recipe: Recipe) -> Errors:
    errors = []
    for name in recipe.teachers:
        if not TEACHER_NAME_PATTERN.fullmatch(name):
            errors.append((f"teachers.{name}", "the name must consist of letters, digits, `_` and `-`"))
    for key, source in _prompt_sources(recipe):
        teacher = source.teacher if isinstance(source, MixedSource) else None
        if recipe.teachers and source.teacher_column is None and teacher is None:
            text = "is required with [teachers]: the column with each prompt's teacher"
            errors.append((f"{key}.teacher_column", text))
        if not recipe.teachers and source.teacher_column is not None:
            errors.append((f"{key}.teacher_column", "requires [teachers]"))
        if teacher is not None and teacher not in recipe.teachers:
            errors.append((f"{key}.teacher", f"no teacher `{teacher}`{did_you_mean(teacher, recipe.teachers)}"))
        if teacher is not None and source.teacher_column is not None:
            errors.append((f"{key}.teacher", "and teacher_column are mutually exclusive"))
    if recipe.train.extrapolation != 1:
        objective = _valid_objective(recipe)
        if objective is not None and objective.support != "sampled":
            text = f"objective `{recipe.objective.name}` does not support a reference model"
            errors.append(("train.extrapolation", text))
        if isinstance(objective, Power):
            text = f"objective `{recipe.objective.name}` does not support it: an extrapolated log-prob can exceed 0"
            errors.append(("train.extrapolation", text))
    elif recipe.weight.modulates == "extrapolation":
        errors.append(("weight.modulates", "`extrapolation` requires train.extrapolation other than 1"))
    return errors


def _train_errors(recipe: Recipe) -> Errors:
    errors = []
    train = recipe.train
    if not all(0 <= beta < 1 for beta in train.betas):
        errors.append(("train.betas", f"must be in [0, 1), got {train.betas}"))
    if train.lr_scheduler_type != "constant" and (train.decay_steps is None or train.decay_steps <= train.warmup_steps):
        text = f"must exceed train.warmup_steps ({train.warmup_steps}) for a decaying learning rate"
        errors.append(("train.decay_steps", text))
    if train.checkpoint_every_n_layers > 1 and not train.gradient_checkpointing:
        errors.append(("train.checkpoint_every_n_layers", "requires train.gradient_checkpointing"))
    if train.master_dtype == "bfloat16" and (recipe.student.dtype != "bfloat16" or recipe.lora.rank):
        errors.append(("train.master_dtype", '`bfloat16` requires student.dtype = "bfloat16" and lora.rank = 0'))
    if recipe.vllm.enable_lora and not recipe.lora.rank:
        errors.append(("vllm.enable_lora", "requires a LoRA adapter: lora.rank must be positive"))
    if recipe.vllm.enable_lora and recipe.lora.modules_to_save:
        errors.append(("vllm.enable_lora", "requires lora.modules_to_save = []: vLLM loads adapters only"))
    return [*errors, *_correction_errors(recipe)]


def _correction_errors(recipe: Recipe) -> Errors:
    """Validate settings by which another distribution than the student's own is sampled."""
    objective = _valid_objective(recipe)
    if objective is None or isinstance(objective, PolicyGradient):
        return []
    text = f"objective `{recipe.objective.name}` has no rollout correction; use `policy_gradient` or a variant"
    stale = [("pipeline.max_staleness", text)] if recipe.pipeline.max_staleness else []
    why = "the student's own distribution is not sampled, and"
    return [*stale, *((f"rollout.{name}", f"{why} {text}") for name in recipe.rollout.modifications)]


def _valid_objective(recipe: Recipe) -> Objective | None:
    """Return the objective, or None if it is invalid, which `component_errors` reports."""
    is_invalid = OBJECTIVES.validate(recipe.objective.name, recipe.objective.params)
    return None if is_invalid else build_objective(recipe)


def _eval_errors(recipe: Recipe) -> Errors:
    errors = []
    settings = recipe.eval
    if settings.every_steps and not settings.allow_code_execution:
        text = "runs code from the student during training: set eval.allow_code_execution, or eval.every_steps = 0"
        errors += [("eval.bench", f"`{name}` {text}") for name in settings.bench if _benchmark_runs_code(name)]
    if 0 < settings.temperature < MIN_TEMPERATURE:
        text = f"must be 0 or at least {MIN_TEMPERATURE}, got {settings.temperature:g}; 0 is greedy decoding"
        errors.append(("eval.temperature", text))
    if settings.temperature == 0 and settings.samples not in (None, 1):
        errors.append(("eval.samples", "must be 1 or unset at temperature 0, where all samples are identical"))
    if settings.few_shot and settings.few_shot_file is None:
        errors.append(("eval.few_shot_file", "is required by eval.few_shot"))
    if settings.few_shot_file is not None and not settings.few_shot:
        errors.append(("eval.few_shot_file", "requires eval.few_shot, the number of examples"))
    return [*errors, *_thinking_errors(settings)]


def _thinking_errors(settings: Eval) -> Errors:
    """Validate what a budget of thinking needs: it makes two requests for a response."""
    if settings.max_thinking_tokens is None:
        return []
    names = ("presence_penalty", "frequency_penalty", "stop")
    text = "concerns all tokens of a response, and eval.max_thinking_tokens samples them by two requests: remove one"
    errors = [(f"eval.{name}", text) for name in names if name in settings.changes]
    if settings.max_thinking_tokens >= settings.max_tokens:
        text = f"{settings.max_thinking_tokens} is not less than eval.max_tokens, {settings.max_tokens}"
        errors.append(("eval.max_thinking_tokens", text))
    if settings.end_thinking.count(END_OF_THINKING) != 1:
        errors.append(("eval.end_thinking", f"must contain `{END_OF_THINKING}` once"))
    return errors


def _benchmark_runs_code(bench: str) -> bool:
    return bench in BENCHMARKS.names() and BENCHMARKS.get(bench)().grader.runs_code


def _continuation_errors(recipe: Recipe) -> Errors:
    settings = recipe.continuations
    has_prefixes = settings.prefix_percents or settings.prefix_tokens
    return [] if has_prefixes else [("continuations.prefix_percents", "or prefix_tokens must contain a length")]
