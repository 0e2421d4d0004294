"""Where things are in a run directory: names of steps, the default path of a run, the newest run."""

import itertools
from pathlib import Path

from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Recipe

STEP_PREFIX = "step-"
PROMPTS_FILE, HELD_OUT_FILE = "prompts.parquet", "held_out.jsonl"
IMPORT_FILE = "import.json"
"""In the directory of a step's rollout: where its responses were imported from."""
PROMPTS = "prompts"
"""The directory of an evaluation's prompts, within that of the evaluation."""


def step_name(step: int) -> str:
    """Return the name of a step's directory: step_name(3) is "step-00003"."""
    return f"{STEP_PREFIX}{step:05d}"


def parse_step(name: str) -> int | None:
    """Return the step of a directory's name, or None if it is not a step's: parse_step("step-00003") is 3."""
    digits = name.removeprefix(STEP_PREFIX)
    return int(digits) if name.startswith(STEP_PREFIX) and digits.isdecimal() else None


def list_steps(directory: Path) -> dict[int, Path]:
    """Return the step directories in `directory` by step, in order. Names that are not a step's are ignored."""
    paths = {parse_step(path.name): path for path in directory.glob(f"{STEP_PREFIX}*")}
    return {step: paths[step] for step in sorted(step for step in paths if step is not None)}


def run_path(recipe: Recipe, output: Path | None) -> Path:
    """Return the run directory: `output`, or the default of the recipe."""
    return output or Path("runs") / recipe.name


def free_path(path: Path, suffix: str) -> Path:
    """Return a path beside `path` that does not exist: free_path(Path("runs/x"), "fork") is runs/x-fork or, if there
    is one, runs/x-fork-2."""
    names = (f"{path.name}-{suffix}" + f"-{number}" * (number > 1) for number in itertools.count(1))
    return next(free for name in names if not (free := path.with_name(name)).exists())


def newest_run() -> Path:
    """Return the run under runs/ that was changed last.

    Raises:
        OpdctlError: there is none.
    """
    runs = [record.parent for record in Path("runs").glob("*/run.json")]
    if not runs:
        hint = "give the path of a run; `opdctl train --recipe FILE` starts one"
        raise OpdctlError("missing_run", "there is no run under runs/", hint=hint)
    return max(runs, key=lambda run: run.stat().st_mtime)
