"""The registries of components."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import QUICKSTART

from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import ResponseTokens, Weight, weigh
from opdctl.recipe.load import load_recipe
from opdctl.registry import OBJECTIVES, WEIGHTS, ComponentInfo, Registry, load_plugins, module_origins, plugin_file


@dataclass(frozen=True)
class Circle:
    """A circle.

    It has more text.
    """

    radius: float = 1.0
    filled: bool = False

    def __post_init__(self) -> None:
        if self.radius < 0 or (self.filled and self.radius == 0):
            raise ValueError(f"radius must be positive, got {self.radius}")


@pytest.fixture
def shapes() -> Registry[Circle]:
    registry: Registry[Circle] = Registry("shape", "opdctl.registry")
    registry.register("circle", "Euclid")(Circle)
    return registry


def test_entries(shapes: Registry[Circle]) -> None:
    assert shapes.names() == ["circle"]
    assert shapes.entries() == [ComponentInfo("circle", "A circle.", {"radius": 1.0, "filled": False}, "Euclid")]


def test_entry_of_a_factory_function_has_no_parameters(shapes: Registry[Circle]) -> None:
    @shapes.register("unit_circle")
    def unit_circle() -> Circle:
        """The unit circle."""
        return Circle()

    assert shapes.entries()[1] == ComponentInfo("unit_circle", "The unit circle.", {}, "")


def test_names_are_unique(shapes: Registry[Circle]) -> None:
    with pytest.raises(ValueError, match="'circle'"):
        shapes.register("circle")(Circle)


def test_unknown_name_gets_the_nearest(shapes: Registry[Circle]) -> None:
    for look_up in (shapes.get, lambda name: shapes.build(name, {})):
        with pytest.raises(OpdctlError, match=r"shape `circel`; did you mean `circle`\?") as caught:
            look_up("circel")
        assert caught.value.kind == "unknown_name"
    ((key, error),) = shapes.validate("circel", {})
    assert key == "name"
    assert "did you mean `circle`?" in error


@pytest.mark.parametrize(
    ("params", "keys"),
    [
        ({"radius": 2}, []),
        ({"radius": True}, ["radius"]),
        ({"radius": "2"}, ["radius"]),
        ({"radius": -1.0}, ["radius"]),
        ({"filled": 1}, ["filled"]),
        ({"radius": -1.0, "fill": True}, ["radius", "fill"]),
        ({"radius": 0.0, "filled": True}, [""]),  # each is valid by itself
    ],
)
def test_validate_returns_every_invalid_parameter(shapes: Registry[Circle], params: dict[str, Any], keys) -> None:
    assert [key for key, _ in shapes.validate("circle", params)] == keys
    if keys:
        with pytest.raises(OpdctlError) as caught:
            shapes.build("circle", params)
        assert caught.value.kind == "invalid_recipe"
        assert len((caught.value.detail or "").splitlines()) == len(keys)
    else:
        assert shapes.build("circle", params) == Circle(2.0)
        assert isinstance(shapes.build("circle", params).radius, float)


def test_component_of_a_recipe_must_be_a_dataclass() -> None:
    class Odd(Weight):
        def __call__(self, response: Any) -> Any:
            return np.ones(len(response))

    WEIGHTS.register("odd")(Odd)
    try:
        with pytest.raises(OpdctlError, match="must be a dataclass") as caught:
            load_recipe([QUICKSTART], ["weight.name=odd"])
    finally:
        del WEIGHTS._factories["odd"]
    assert caught.value.kind == "invalid_recipe"


def test_missing_plugin() -> None:
    with pytest.raises(OpdctlError, match="plugins: `no_such_plugin`") as caught:
        load_plugins(["no_such_plugin"])
    assert caught.value.kind == "invalid_plugin"


def test_built_in_components_are_registered_at_the_first_lookup() -> None:
    assert {"uniform", "iw_opd"} <= set(WEIGHTS.names())
    assert {"policy_gradient", "constant_penalty"} <= set(OBJECTIVES.names())


def test_files_of_a_plugin_are_found_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("package", "package/inner", "namespace/nested"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "package/__init__.py",
        "package/inner/__init__.py",
        "package/inner/leaf.py",
        "namespace/nested/leaf.py",
    ):
        (tmp_path / name).write_text("raise SystemExit")
    package = tmp_path / "package"
    leaf = package / "inner" / "leaf.py"
    assert module_origins("package.inner.leaf") == [package / "__init__.py", package / "inner" / "__init__.py", leaf]
    assert module_origins("namespace.nested.leaf")[-1] == tmp_path / "namespace" / "nested" / "leaf.py"
    assert plugin_file("package.inner.leaf") == leaf
    assert module_origins("package.missing") == [package / "__init__.py"]
    assert module_origins("missing.module") == []
    assert plugin_file("sys") is None


FAULTY = """
from dataclasses import dataclass
import numpy as np
from opdctl.plugins import WEIGHTS, Weight

@WEIGHTS.register("divides", "a test")
@dataclass(frozen=True)
class Divides(Weight):
    def __call__(self, tokens):
        return np.ones(len(tokens)) / int("0")

@WEIGHTS.register("calls", "a test")
@dataclass(frozen=True)
class Calls(Weight):
    def __call__(self, tokens):
        return np.linalg.inv(np.zeros((2, 2)))

@WEIGHTS.register("nothing", "a test")
@dataclass(frozen=True)
class Nothing(Weight):
    pass

@WEIGHTS.register("returns_none", "a test")
@dataclass(frozen=True)
class ReturnsNone(Weight):
    def __call__(self, tokens):
        return None
"""


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("divides", ":10: Divides()", "invalid literal"),
        ("calls", ":16: Calls()", "LinAlgError: Singular matrix"),
        ("nothing", ": Nothing()", "NotImplementedError"),
        ("returns_none", "ReturnsNone()", "returned NoneType"),
    ],
)
def test_error_of_a_plugin_names_component_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, reason: str
) -> None:
    """The line is the plugin's, also if another library raises."""
    file = tmp_path / f"faulty_{name}.py"
    file.write_text(FAULTY.replace('int("0")', 'int("zero")'))
    for field in ("_factories", "_sources"):
        monkeypatch.setattr(WEIGHTS, field, dict(getattr(WEIGHTS, field)))
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins([file.stem])
    tokens = ResponseTokens(np.zeros(3), np.zeros(3), np.zeros(3), 0, {})
    with pytest.raises(OpdctlError) as caught:
        weigh(WEIGHTS.build(name, {}), [tokens])
    assert caught.value.kind == "invalid_plugin"
    assert (f"{file}{place}" if place.startswith(":") else place) in caught.value.message
    assert reason in caught.value.message


def test_error_of_a_built_in_component_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS.build("uniform", {})
    monkeypatch.setattr(type(weight), "weigh_step", lambda self, responses: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        weigh(weight, [])
