"""Loading a recipe: merge files and `--set`, import plugins, validate, and resolve defaults and paths."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from opdctl import console
from opdctl.artifacts import parsing
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.recipe.components import has_known_components, required_columns, unmet_requirements
from opdctl.recipe.data_names import is_data_file, is_named_by_data, is_pattern
from opdctl.recipe.dependencies import ADDED_PARAMETERS
from opdctl.recipe.prompts import SOURCE_OPTIONS, PromptSource
from opdctl.recipe.schema import (
    DEFAULT_COMPONENTS,
    DEFAULT_NAME,
    MAX_NAME_CHARS,
    MAX_PARTS,
    Component,
    Model,
    ObjectiveSettings,
    Recipe,
    Teacher,
    WeightSettings,
    model_key,
)
from opdctl.recipe.validate import combination_errors, component_errors, format_error
from opdctl.registry import (
    BENCHMARKS,
    OBJECTIVES,
    WEIGHTS,
    Registry,
    are_imported,
    check_recorded_module,
    load_plugins,
    load_recorded_plugins,
)

Purpose = Literal["read", "repair", "plan", "run"]
"""What a command does with a run: read its artifacts, move corrupt files away, plan its continuation (--dry-run), or
continue it."""

SCORING_SECTIONS = ("score", "teacher", "vllm", "server", "pipeline", "plugins")
"""The sections that the scores of files depend on."""
PROMPTS_KEY = re.compile(r"prompts(\.sources\.[^.]+)?")
"""The sections with a `source`."""


def load_recipe(files: Sequence[Path], overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Recipe:
    """Merge `base`, `files` and `overrides` ("a.b=c"), in this order, and return the validated recipe. The files are
    the user's: the plugins that they name are imported.

    Raises:
        OpdctlError: a file cannot be read, or the recipe is invalid. The message has a line for each error, with the
            file, the key and the nearest valid name.
    """
    merged, origin = _merge_all(files, overrides, base)
    default_origin = str(files[-1]) if files else "--set"
    _import_plugins(merged, _origin("plugins", origin, default_origin))
    return _complete(merged, origin, default_origin)


def _merge_all(
    files: Sequence[Path], overrides: Sequence[str], base: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged settings, and the source of each key."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    _merge(merged, base or {}, "--model", origin)
    for file in files:
        _merge(merged, _read(file), str(file), origin)
    for override in overrides:
        _merge(merged, _parse_override(override), "--set", origin)
    merged.setdefault("name", _derive_name(files, overrides))
    return merged, origin


def _import_plugins(merged: Mapping[str, Any], source: str, run_dir: Path | None = None) -> None:
    """Import the plugins of a recipe; run_dir: of the run that recorded it, if the command does not name them."""
    names = _plugin_names(merged)
    try:
        if run_dir is None:
            load_plugins(names)
            return
        for name, file in load_recorded_plugins(names, run_dir).items():
            console.info_once(f"plugin `{name}`: {file}")
    except OpdctlError as error:
        if error.kind == "untrusted_code":
            raise
        raise OpdctlError(error.kind, f"{source}: {error.detail}", hint=error.hint) from error


def _plugin_names(merged: Mapping[str, Any]) -> list[str]:
    plugins = merged.get("plugins")
    return [name for name in plugins if isinstance(name, str)] if isinstance(plugins, list) else []


def _complete(
    merged: Mapping[str, Any], origin: Mapping[str, str], default_origin: str, *, accept_unknown: bool = False
) -> Recipe:
    """Return the validated recipe with defaults and absolute paths. accept_unknown: names of components, which plugins
    that were not imported may define.

    Raises:
        OpdctlError: it is invalid.
    """
    recipe, errors = _validate(merged, accept_unknown=accept_unknown)
    if recipe is None or errors:
        lines = [f"{_origin(key, origin, default_origin)}: {key}: {text}" for key, text in errors]
        count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise OpdctlError("invalid_recipe", "\n".join(lines), hint=f"correct the recipe ({count}); nothing was run")
    return _with_absolute_paths(_with_component_defaults(_with_default_reference(recipe)))


def _derive_name(files: Sequence[Path], overrides: Sequence[str]) -> str:
    """Return the name of a recipe that has none: the names of its files, and the seed if `--set` sets it.

    A base recipe with several overlays, or with several seeds, thereby has a run directory for each.
    """
    names = [file.stem for file in files]
    seeds = [value for override in overrides if isinstance(value := _parse_override(override).get("seed"), int)]
    names += [f"seed-{seed}" for seed in seeds[-1:]]
    return re.sub("[^A-Za-z0-9._-]", "-", "-".join(names)).lstrip("._-")[:MAX_NAME_CHARS] or DEFAULT_NAME


def _validate(merged: Mapping[str, Any], *, accept_unknown: bool) -> tuple[Recipe | None, list[tuple[str, str]]]:
    """Return the recipe, None if it does not match the schema, and every error as (key, text)."""
    recipe, errors = None, []
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A default that depends on an invalid key is no separate error.
        details = [detail for detail in details if detail["type"] != "default_factory_not_called"]
        errors += [format_error(dict(detail)) for detail in details]
    errors += component_errors(merged, accept_unknown=accept_unknown)
    if recipe is not None:
        errors += combination_errors(recipe)
    return recipe, errors


def load_recorded_recipe(file: Path, overrides: Sequence[str] = (), purpose: Purpose = "read") -> Recipe:
    """Return the recipe that a run recorded, with `overrides`.

    It contains every default. A parameter that it lacks did not exist yet, and has the value that the run used. The
    file is data: it runs no code that the command does not name, except installed plugins if the run is continued. A
    component of a plugin that is not imported has the recorded parameters, unchecked.

    Raises:
        OpdctlError: the file cannot be read, or the recipe is invalid; a plugin is not installed outside of the run; a
            model would run its own code.
    """
    merged, origin = _merge_all([file], overrides, None)
    merged, origin = _merge_all([file], overrides, _added_parameters(merged))
    is_named = origin.get("plugins") == "--set"  # code that the command itself names
    if is_named or purpose == "run":
        _import_plugins(merged, _origin("plugins", origin, str(file)), None if is_named else file.parent)
    recipe = _complete(merged, origin, str(file), accept_unknown=not are_imported(_plugin_names(merged)))
    if purpose in ("plan", "run"):
        _check_remote_code(recipe, origin, file)
    if purpose == "run" and recipe.rollout.environment and origin.get("rollout.environment") != "--set":
        _check_environment(recipe.rollout.environment, file.parent)
    return recipe


def _added_parameters(merged: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a recorded weight that did not exist yet, with the values that the run used."""
    weight = merged.get("weight")
    if not isinstance(weight, dict) or not isinstance(weight.get("name"), str):
        return {}  # the validation reports it
    added, times = ADDED_PARAMETERS.get(weight["name"], {}), weight.get("times")
    name = times.get("name") if isinstance(times, dict) else None
    if isinstance(name, str):
        added = added | {"times": {"name": name, **ADDED_PARAMETERS.get(name, {})}}
    return {"weight": {"name": weight["name"], **added}} if added else {}


def _check_environment(name: str, run_dir: Path) -> None:
    """Check that the module of a recorded environment is not the run's own. The rollout imports it."""
    entry, setting = f"rollout.environment: `{name}`", f"rollout.environment={name}"
    module = name.partition(":")[0]
    console.info_once(f"environment `{name}`: {check_recorded_module(module, run_dir, entry, setting)}")


def _check_remote_code(recipe: Recipe, origin: Mapping[str, str], file: Path) -> None:
    """Check that the command itself trusts the code of every model that would run it."""
    models = {f"{model_key(name)}.trust_remote_code": model for name, model in recipe.models().items()}
    keys = [key for key, model in models.items() if model.trust_remote_code and origin.get(key) != "--set"]
    if keys:
        options = " ".join(f"--set {key}=true" for key in keys)
        raise OpdctlError(
            "untrusted_code",
            f"{file}: {keys[0]}: code in {models[keys[0]].model} would run because of this file alone",
            hint=f"to run that code after reading it, add {options} or --recipe with your recipe",
        )


def default_eval_recipe(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe for the evaluation of a model without a run. Its teacher and training are never used, and of its
    prompts only the arguments of the chat template: those of the paper."""
    arguments = {"enable_thinking": False}
    prompts = {"source": "toy:sort12", "limit": 1024, "template_arguments": arguments}
    unused = {"teacher": {"model": model}, "prompts": prompts, "train": {"steps": 1}}
    return load_recipe([], overrides, {"name": "eval", "student": {"model": model}} | unused)


def default_score_recipe(teacher: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe for the scores of a model without a run. Its student, prompts and training are never used.

    Raises:
        OpdctlError: the recipe is invalid, or an override has no effect on scores.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key != "rollout.num_parts" and key.partition(".")[0] not in SCORING_SECTIONS:
            known = ", ".join(f"{name}.*" for name in SCORING_SECTIONS)
            raise OpdctlError(
                "invalid_usage",
                f"--set {key}: has no effect on scores of files",
                hint=f"set rollout.num_parts or {known}",
            )
    prompts = {"source": "toy:sort12", "limit": MAX_PARTS}
    unused = {"student": {"model": teacher}, "prompts": prompts, "train": {"steps": 1}}
    rollout = {"prompts_per_step": MAX_PARTS}  # which limits the number of parts
    return load_recipe([], overrides, {"name": "score", "teacher": {"model": teacher}, "rollout": rollout} | unused)


def _with_default_reference(recipe: Recipe) -> Recipe:
    """Return the recipe with the initial student as the reference model, if it needs one and names none."""
    if recipe.train.extrapolation == 1 or recipe.reference is not None:
        return recipe
    # A server of the student is that of the student's rollouts.
    reference = recipe.student.model_copy(update={"server": None, "served_name": None})
    return recipe.model_copy(update={"reference": reference})


def _with_component_defaults(recipe: Recipe) -> Recipe:
    """Add the parameters of the components and the columns that they need, so that new defaults cannot change a run."""
    weight, objective = recipe.weight, recipe.objective
    times = weight.times and Component(name=weight.times.name, **_parameters(WEIGHTS, weight.times))
    # A new object, in which the parameters are in the order of their definition, wherever they were set.
    fields = {name: getattr(weight, name) for name in WeightSettings.model_fields} | {"times": times}
    update: dict[str, Any] = {
        "weight": WeightSettings(**fields, **_parameters(WEIGHTS, weight)),
        "objective": ObjectiveSettings(name=objective.name, **_parameters(OBJECTIVES, objective)),
    }
    required = required_columns(recipe) if has_known_components(recipe) else {}
    for key, value in unmet_requirements(recipe, required).items():
        section, name = key.split(".")
        update[section] = update.get(section, getattr(recipe, section)).model_copy(update={name: value})
    return recipe.model_copy(update=update)


def _parameters(registry: Registry[Any], component: Component) -> dict[str, Any]:
    if component.name not in registry.names():
        return component.params  # of a plugin that was not imported: recorded with every default
    return dataclasses.asdict(registry.build(component.name, component.params))


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the paths of local models, prompts and benchmarks absolute, so that a run can resume in any directory."""

    def resolve(model: Model) -> Model:
        template = {"chat_template": _absolute_or_unset(model.chat_template)} if isinstance(model, Teacher) else {}
        return model.model_copy(update={"model": _absolute(model.model), **template})

    update: dict[str, Any] = {
        name: resolve(model)
        for name, model in (("student", recipe.student), ("teacher", recipe.teacher), ("reference", recipe.reference))
        if model
    }
    update["teachers"] = {name: resolve(model) for name, model in recipe.teachers.items()}
    update["prompts"] = recipe.prompts.model_copy(
        update={
            "source": _absolute_source(recipe.prompts),
            "chat_template": _absolute_or_unset(recipe.prompts.chat_template),
            "sources": {
                name: part.model_copy(update={"source": _absolute_source(part)})
                for name, part in recipe.prompts.sources.items()
            },
        }
    )
    return with_benchmarks(recipe.model_copy(update=update), recipe.eval.bench)


def _absolute_source(prompts: PromptSource) -> str | list[str]:
    """Return the source with absolute paths, of patterns too."""
    paths = [str(Path(path).expanduser().absolute()) if is_pattern(path) else _absolute(path) for path in prompts.paths]
    return paths[0] if isinstance(prompts.source, str) else paths


def _absolute(source: str) -> str:
    """Return the absolute path of a file or directory. Other strings, such as a hub id, are returned as they are."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _absolute_or_unset(file: str | None) -> str | None:
    return None if file is None else _absolute(file)


def with_benchmarks(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Return `recipe` with other benchmarks.

    Raises:
        OpdctlError: a benchmark is unknown.
    """
    for name in names:
        if not is_named_by_data(name) and are_imported(recipe.plugins):
            BENCHMARKS.get(name)
    bench = [_absolute(name) if is_data_file(name) else name for name in names]
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"bench": bench})})


def _read(file: Path) -> dict[str, Any]:
    try:
        return parsing.parse_toml(parsing.read_bytes(file, parsing.MAX_TOML_BYTES, follow_links=True))
    except FileNotFoundError:
        known = sorted(p.name for p in file.parent.glob("*.toml")) if file.parent.is_dir() else []
        raise OpdctlError("missing_file", f"{file}{did_you_mean(file.name, known, file.parent)}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not TOML, or beyond a bound
        raise OpdctlError("invalid_recipe", f"{file}: cannot be read as TOML: {error}") from error


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names) or "\n" in text:
        raise OpdctlError("invalid_usage", f"--set {text}: must be key=value, such as train.steps=10")
    parsed = parse_value(value)
    for name in reversed(names):
        parsed = {name: parsed}
    return parsed


def parse_value(text: str) -> Any:
    """Return a value of the command line: a TOML value, or a string without quotes."""
    try:
        return parsing.parse_toml(f"value = {text}".encode())["value"]
    except (ValueError, KeyError):
        return text


def _merge(into: dict[str, Any], new: Mapping[str, Any], source: str, origin: dict[str, str], prefix: str = "") -> None:
    """Merge `new` into `into` key by key, and record in `origin` that its keys come from `source`."""
    for name, value in new.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            if not isinstance(into.get(name), dict):
                into[name] = {}
            default = DEFAULT_COMPONENTS.get(key)
            if default is not None and "name" in value and value["name"] != into[name].get("name", default):
                # A new component does not inherit the parameters of the previous one.
                into[name] = {k: v for k, v in into[name].items() if k in WeightSettings.model_fields}
            if PROMPTS_KEY.fullmatch(key) and value.get("source", into[name].get("source")) != into[name].get("source"):
                into[name] = {k: v for k, v in into[name].items() if k not in ("sources", *SOURCE_OPTIONS)}
            _merge(into[name], value, source, origin, f"{key}.")
        elif value is False and name in into and not isinstance(into[name], bool):
            del into[name]  # remove the section, or the value, of an earlier file
        else:
            into[name] = value
        origin[key] = source


def _origin(key: str, origin: Mapping[str, str], default: str) -> str:
    """Return the source of a key, or of the nearest section around it that has one."""
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return default
