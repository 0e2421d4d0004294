"""TODO."""

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opdctl.errors import OpdctlError, did_you_mean
from opdctl.recipe.components import required_columns, unmet_requirements
from opdctl.recipe.schema import DEFAULT_COMPONENTS, Component, Model, Objective, Recipe, Weight, is_data_file
from opdctl.recipe.validate import combination_errors, component_errors, format_error
from opdctl.registry import BENCHMARKS, OBJECTIVES, WEIGHTS, Registry, load_plugins


def load_recipe(files: Sequence[Path], overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Recipe:
    """Read `files`, merge them and `overrides` ("a.b=c") left to right onto `base`, and return the recipe they make.

    Raises OpdctlError with all that is wrong in one message, each line with its file, key and the nearest valid name.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    recipe: Recipe | None = None
    _merge(merged, base or {}, "--model", origin)
    for file in files:
        _merge(merged, _read(file), str(file), origin)
    for override in overrides:
        _merge(merged, _parse_override(override), "--set", origin)
    default_origin = str(files[-1]) if files else "--set"

    if isinstance(plugins := merged.get("plugins"), list):
        try:
            load_plugins([name for name in plugins if isinstance(name, str)])
        except OpdctlError as error:
            where = _origin("plugins", origin, default_origin)
            raise OpdctlError(f"{where}: {error.message}", hint=error.hint, code=error.code) from error
    problems: list[tuple[str, str]] = []
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        problems += [format_error(dict(detail)) for detail in error.errors(include_url=False)]
    problems += component_errors(merged)
    if recipe is not None:
        problems += combination_errors(recipe)
    if problems:
        lines = [f"{_origin(key, origin, default_origin)}: {key}: {text}" for key, text in problems]
        raise OpdctlError("\n".join(lines), hint=f"{len(lines)} to mend in the recipe; nothing was run")
    assert recipe is not None
    return _with_absolute_paths(_with_defaults(recipe))


def default_eval_recipe(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe to evaluate `model` alone by: what it says of teacher, prompts and training is never used."""
    unused = {"teacher": {"model": model}, "prompts": {"source": "toy:sort12", "count": 1024}, "train": {"steps": 1}}
    return load_recipe([], overrides, {"name": "eval", "student": {"model": model}} | unused)


def _with_defaults(recipe: Recipe) -> Recipe:
    """Write out what the recipe leaves to its components, since a later default must not change a run: their
    parameters, and what the stages must store for them."""
    weight, objective = recipe.weight, recipe.objective
    times = weight.times and Component(name=weight.times.name, **_parameters(WEIGHTS, weight.times))
    update: dict[str, Any] = {
        "weight": Weight(name=weight.name, times=times, **_parameters(WEIGHTS, weight)),
        "objective": Objective(name=objective.name, **_parameters(OBJECTIVES, objective)),
    }
    for key, value in unmet_requirements(recipe, required_columns(recipe)).items():
        section, name = key.split(".")
        update[section] = update.get(section, getattr(recipe, section)).model_copy(update={name: value})
    return recipe.model_copy(update=update)


def _parameters(registry: Registry[Any], given: Component) -> dict[str, Any]:
    return dataclasses.asdict(registry.build(given.name, given.params))


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make the paths of local models and prompts absolute: a run goes on from whatever folder it is called in."""

    def local(model: Model) -> Model:
        return model.model_copy(update={"model": _absolute(model.model)})

    update: dict[str, Any] = {
        name: local(model)
        for name, model in (("student", recipe.student), ("teacher", recipe.teacher), ("reference", recipe.reference))
        if model
    }
    update["teachers"] = {name: local(model) for name, model in recipe.teachers.items()}
    update["prompts"] = recipe.prompts.model_copy(update={"source": _absolute(recipe.prompts.source)})
    return with_benchmarks(recipe.model_copy(update=update), recipe.eval.bench)


def _absolute(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def with_benchmarks(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Return `recipe` with other benchmarks. Raises OpdctlError for one that there is not."""
    for name in names:
        if not is_data_file(name):
            BENCHMARKS.get(name)
    bench = [_absolute(name) if is_data_file(name) else name for name in names]
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"bench": bench})})


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        known = sorted(p.name for p in file.parent.glob("*.toml")) if file.parent.is_dir() else []
        raise OpdctlError(f"{file}: no such recipe{did_you_mean(file.name, known)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OpdctlError(f"{file}: cannot be read as TOML: {error}") from error


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names) or "\n" in text:
        raise OpdctlError(f"--set {text}: must read key=value, such as train.steps=10")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        parsed = value  # a bare word is a string
    for name in reversed(names):
        parsed = {name: parsed}
    return parsed


def _merge(into: dict[str, Any], new: Mapping[str, Any], source: str, origin: dict[str, str], prefix: str = "") -> None:
    for name, value in new.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            if not isinstance(into.get(name), dict):
                into[name] = {}
            default = DEFAULT_COMPONENTS.get(key)
            if default is not None and "name" in value and value["name"] != into[name].get("name", default):
                # Another component: the parameters of the one before are not its own.
                into[name] = {k: v for k, v in into[name].items() if k == "times"}
            _merge(into[name], value, source, origin, f"{key}.")
        elif value is False and isinstance(into.get(name), dict):
            del into[name]  # the section of an earlier file is taken away
        else:
            into[name] = value
        origin[key] = source


def _origin(key: str, origin: Mapping[str, str], default: str) -> str:
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return default
