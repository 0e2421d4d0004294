"""TODO."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opdctl.artifacts.stage_dir import changed_settings
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.dependencies import (
    IMMUTABLE_KEYS,
    STEP_ARTIFACTS,
    as_overrides,
    describe_changes,
    is_mutable,
    unaffected_stages,
)
from opdctl.recipe.schema import Recipe
from opdctl.runs.run import Run, load_run, read_recipe


def check_same_recipe(recipe: Recipe, path: Path) -> None:
    """Raise OpdctlError (code 4) when the run in `path` was begun with a recipe that shapes other artifacts.

    The message says what is valid under the new one too, the hint the ways on.
    """
    changes = artifact_changes(read_recipe(path), recipe)
    if changes:
        run = load_run(path)
        raise OpdctlError(
            "\n".join(
                [
                    f"{path}: was begun with another recipe",
                    describe_changes(changes),
                    *describe_reusable_artifacts(run, changes),
                ]
            ),
            hint="\n".join(_resolution_hints(run, changes)),
            code=ExitCode.RECIPE_MISMATCH,
        )


def artifact_changes(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) of the settings that differ and shape artifacts."""
    return [change for change in changed_settings(old.flat(), new.flat()) if not is_mutable(change[0])]


def describe_reusable_artifacts(run: Run, changes: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return how much of what was made is valid under changed settings too, as a line, if anything is."""
    counts = {
        STEP_ARTIFACTS[stage]: run.count_finished_steps(stage)
        for stage in unaffected_stages(key for key, _, _ in changes)
    }
    said = " and ".join(f"{count} steps of {name}" for name, count in counts.items() if count)
    return [f"{said} stay valid"] if said else []


def _resolution_hints(run: Run, changes: list[tuple[str, Any, Any]]) -> list[str]:
    where, overrides = shlex.quote(str(run.path)), as_overrides(changes)
    new = "--recipe FILE" if overrides is None else " ".join(f"--set {shlex.quote(text)}" for text in overrides)
    ways = [f"`opdctl train --output {where}` goes on under the recorded recipe"]
    if not any(key.startswith(IMMUTABLE_KEYS) for key, _, _ in changes):
        ways += [
            f"`opdctl change {where} {new}` goes on from step {run.current_step()} under the new one, and records that",
            f"`opdctl change {where} {new} --branch NEW_RUN_DIR` does so in a run directory of its own",
        ]
    return [*ways, f"another --output, or removing {where}, starts over"]
