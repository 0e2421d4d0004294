"""Continuations of correct and of incorrect prefixes of a student, by teacher and student."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from arms import Scale, Student
from commands import recipe_options, run_command

from opdctl.analysis.continuations import make_continuations
from opdctl.runs.run import Run


@dataclass(frozen=True)
class PrefixResult:
    """The rows of the summary of continuations: by model and percent, and in addition by kind of prefix."""

    key: str
    accuracy: list[dict[str, Any]]
    by_prefix: list[dict[str, Any]]


def measure_prefixes(student: Student, scale: Scale) -> PrefixResult:
    """Continue prefixes of responses of the untrained student."""
    count = scale.responses
    sizes = (f"rollout.prompts_per_step={count}", f"continuations.responses={count}", "rollout.batch_size=256")
    with TemporaryDirectory() as folder:
        run_command("rollout", *recipe_options(student, scale, *sizes), "--output", folder)
        summary = make_continuations(Run.load(Path(folder)), "cpu", 0).summary
    assert summary is not None  # no other worker has a lease
    return PrefixResult(f"prefixes/{student.name}", summary["accuracy"], summary["by_prefix"])
