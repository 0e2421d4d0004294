"""TODO."""

import typing
from collections.abc import Iterable, Mapping
from typing import Any

from opdctl.errors import did_you_mean
from opdctl.losses.objectives import PolicyGradient
from opdctl.recipe.components import build_objective
from opdctl.recipe.schema import AUTO, DEFAULT_COMPONENTS, TEACHER_NAME_PATTERN, Recipe, Section, is_data_file
from opdctl.registry import BENCHMARKS, ENGINES, OBJECTIVES, WEIGHTS


def format_error(detail: dict[str, Any]) -> tuple[str, str]:
    """Turn one of pydantic's errors into (dotted key, text)."""
    loc = [str(part) for part in detail["loc"]]
    key = ".".join(loc)
    match detail["type"]:
        case "extra_forbidden":
            return key, f"unknown key{did_you_mean(loc[-1], _fields(loc[:-1]))}"
        case "missing":
            return key, "is required"
        case "literal_error":
            return key, f"must be {detail['ctx']['expected']}, got {detail['input']!r}"
        case "string_pattern_mismatch" if loc[-1] == "server":  # not shown: it may have a password in it
            return key, "must be an address such as http://host:8000/v1, without a password or query; see [server]"
        case "string_pattern_mismatch":
            return key, f"must be letters, digits, `.`, `_` or `-`, got {detail['input']!r}"
        case "int_type" | "int_from_float":
            return key, f"must be an integer, got {detail['input']!r}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return key, f"must be a table of settings, got {detail['input']!r}"
        case _:
            text = detail["msg"].replace("Input should be", "must be").replace("a valid", "a")
            return key, f"{text}, got {detail['input']!r}"


def _fields(loc: Iterable[str]) -> list[str]:
    """Return the keys of the section that `loc` leads to."""
    kind: Any = Recipe
    for name in loc:
        kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else kind.model_fields[name].annotation
        sections = [each for each in typing.get_args(kind) if isinstance(each, type) and issubclass(each, Section)]
        if sections and typing.get_origin(kind) is not dict:
            (kind,) = sections  # an optional section
    return list(kind.model_fields)


def component_errors(merged: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Build every component that the recipe names, so that a typo fails before any model loads."""
    problems = []
    if ("teacher" in merged) == bool(merged.get("teachers")):
        what = "not beside [teachers]: give one or the other" if "teacher" in merged else "is required, or [teachers]"
        problems.append(("teacher", what))
    components = [("weight", WEIGHTS, merged.get("weight", {})), ("objective", OBJECTIVES, merged.get("objective", {}))]
    components += [("weight.times", WEIGHTS, _get(merged, "weight", "times"))]
    for section, registry, given in components:
        if isinstance(given, dict) and isinstance(name := given.get("name", DEFAULT_COMPONENTS[section] or None), str):
            not_its_own = ("name", "times") if section == "weight" else ("name",)
            found = registry.problems(name, {k: v for k, v in given.items() if k not in not_its_own})
            problems += [(f"{section}.{key}".rstrip("."), text) for key, text in found]
    engines = {key: _get(merged, key, "engine") for key in ("rollout", "score")}
    names = [(f"{key}.engine", ENGINES, [name]) for key, name in engines.items() if name != AUTO]
    names += [("eval.bench", BENCHMARKS, _get(merged, "eval", "bench"))]
    for key, registry, values in names:
        for value in values if isinstance(values, list) else []:
            if isinstance(value, str) and value not in registry.names() and not is_data_file(value):
                problems.append((key, f"unknown {registry.kind} `{value}`{did_you_mean(value, registry.names())}"))
    return problems


def _get(merged: Mapping[str, Any], section: str, key: str) -> Any:
    found = merged.get(section)
    return found.get(key) if isinstance(found, dict) else None


def combination_errors(recipe: Recipe) -> list[tuple[str, str]]:
    problems = []
    if recipe.rollout.num_parts > recipe.responses_per_step():
        problems.append(
            ("rollout.num_parts", f"{recipe.rollout.num_parts} parts for {recipe.responses_per_step()} responses")
        )
    if recipe.prompts.limit is not None and recipe.prompts.limit < recipe.rollout.prompts_per_step:
        problems.append(
            ("prompts.limit", f"{recipe.prompts.limit} is less than one step's {recipe.rollout.prompts_per_step}")
        )
    if recipe.prompts.source.startswith("toy:") and recipe.prompts.limit is None:
        problems.append(("prompts.limit", "is required: the embedded task has no end"))
    problems += _teacher_errors(recipe)
    if not all(0 <= beta < 1 for beta in recipe.train.betas):
        problems.append(("train.betas", f"must lie in [0, 1), got {recipe.train.betas}"))
    decay, warmup = recipe.train.decay_steps, recipe.train.warmup_steps
    if recipe.train.lr_scheduler_type != "constant" and (decay is None or decay <= warmup):
        problems.append(("train.decay_steps", f"a falling learning rate needs one above train.warmup_steps, {warmup}"))
    if recipe.eval.every_steps and not recipe.eval.allow_code_execution:
        text = (
            "runs code that the student wrote, while training: set eval.allow_code_execution, or eval.every_steps = 0"
        )
        problems += [("eval.bench", f"`{name}` {text}") for name in recipe.eval.bench if _benchmark_runs_code(name)]
    if recipe.eval.temperature == 0 and recipe.eval.samples not in (None, 1):
        problems.append(("eval.samples", "at temperature 0 all samples are the same: leave it out, or set it to 1"))
    if recipe.rollout.temperature != 1 or recipe.rollout.top_p != 1:
        problems.append(
            ("rollout", "on-policy distillation samples the student itself: temperature and top_p must be 1")
        )
    if recipe.pipeline.max_staleness and not _corrects_rollouts(recipe):
        text = f"objective `{recipe.objective.name}` has no rollout correction; `policy_gradient` and its variants have"
        problems.append(("pipeline.max_staleness", text))
    return problems


def _corrects_rollouts(recipe: Recipe) -> bool:
    """Whether the objective corrects for responses of an older student; one that does not exist has its own error."""
    given = recipe.objective
    return bool(OBJECTIVES.problems(given.name, given.params)) or isinstance(build_objective(recipe), PolicyGradient)


def _benchmark_runs_code(bench: str) -> bool:
    return bench in BENCHMARKS.names() and BENCHMARKS.get(bench)().grader.runs_code


def _teacher_errors(recipe: Recipe) -> list[tuple[str, str]]:
    problems = []
    for name in recipe.teachers:
        if not TEACHER_NAME_PATTERN.fullmatch(name):
            problems.append((f"teachers.{name}", "a name must be letters, digits, `_` or `-`"))
    if bool(recipe.teachers) != (recipe.prompts.teacher_column is not None):
        text = "names the column that says which of [teachers] is a prompt's own: give both or neither"
        problems.append(("prompts.teacher_column", text))
    if recipe.train.extrapolation != 1 and recipe.reference is None:
        problems.append(("train.extrapolation", f"{recipe.train.extrapolation} needs a [reference] model"))
    known = not OBJECTIVES.problems(recipe.objective.name, recipe.objective.params)
    if recipe.train.extrapolation != 1 and known and build_objective(recipe).support != "sampled":
        problems.append(("train.extrapolation", f"objective `{recipe.objective.name}` knows no reference model"))
    return problems
