"""The training phases of a run: consecutive steps whose updates were made with the same settings.

The settings differ between steps of a run directory whose recipe.toml was edited between them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from opdctl.artifacts import files
from opdctl.artifacts.stage_dir import Changes, changed_settings
from opdctl.recipe.dependencies import fingerprint_settings, restore_omitted_settings
from opdctl.recipe.load import load_recorded_recipe
from opdctl.recipe.schema import ObjectiveSettings, WeightSettings
from opdctl.runs.layout import list_steps
from opdctl.runs.run import Run

LOCATION_KEYS = ("student.model", "student.revision")
"""Where the initial student is. Its digest in run.json identifies it, so another location is no other setting."""


@dataclass(frozen=True)
class TrainingPhase:
    """The steps of a phase, in order, and the settings of their updates by dotted key.

    changes: the settings that differ from those of the previous phase; none in the first one. weight, objective: the
    components of the settings, from which the token weight and the objective are built.
    """

    steps: tuple[int, ...]
    settings: Mapping[str, Any]
    changes: Changes
    weight: WeightSettings
    objective: ObjectiveSettings

    @property
    def name(self) -> str:
        """The name of the phase by its steps: "steps 0–3" or "step 4"."""
        first, last = self.steps[0], self.steps[-1]
        return f"step {first}" if first == last else f"steps {first}–{last}"


def training_phases(run: Run) -> list[TrainingPhase]:
    """Return the phases of the steps of a run that have an update or responses, in order.

    A step without an update has the settings of the recorded recipe. A step whose update was removed is in no phase.

    Raises:
        OpdctlError: the recipe or the record of an update is corrupt.
    """
    recipe = load_recorded_recipe(run.path / "recipe.toml")  # the command may have changed run.recipe
    recorded, keys, current = fingerprint_settings(recipe, "update"), recipe.flat().keys(), run.current_step()
    sampled = [step for step, path in list_steps(run.path).items() if (path / "rollout").is_dir()]
    by_step = {step: run.update(step)["settings"] or recorded for step in run.finished_steps()}
    by_step |= {step: recorded for step in sampled if step >= current}
    complete = ((step, _complete(settings, keys)) for step, settings in by_step.items())
    phases: list[TrainingPhase] = []
    for settings, group in groupby(complete, key=lambda pair: pair[1]):
        steps = tuple(step for step, _ in group)
        changes = changed_settings(phases[-1].settings, settings) if phases else []
        phases.append(_make_phase(run, steps, settings, changes))
    return phases


def _complete(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    complete = restore_omitted_settings(settings, keys, "update")
    return {key: value for key, value in complete.items() if key not in LOCATION_KEYS and value is not None}


def _make_phase(run: Run, steps: tuple[int, ...], settings: Mapping[str, Any], changes: Changes) -> TrainingPhase:
    try:
        weight = WeightSettings.model_validate(_section(settings, "weight"))
        objective = ObjectiveSettings.model_validate(_section(settings, "objective"))
    except ValueError:
        why = "its settings are not those of a token weight and an objective"
        hint = f"run `{run.manage_command_line('repair')}`, which moves it away"
        raise files.corrupt_artifact(run.update_path(steps[0]), why, hint) from None
    return TrainingPhase(steps, settings, changes, weight, objective)


def _section(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return the settings of a section as a tree: {"weight.times.name": "k1"} gives {"times": {"name": "k1"}}.

    Raises:
        ValueError: a key is below the value of another.
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, name = key.split(".")
        if parents[:1] == [section]:
            node = tree
            for parent in parents[1:]:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise ValueError(f"{key} is below a value")
            node[name] = value
    return tree
