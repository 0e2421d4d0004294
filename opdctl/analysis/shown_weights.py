"""The token weights that the analysis shows: `--weights`, their labels, and the columns that they need."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opdctl import console
from opdctl.analysis.position_sums import RESERVED_NAMES
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.losses.token_weights import Weight
from opdctl.recipe.components import build_token_weight, has_known_weight, unmet_requirements
from opdctl.recipe.load import parse_value
from opdctl.recipe.schema import Component, WeightSettings
from opdctl.registry import WEIGHTS, are_imported
from opdctl.runs.phases import training_phases
from opdctl.runs.run import Run, read_recipe

DEFAULT_WEIGHTS = (
    "iw_opd,iw_opd:signed=true,linear_decay,"
    "prefix_ratio:alpha=1,prefix_ratio:alpha=0.1,prefix_ratio:alpha=0.01,prefix_ratio:alpha=0.001"
)
"""Shown besides the recipe's by default, in the form of `--weights`: the weights of the paper's Figure 4."""


@dataclass(frozen=True)
class ShownWeights:
    """The token weights that the analysis shows, by label.

    own: the label of the weight that the run was trained with. own_by_start: that weight by the first step of each
    training phase. others: weights that it was not trained with, or not in every step. what_if: the label among them
    of a weight that the command sets in the recipe.
    """

    own: str
    own_by_start: Mapping[int, Weight]
    others: Mapping[str, Weight]
    what_if: str | None = None

    @property
    def labels(self) -> list[str]:
        """The labels, that of the run's own weight first."""
        return [self.own, *self.others]

    def at(self, step: int) -> dict[str, Weight]:
        """Return the weights of a step's responses, the run's own first."""
        start = max((start for start in self.own_by_start if start <= step), default=min(self.own_by_start))
        return {self.own: self.own_by_start[start], **self.others}


def chosen_weights(run: Run, text: str | None = None) -> ShownWeights:
    """Return the weights to show: the run's own, the recipe's if the command changed it, and those of `text`.

    text: the value of `--weights`: weights separated by commas, each NAME or NAME:key=value:key=value. `all` is the
    default ones and every other weight whose columns the run has stored, with its default parameters.

    Raises:
        OpdctlError: a weight is unknown, a parameter is invalid, or a weight needs columns that are not stored.
    """
    components = {phase.steps[0]: phase.weight for phase in training_phases(run)} or {0: read_recipe(run.path).weight}
    trained = {start: _build_labelled(run, component) for start, component in components.items()}
    first_label, first_weight = next(iter(trained.values()))
    is_single = {label for label, _ in trained.values()} == {first_label}
    others, what_if = ({} if is_single else dict(trained.values())), None
    if run.recipe.weight not in components.values():
        label, weight = _build_labelled(run, run.recipe.weight)
        what_if = f"what if: {label}"
        others = {what_if: weight, **others}
    shown = [*others.values(), *([first_weight] if is_single else [])]
    for component, is_optional in _parse_weights(DEFAULT_WEIGHTS if text is None else text):
        weight = WEIGHTS.build(component.name, component.params)
        if is_optional and unmet_requirements(run.recipe, weight.needs):
            continue
        _check_requirements(run, component.name, weight)
        if weight not in shown:
            others[_label(component.name, component.params)] = weight
            shown.append(weight)
    return ShownWeights(
        _free_label(first_label if is_single else "as trained"),
        {start: weight for start, (_, weight) in trained.items()},
        {_free_label(label): weight for label, weight in others.items()},
        what_if,
    )


def weight_label(run: Run, component: WeightSettings) -> str:
    """Return the label of the token weight of a training phase."""
    return _free_label(_build_labelled(run, component)[0])


def _free_label(label: str) -> str:
    """Return the label, or another one if a quantity has it: the weight of a plugin can have any name."""
    return f"{label} (weight)" if label in RESERVED_NAMES else label


def _build_labelled(run: Run, component: WeightSettings) -> tuple[str, Weight]:
    """Return the label and the weight of a training phase. That of a plugin which is not imported is unknown: 1 is
    shown."""
    recipe, name = run.recipe.model_copy(update={"weight": component}), component.name
    if not has_known_weight(recipe) and not are_imported(recipe.plugins):
        option = shlex.quote(f"plugins={json.dumps(recipe.plugins)}")
        console.warn_once(
            f"weight `{name}` of a plugin is not run, and 1 is shown in its place; to run it, add --set {option}"
        )
        return f"{name} (not run)", WEIGHTS.build("uniform", {})
    weight = build_token_weight(recipe)
    _check_requirements(run, name, weight)
    return _recipe_label(component), weight


def _parse_weights(text: str) -> Iterator[tuple[Component, bool]]:
    """Yield each weight of `--weights`, and whether it is shown only if its columns are stored."""
    for item in map(str.strip, text.split(",")):
        if item == "all":
            for name in (*DEFAULT_WEIGHTS.split(","), *WEIGHTS.names()):
                yield _parse_weight(name), True
        else:
            yield _parse_weight(item), False


def _parse_weight(item: str) -> Component:
    """Return the weight NAME:key=value:key=value.

    Raises:
        OpdctlError: the name is unknown, or a parameter is invalid.
    """
    name, *settings = item.split(":")
    if name not in WEIGHTS.names():
        known = [*WEIGHTS.names(), "all"]
        raise OpdctlError("unknown_name", f"--weights: weight `{name}`{did_you_mean(name, known)}")
    params = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise OpdctlError("invalid_usage", f"--weights {item}: must be NAME:key=value, such as iw_opd:gamma=1")
        params[key] = parse_value(value)
    if errors := WEIGHTS.validate(name, params):
        raise OpdctlError("invalid_usage", f"--weights {item}: {'; '.join(error for _, error in errors)}")
    return Component(name=name, **params)


def _recipe_label(component: Component) -> str:
    """Return the label of a recipe's weight, whose parameters are all given: those that differ from the defaults."""
    (entry,) = (entry for entry in WEIGHTS.entries() if entry.name == component.name)
    params = component.params
    text = _label(component.name, {k: params[k] for k, v in entry.parameters.items() if params.get(k, v) != v})
    times = getattr(component, "times", None)
    return f"{text} × {_recipe_label(times)}" if times else text


def _label(name: str, params: Mapping[str, Any]) -> str:
    """Return the name and the parameters, such as `iw_opd gamma=1`."""
    return " ".join([name, *(f"{key}={_format_value(value)}" for key, value in params.items())])


def _format_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def _check_requirements(run: Run, name: str, weight: Weight) -> None:
    """Raise OpdctlError if the run has not stored the columns that a weight needs."""
    if missing := unmet_requirements(run.recipe, weight.needs):
        settings = ", ".join(f"`{key} = {str(value).lower()}`" for key, value in missing.items())
        raise OpdctlError(
            "settings_mismatch",
            f"{run.path}: weight `{name}` needs {settings}",
            hint="start a run with these settings, or with this weight in its recipe, which enables them",
        )
