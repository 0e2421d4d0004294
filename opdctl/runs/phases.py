"""The training phases of a run: consecutive steps whose updates were made with the same settings.

The settings differ between steps of a run directory whose recipe.toml was edited between them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from opdctl.artifacts import files
from opdctl.artifacts.stage_dir import Changes, changed_settings
from opdctl.recipe.dependencies import fingerprint_settings, restore_omitted_settings
from opdctl.recipe.load import load_recorded_recipe
from opdctl.recipe.schema import ObjectiveSettings, Recipe, WeightSettings
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
        return f"step {self.steps[0]}" if len(self.steps) == 1 else f"steps {self.step_range}"

    @property
    def step_range(self) -> str:
        """The first and the last step: "0–3", or "4" of a single one."""
        return "–".join(str(step) for step in dict.fromkeys((self.steps[0], self.steps[-1])))

    @property
    def num_updates(self) -> int:
        """The number of optimizer updates."""
        return len(self.steps) * self.settings.get("train.updates_per_step", 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the phase as JSON values."""
        components = {name: getattr(self, name).model_dump(exclude_none=True) for name in ("weight", "objective")}
        return {"name": self.name, "steps": list(self.steps), **components, "changes": self.changes}

    def describe_changes(self) -> list[str]:
        """Return the changes as text, one for each setting: "weight.gamma 0.5 → 1.0"; a missing value is "—"."""
        return [f"{key} {_format(old)} → {_format(new)}" for key, old, new in self.changes]


def training_phases(run: Run) -> list[TrainingPhase]:
    """Return the phases of the steps of a run that have an update or responses, in order.

    A step without an update has the settings of the recorded recipe. A step whose update was removed is in no phase.

    Raises:
        OpdctlError: the recipe or the record of an update is corrupt.
    """
    recipe = load_recorded_recipe(run.path / "recipe.toml")  # the command may have changed run.recipe
    sampled = [step for step, path in list_steps(run.path).items() if (path / "rollout").is_dir()]
    return _phases_of(run, recipe, {*run.finished_steps(), *(step for step in sampled if step >= run.current_step())})


def phases_of_student(run: Run, step: int) -> list[TrainingPhase]:
    """Return the phases of the updates that made policy version `step` from the start of the run, in order.

    The last one may be in work, by the recipe of the run. A step whose update was removed is in no phase.

    Raises:
        OpdctlError: the record of an update is corrupt.
    """
    current = run.current_step()
    made = [n for n in range(run.start_step, step) if n == current or run.update_path(n).exists()]
    return _phases_of(run, run.recipe, made)


def _phases_of(run: Run, recipe: Recipe, steps: Collection[int]) -> list[TrainingPhase]:
    """Return the phases of the steps; those without an update have the settings of the recipe."""
    default, keys = fingerprint_settings(recipe, "update"), recipe.flat().keys()
    recorded = (
        (step, run.update(step)["settings"] if run.update_path(step).exists() else {}) for step in sorted(steps)
    )
    # Most records are equal, so the settings of a few are completed.
    groups = [
        (settings, [step for step, _ in group]) for settings, group in groupby(recorded, key=lambda pair: pair[1])
    ]
    complete = [(_complete(settings or default, keys), of_group) for settings, of_group in groups]
    phases: list[TrainingPhase] = []
    for settings, equal in groupby(complete, key=lambda pair: pair[0]):
        changes = changed_settings(phases[-1].settings, settings) if phases else []
        phases.append(_make_phase(run, tuple(step for _, of_group in equal for step in of_group), settings, changes))
    return phases


def _complete(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    complete = restore_omitted_settings(settings, keys, "update")
    return {key: value for key, value in complete.items() if key not in LOCATION_KEYS and value is not None}


def _make_phase(run: Run, steps: tuple[int, ...], settings: Mapping[str, Any], changes: Changes) -> TrainingPhase:
    try:
        weight = WeightSettings.model_validate(_section(settings, "weight"))
        objective = ObjectiveSettings.model_validate(_section(settings, "objective"))
        if not isinstance(settings.get("train.updates_per_step", 1), int):
            raise ValueError("train.updates_per_step")
    except ValueError:
        why = "its settings are not those of an update"
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


def _format(value: object) -> str:
    return "—" if value is None else str(value)
