"""What the teacher makes of a student's prefixes that are still right, and of those that have gone wrong."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arms import Scale, Student
from measure import command, options

from opdctl.analysis import continuations
from opdctl.engines.pool import open_engine_pool
from opdctl.runs.run import load_run


@dataclass(frozen=True)
class Prefixes:
    """The rows of opdctl's summary of continuations: by model and percent, and by kind of prefix too."""

    key: str
    accuracy: list[dict[str, Any]]
    by_prefix: list[dict[str, Any]]


def measure(student: Student, scale: Scale) -> Prefixes:
    count = scale.responses
    sizes = (f"rollout.prompts_per_step={count}", f"continuations.responses={count}", "rollout.batch_size=256")
    with TemporaryDirectory() as folder:
        command("rollout", *options(student, scale, *sizes), "--output", folder)
        run = load_run(Path(folder))
        with open_engine_pool(continuations.recipe_for_engines(run.recipe), "cpu") as engines:
            found, _ = continuations.run_continuations(run, 0, engines)
    assert found is not None  # there are no other shards
    return Prefixes(f"prefixes/{student.name}", found["accuracy"], found["by_prefix"])
