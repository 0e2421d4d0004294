"""Whether a recipe fits the run that it is used on, what remains valid, and how to resolve a mismatch."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opdctl.artifacts.stage_dir import Changes, changed_settings
from opdctl.errors import OpdctlError
from opdctl.recipe.dependencies import (
    IMMUTABLE_KEYS,
    STEP_ARTIFACTS,
    as_overrides,
    describe_changes,
    is_mutable,
    unaffected_stages,
)
from opdctl.recipe.schema import Recipe
from opdctl.runs.layout import free_path
from opdctl.runs.run import Run, read_recipe


def check_same_recipe(recipe: Recipe, path: Path) -> None:
    """Check that the run in `path` was started with a recipe that makes the same artifacts.

    Raises:
        OpdctlError: it was not. The message lists the changes and what can be reused, the hint the ways to resolve
        them.
    """
    changes = artifact_changes(read_recipe(path), recipe)
    if changes:
        run = Run.load(path)
        lines = [f"{path} was started with a different recipe", describe_changes(changes)]
        raise OpdctlError(
            "recipe_mismatch",
            "\n".join([*lines, *describe_reusable_artifacts(run, changes)]),
            hint="\n".join(_resolution_hints(run, changes, recipe.train.steps)),
        )


def artifact_changes(old: Recipe, new: Recipe) -> Changes:
    """Return (key, old, new) of the settings that differ and affect artifacts."""
    return [change for change in changed_settings(old.flat(), new.flat()) if not is_mutable(change[0])]


def describe_reusable_artifacts(run: Run, changes: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return a line with the numbers of rollouts and scores that a fork with the changes reuses, if there are any."""
    stages = [stage for stage in unaffected_stages(key for key, _, _ in changes) if stage != "update"]
    counts = {STEP_ARTIFACTS[stage]: run.count_ready_steps(stage) for stage in stages}
    reusable = " and ".join(f"{name} of {count} steps" for name, count in counts.items() if count)
    return [f"a fork reuses {reusable}, from step {run.current_step()} on"] if reusable else []


def _resolution_hints(run: Run, changes: Changes, steps: int) -> list[str]:
    """Return the ways on. steps: train.steps of the new recipe."""
    path = shlex.quote(str(run.path))
    hints = [f"to resume with the recorded recipe: `opdctl train {path}`"]
    if not any(key.startswith(IMMUTABLE_KEYS) for key, _, _ in changes):
        hints.append(_fork_hint(run, changes, steps))
    return [*hints, f"to start over: use another --output, or remove {path}"]


def _fork_hint(run: Run, changes: Changes, steps: int) -> str:
    """Return the command that forks the run with the changes, with more steps if it has made all of them."""
    done = run.current_step()
    more = f", which has {done} more" if steps <= done else ""
    steps = 2 * done if more else steps
    overrides = as_overrides([*changes, *([("train.steps", None, steps)] if steps != run.recipe.train.steps else [])])
    options = ["--recipe", "FILE"] if overrides is None else [word for text in overrides for word in ("--set", text)]
    fork = shlex.join(["opdctl", "run", "fork", str(run.path), str(free_path(run.path, "fork")), *options])
    return f"to continue from step {done} with the new recipe{more}: `{fork}`"
