"""Names to components, loaded when asked for.

A component is a frozen dataclass whose fields are its parameters, or a function that makes one. It registers itself
under a name in its kind's home module, which is imported the first time that a name of the kind is looked up, or in a
plugin: a module of the user's own that the recipe names.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from opdctl.errors import OpdctlError, did_you_mean

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
    """What a registry says of a component: `parameters` with their defaults, `source` the paper it comes from."""

    name: str
    summary: str
    parameters: dict[str, Any]
    source: str


class Registry(Generic[T]):
    """The components of one kind, such as the token weights."""

    def __init__(self, kind: str, home: str):
        self.kind, self._home = kind, home
        self._makers: dict[str, Callable[..., T]] = {}
        self._sources: dict[str, str] = {}

    def register(self, name: str, source: str = "") -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Return a decorator that files a class or function under `name`; `source` says where it comes from."""

        def file(maker: Callable[..., T]) -> Callable[..., T]:
            if name in self._makers:
                raise ValueError(f"two components of kind {self.kind} are named {name!r}")
            self._makers[name], self._sources[name] = maker, source
            return maker

        return file

    def names(self) -> list[str]:
        """Return every registered name, in order of registration."""
        importlib.import_module(self._home)
        return list(self._makers)

    def get(self, name: str) -> Callable[..., T]:
        """Return what is filed under `name`. Raises OpdctlError with the nearest name when nothing is."""
        if name not in self.names():
            raise OpdctlError(f"unknown {self.kind} `{name}`{did_you_mean(name, self._makers)}")
        return self._makers[name]

    def entries(self) -> list[ComponentInfo]:
        """Return what there is to say of every component, in order of registration."""
        return [
            ComponentInfo(
                name,
                " ".join((inspect.getdoc(maker) or "").partition("\n\n")[0].split()),
                {field.name: field.default for field in dataclasses.fields(maker)},  # type: ignore[arg-type]
                self._sources[name],
            )
            for name, maker in ((name, self.get(name)) for name in self.names())
        ]

    def problems(self, name: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return (parameter, what is wrong with it) of every bad parameter; "name" and "" for the whole.

        Each parameter is checked against the dataclass field of its name and type, and by the component's own checks.
        """
        try:
            maker = self.get(name)
        except OpdctlError as error:
            return [("name", error.message)]
        if not dataclasses.is_dataclass(maker):
            return [("name", f"{self.kind} `{name}` must be a dataclass: its fields are its parameters")]
        hints = typing.get_type_hints(maker)
        types: dict[str, Any] = {field.name: hints[field.name] for field in dataclasses.fields(maker)}
        found = []
        for key, value in params.items():
            if key not in types:
                found.append((key, f"{self.kind} `{name}` has no parameter `{key}`{did_you_mean(key, types)}"))
            elif not _fits(value, types[key]):
                found.append((key, f"{key} must be {_describe_type(types[key])}, got {value!r}"))
            elif problem := _validation_error(maker, {key: value}):
                found.append((key, problem))
        if not found and (problem := _validation_error(maker, params)):
            found.append(("", problem))
        return found

    def build(self, name: str, params: Mapping[str, Any]) -> T:
        """Build the component `name` with `params`. Raises OpdctlError with everything that is wrong with them."""
        if problems := self.problems(name, params):
            raise OpdctlError("\n".join(text for _, text in problems))
        maker = self.get(name)
        hints = typing.get_type_hints(maker)
        return maker(**{key: float(value) if hints[key] is float else value for key, value in params.items()})


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(value) for value in typing.get_args(kind))
    return f"of type {kind.__name__}"


def _fits(value: Any, wanted: Any) -> bool:
    if typing.get_origin(wanted) is Literal:
        return value in typing.get_args(wanted)
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)


def _validation_error(maker: Callable[..., Any], params: Mapping[str, Any]) -> str | None:
    """Return why the component refuses `params`, or None."""
    try:
        maker(**params)
    except ValueError as error:
        return str(error)
    except OverflowError:
        return f"too large a number: {', '.join(params)}"
    return None


WEIGHTS: Registry[Any] = Registry("weight", "opdctl.losses.token_weights")
OBJECTIVES: Registry[Any] = Registry("objective", "opdctl.losses.objectives")
ENGINES: Registry[Any] = Registry("engine", "opdctl.engines.providers")
BENCHMARKS: Registry[Any] = Registry("benchmark", "opdctl.evaluation.benchmarks")


def load_plugins(names: Sequence[str]) -> None:
    """Import the user's modules, so that they register their components; the working directory is searched last.

    Raises OpdctlError for a module that there is not, or that fails.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            raise OpdctlError(
                f"plugins: `{name}`: {'no such module' if missing else f'{type(error).__name__}: {error}'}",
                hint="a plugin is a Python module in the working directory, on PYTHONPATH, or installed",
            ) from error


def plugin_file(name: str) -> Path | None:
    """Return the file of a plugin, or None where it has none of its own."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None
