"""Registries of named components: token weights, objectives, engines, benchmarks.

A component is a frozen dataclass, whose fields are its parameters, or a factory function. Built-in components register
themselves in one module for each kind, which is imported at the first lookup. A plugin, a user's module that the recipe
lists, can register more.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import shlex
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from opdctl.errors import OpdctlError, did_you_mean, is_out_of_memory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
    """The description of a component. parameters: their defaults. source: the paper that introduced it."""

    name: str
    summary: str
    parameters: dict[str, Any]
    source: str


class Registry(Generic[T]):
    """The components of one kind, such as the token weights."""

    def __init__(self, kind: str, module: str):
        self.kind, self._module = kind, module
        self._factories: dict[str, Callable[..., T]] = {}
        self._sources: dict[str, str] = {}

    def register(self, name: str, source: str = "") -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Return a decorator that registers a class or function under `name`; `source` is the paper or the author."""

        def decorator(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._factories:
                raise ValueError(f"two components of kind {self.kind} are named {name!r}")
            self._factories[name], self._sources[name] = factory, source
            return factory

        return decorator

    def names(self) -> list[str]:
        """Return every registered name, in order of registration."""
        importlib.import_module(self._module)
        return list(self._factories)

    def get(self, name: str) -> Callable[..., T]:
        """Return the class or function that is registered under `name`.

        Raises:
            OpdctlError: the name is unknown.
        """
        if name not in self.names():
            raise OpdctlError("unknown_name", f"{self.kind} `{name}`{did_you_mean(name, self._factories)}")
        return self._factories[name]

    def entries(self) -> list[ComponentInfo]:
        """Return the descriptions of all components, in order of registration. A factory function has no parameters."""
        return [
            ComponentInfo(
                name,
                " ".join((inspect.getdoc(factory) or "").partition("\n\n")[0].split()),
                {field.name: field.default for field in dataclasses.fields(factory)}
                if dataclasses.is_dataclass(factory)
                else {},
                self._sources[name],
            )
            for name, factory in ((name, self.get(name)) for name in self.names())
        ]

    def validate(self, name: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return (parameter, error) for every invalid parameter; the parameter is "name" or "" for the component.

        Each parameter is checked against the name and type of a dataclass field, then by the component itself.
        """
        if name not in self.names():
            return [("name", f"unknown {self.kind} `{name}`{did_you_mean(name, self._factories)}")]
        factory = self.get(name)
        if not dataclasses.is_dataclass(factory):
            return [("name", f"{self.kind} `{name}` must be a dataclass: its fields are its parameters")]
        hints = typing.get_type_hints(factory)
        types: dict[str, Any] = {field.name: hints[field.name] for field in dataclasses.fields(factory)}
        errors = []
        for key, value in params.items():
            if key not in types:
                errors.append((key, f"{self.kind} `{name}` has no parameter `{key}`{did_you_mean(key, types)}"))
            elif not _has_type(value, types[key]):
                errors.append((key, f"{key} must be {_describe_type(types[key])}, got {value!r}"))
            elif error := _validation_error(factory, {key: value}):
                errors.append((key, error))
        if not errors and (error := _validation_error(factory, params)):
            errors.append(("", error))
        return errors

    def build(self, name: str, params: Mapping[str, Any]) -> T:
        """Build the component `name` with `params`.

        Raises:
            OpdctlError: the name is unknown, or parameters are invalid; the message lists all of them.
        """
        factory = self.get(name)
        if errors := self.validate(name, params):
            raise OpdctlError("invalid_recipe", "\n".join(text for _, text in errors))
        hints = typing.get_type_hints(factory)
        return factory(**{key: float(value) if hints[key] is float else value for key, value in params.items()})


def _describe_type(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(annotation))
    return f"of type {annotation.__name__}"


def _has_type(value: Any, annotation: Any) -> bool:
    """Whether a TOML value has the type of a field: an integer is a float, a bool is neither."""
    if typing.get_origin(annotation) is Literal:
        return value in typing.get_args(annotation)
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def _validation_error(factory: Callable[..., Any], params: Mapping[str, Any]) -> str | None:
    """Return the error of the component's own check of `params`, or None."""
    try:
        factory(**params)
    except ValueError as error:
        return str(error)
    except OverflowError:
        return f"{', '.join(params)}: the number is too large"
    return None


WEIGHTS: Registry[Any] = Registry("weight", "opdctl.losses.token_weights")
OBJECTIVES: Registry[Any] = Registry("objective", "opdctl.losses.objectives")
ENGINES: Registry[Any] = Registry("engine", "opdctl.engines.providers")
BENCHMARKS: Registry[Any] = Registry("benchmark", "opdctl.evaluation.benchmarks")


def load_plugins(names: Sequence[str]) -> None:
    """Import the user's modules, which register their components. The working directory is searched last.

    Raises:
        OpdctlError: a module is missing, or its import fails.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            raise OpdctlError(
                "invalid_plugin",
                f"plugins: `{name}`: {'module not found' if missing else f'{type(error).__name__}: {error}'}",
                hint="put the module in the working directory or on PYTHONPATH, or install it",
            ) from error


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Return the user's function `module:function`; its module is found as a plugin is. key: of the recipe, for errors.

    Raises:
        OpdctlError: the module is missing, its import fails, or it has no such function.
    """
    module, _, function = name.partition(":")
    try:
        load_plugins([module])
    except OpdctlError as error:
        raise OpdctlError(error.kind, f"{key}: {error.detail.partition(': ')[2]}", hint=error.hint) from error
    found = getattr(sys.modules[module], function, None)
    if not callable(found):
        names = [each for each, value in vars(sys.modules[module]).items() if inspect.isfunction(value)]
        reason = f"`{module}` has no function `{function}`{did_you_mean(function, names)}"
        raise OpdctlError("invalid_plugin", f"{key}: {reason}", hint='name it as "module:function"')
    return cast(Callable[..., Any], found)


@contextlib.contextmanager
def plugin_errors(component: object) -> Iterator[None]:
    """Let an exception of a plugin's code name the component, the plugin's file and the line.

    Raises:
        OpdctlError: such an exception occurred.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OpdctlError) or is_out_of_memory(error) or not (place := _plugin_place(component, error)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OpdctlError("invalid_plugin", f"{place}: {component}: {reason}", hint="correct the plugin") from error


def _plugin_place(component: object, error: Exception) -> str:
    """Return the last file and line of an exception that are of a plugin, else the component's file, "" if built in."""
    registries = (WEIGHTS, OBJECTIVES, ENGINES, BENCHMARKS)
    modules = {factory.__module__ for registry in registries for factory in registry._factories.values()}
    files = {name: getattr(sys.modules[name], "__file__", None) for name in modules if not name.startswith("opdctl.")}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files.values():
            return f"{frame.filename}:{frame.lineno}"
    return files.get(type(component).__module__) or ""


def are_imported(names: Sequence[str]) -> bool:
    """Whether every plugin is imported. Commands that only read a run do not import those that it records."""
    return all(name in sys.modules for name in names)


def load_recorded_plugins(names: Sequence[str], run_dir: Path) -> dict[str, str]:
    """Import the plugins that a run directory records, and return from where by name.

    A run directory is data: it may name modules that are installed here, and not bring its own.

    Raises:
        OpdctlError: a module is missing, its import fails, or it would come from the run directory, or from the working
            directory while that is the directory around the run.
    """
    sources = {}
    for name in names:
        sources[name] = check_recorded_module(name, run_dir, f"plugins: `{name}`", f'plugins=["{name}"]')
        load_plugins([name])
    return sources


def check_recorded_module(name: str, run_dir: Path, entry: str, setting: str) -> str:
    """Check where a module comes from that a run directory records, and return its file. Nothing is imported.

    entry: of the recipe, for the error. setting: by which a command names the module itself.

    Raises:
        OpdctlError: it would come from the run directory, or from the working directory while that is the directory
            around the run.
    """
    origins = module_origins(name)
    for origin in reversed(origins):
        place = "inside" if is_within(origin, run_dir) else ""
        if not place and _is_found_by_working_directory(origins[0]) and is_within(run_dir, Path.cwd(), depth=1):
            place = "beside"
        if place:
            option = f"--set {shlex.quote(setting)}"
            raise OpdctlError(
                "untrusted_code",
                f"{run_dir / 'recipe.toml'}: {entry}: {origin} is {place} the run directory",
                hint=f"to run that code after reading it, add {option} or --recipe with your recipe",
            )
    return str(origins[-1]) if origins else "built in"


def is_within(path: Path, directory: Path, depth: int | None = None) -> bool:
    """Whether `path` is `directory` or below it, by its name or after resolving links. depth: at most so far below."""
    for inner, outer in ((path.absolute(), directory.absolute()), (path.resolve(), directory.resolve())):
        if inner.is_relative_to(outer) and (depth is None or len(inner.relative_to(outer).parts) <= depth):
            return True
    return False


def _is_found_by_working_directory(origin: Path) -> bool:
    """Whether a top-level module is in the working directory, and no entry of PYTHONPATH names that."""
    folder = (origin.parent.parent if origin.name == "__init__.py" else origin.parent).resolve()
    named = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return folder == Path.cwd().resolve() and folder not in named


def module_origins(name: str) -> list[Path]:
    """Return the files of the packages around a module and of the module, in order: the import of it runs them.

    Nothing is imported. A namespace package has its directory. Modules without a file, and missing ones, have none.
    """
    first, *others = name.split(".")
    search = [*sys.path, os.getcwd()]
    specs = (_find_spec(finder, first, search if finder is PathFinder else None) for finder in sys.meta_path)
    spec = next((spec for spec in specs if spec), None)
    origins = _origins_of(spec)
    for part in others:
        if spec is None:
            break
        # The name of a nested module without its package: a finder would look the package up in sys.modules.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
        origins += _origins_of(spec)
    return origins


def _find_spec(finder: Any, name: str, path: list[str] | None) -> ModuleSpec | None:
    spec: ModuleSpec | None = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
    return spec


def _origins_of(spec: ModuleSpec | None) -> list[Path]:
    if spec is None:
        return []
    if spec.origin and spec.has_location:
        return [Path(spec.origin)]
    return [Path(location) for location in spec.submodule_search_locations or ()]


def plugin_file(name: str) -> Path | None:
    """Return the file of a plugin, or None if it has none, such as a namespace package. Nothing is imported."""
    origins = module_origins(name)
    return origins[-1] if origins and origins[-1].is_file() else None
