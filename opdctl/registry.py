"""Names to components, loaded when asked for.

A component is a frozen dataclass whose fields are its parameters, or a function that makes one. It registers itself
under a name in its kind's home module, which is imported the first time that a name of the kind is looked up.
"""

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from opdctl.errors import OpdctlError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """The components of one kind, such as the token weights."""

    def __init__(self, kind: str, home: str):
        self.kind, self._home = kind, home
        self._makers: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Return a decorator that files a class or function under `name`."""

        def file(maker: Callable[..., T]) -> Callable[..., T]:
            if name in self._makers:
                raise ValueError(f"two components of kind {self.kind} are named {name!r}")
            self._makers[name] = maker
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

    def problems(self, name: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return (parameter, what is wrong with it) of every bad parameter; "name" and "" for the whole.

        Each parameter is checked against the dataclass field of its name and type, and by the component's own checks.
        """
        try:
            maker = self.get(name)
        except OpdctlError as error:
            return [("name", error.message)]
        hints = typing.get_type_hints(maker)
        types: dict[str, type] = {field.name: hints[field.name] for field in dataclasses.fields(maker)}  # type: ignore[arg-type]
        found = []
        for key, value in params.items():
            if key not in types:
                found.append((key, f"{self.kind} `{name}` has no parameter `{key}`{did_you_mean(key, types)}"))
            elif not _fits(value, types[key]):
                found.append((key, f"{key} must be of type {types[key].__name__}, got {value!r}"))
            elif problem := _refusal(maker, {key: value}):
                found.append((key, problem))
        if not found and (problem := _refusal(maker, params)):
            found.append(("", problem))
        return found

    def build(self, name: str, params: Mapping[str, Any]) -> T:
        """Build the component `name` with `params`. Raises OpdctlError with everything that is wrong with them."""
        if problems := self.problems(name, params):
            raise OpdctlError("\n".join(text for _, text in problems))
        maker = self.get(name)
        hints = typing.get_type_hints(maker)
        return maker(**{key: float(value) if hints[key] is float else value for key, value in params.items()})


def _fits(value: Any, wanted: type) -> bool:
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    return isinstance(value, int | float if wanted is float else wanted)


def _refusal(maker: Callable[..., Any], params: Mapping[str, Any]) -> str | None:
    """Return why the component refuses `params`, or None."""
    try:
        maker(**params)
    except ValueError as error:
        return str(error)
    except OverflowError:
        return f"too large a number: {', '.join(params)}"
    return None


WEIGHTS: Registry[Any] = Registry("weight", "opdctl.weights")
OBJECTIVES: Registry[Any] = Registry("objective", "opdctl.objectives")
ENGINES: Registry[Any] = Registry("engine", "opdctl.engines")
BENCHMARKS: Registry[Any] = Registry("benchmark", "opdctl.benchmarks")
