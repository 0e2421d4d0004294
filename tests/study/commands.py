"""Runs opdctl commands in this process."""

import json
from pathlib import Path
from typing import Any

from arms import Scale, Student
from typer.testing import CliRunner

from opdctl.cli.main import app

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


def run_command(*words: object) -> Any:
    """Run an opdctl command and return its JSON output.

    Raises:
        RuntimeError: the command fails; the message contains its stderr.
    """
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    if result.exit_code:
        raise RuntimeError(f"opdctl {' '.join(map(str, words))}: {result.stderr}") from result.exception
    return json.loads(result.stdout)


def recipe_options(student: Student, scale: Scale, *overrides: str) -> list[object]:
    """Return the `--recipe` and `--set` options of a run on the student's task."""
    settings = (
        f"student.model={student.model}",
        f"teacher.model={student.teacher}",
        f"prompts.source=toy:{student.task}",
        f"prompts.limit={max(scale.steps * scale.prompts_per_step, scale.responses)}",
        "prompts.max_tokens=31",
        f'eval.bench=["{student.task}"]',
        f"rollout.prompts_per_step={scale.prompts_per_step}",
        f"rollout.max_tokens={scale.max_tokens}",
        f"train.steps={scale.steps}",
        "eval.every_steps=0",
        f"eval.limit={scale.test_problems}",
        f"eval.batch_size={scale.test_problems}",
        f"eval.max_tokens={scale.max_tokens}",
        "pipeline.threads=1",
        *overrides,
    )
    return ["--recipe", RECIPE, *(word for setting in settings for word in ("--set", setting))]
