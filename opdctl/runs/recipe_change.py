"""`opdctl change`: a begun run goes on under another recipe from its current step on, in place or in a branch.

The steps before stay as they are, and the recipe they were made under stays beside the new one, as
recipe-before-STEP.toml: what they made is still checked against it. Of the current step, and of those drawn ahead, what
the change does not shape is kept, and the rest is dropped to be made again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdctl.artifacts import directories, files, leases
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.dependencies import IMMUTABLE_KEYS, describe_changes, unaffected_stages
from opdctl.recipe.schema import Recipe
from opdctl.runs.compatibility import artifact_changes, describe_reusable_artifacts
from opdctl.runs.heartbeats import read_heartbeats
from opdctl.runs.run import Run

SHARED_PATTERNS = (
    "run.json",
    "prompts.parquet",
    "metrics.jsonl",
    "recipe-before-*.toml",
    "student/*",
    "trainer/*",
    "eval/*",
)


@dataclass(frozen=True)
class RecipeChange:
    """A recipe's change at a step: (key, old, new) of each setting, and the folders that are not valid under it."""

    run: Run
    recipe: Recipe
    step: int
    settings: list[tuple[str, Any, Any]]
    dropped: list[Path]

    def lines(self) -> list[str]:
        """Return what changes and what becomes of the artifacts."""
        return [
            describe_changes(self.settings),
            *describe_reusable_artifacts(self.run, self.settings),
            f"{self.step} finished steps stay as they are",
            *(f"{path} is dropped, to be made again" for path in self.dropped),
        ]


def plan_recipe_change(run: Run, recipe: Recipe) -> RecipeChange:
    """Return the change of `run` to another recipe, from its current step on.

    Raises OpdctlError: code 2 where nothing changes that shapes artifacts, or what a run is begun with for good; code 4
    where training could not go on from the current step.
    """
    step, settings = run.current_step(), artifact_changes(run.recipe, recipe)
    if not settings:
        raise OpdctlError(f"{run.path}: nothing to record: what shapes its artifacts stays the same")
    if fixed := [each for each in settings if each[0].startswith(IMMUTABLE_KEYS)]:
        raise OpdctlError(
            f"{run.path}: a run is begun with these for good\n{describe_changes(fixed)}",
            hint="use another --output",
        )
    if step and not run.trainer_path(step).is_dir():
        raise OpdctlError(
            f"{run.trainer_path(step)}: was not saved (train.save_every_steps = {run.recipe.train.save_every_steps}), and the "
            "updates since the last state can only be made once more under the recorded recipe",
            hint=f"make one step more, the last is saved: `{run.command_line('train')} --set train.steps={step + 1}`",
            code=ExitCode.RECIPE_MISMATCH,
        )
    return RecipeChange(
        run, recipe, step, settings, list(_invalid(run, step, unaffected_stages(key for key, _, _ in settings)))
    )


def _invalid(run: Run, step: int, valid: list[str]) -> Iterator[Path]:
    """Yield the folders of unfinished steps whose stage is not among the `valid` ones."""
    for at in range(step, run.recipe.train.steps):
        for stage, names in (("rollout", ["rollout"]), ("score", run.scorers())):
            if stage not in valid:
                yield from (path for name in names if (path := run.step_path(at) / name).is_dir())


def apply(found: RecipeChange) -> None:
    """Make the change in place. Raises OpdctlError (code 5) while other processes work on the run."""
    path = found.run.path
    if alive := [sign for sign in read_heartbeats(found.run) if sign.is_alive]:
        who = ", ".join(f"{sign.stage} (process {sign.pid} on {sign.host})" for sign in alive)
        raise OpdctlError(f"{path}: {who} would go on under the old recipe", hint="stop it", code=ExitCode.UNAVAILABLE)
    with leases.hold_lease(path, "train"):
        for folder in found.dropped:
            files.remove_directory(folder)
        _record(found, path)


def _record(found: RecipeChange, path: Path) -> None:
    """Write the recipes into a run directory, the one that held so far first."""
    before = path / f"recipe-before-{found.step:05d}.toml"
    if found.step and not before.exists():  # where one is there, no step was finished under the recipe since
        files.write_text(before, found.run.recipe.to_toml())
    files.write_text(path / "recipe.toml", found.recipe.to_toml())


def branch(found: RecipeChange, new: Path) -> int:
    """Make the change in a new run directory, which shares what is valid with the old one file by file, and return how
    many files it shares. Raises OpdctlError when `new` is there already."""
    run = found.run
    if new.exists():
        raise OpdctlError(f"{new}: is there already", hint="give --branch a path that is free")
    steps = [path for at in range(run.recipe.train.steps) for path in run.step_path(at).glob("*")]
    entries = [path for pattern in SHARED_PATTERNS for path in run.path.glob(pattern)] + steps
    kept = [path for path in entries if path not in found.dropped and not path.name.startswith(".")]
    shared = 0

    def fill(folder: Path) -> None:
        nonlocal shared
        shared = directories.link_or_copy(kept, run.path, folder)
        files.write_json(folder / "run.json", {**files.read_json(run.path / "run.json"), "forked_from": str(run.path)})
        _record(found, folder)

    directories.write_directory(new, fill)
    return shared
