"""The smallest valid recipe, and the error of an invalid one."""

from pathlib import Path

import pytest

from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.load import load_recipe

SMALLEST = """
name = "smallest"
student.model = "toy:student"
teacher.model = "toy:teacher"
prompts.source = "toy:sort12"
prompts.limit = 2048
train.steps = 3
"""


def load_error(files: list[Path], *overrides: str, kind: str = "invalid_recipe") -> OpdctlError:
    """Return the error of loading these files."""
    with pytest.raises(OpdctlError) as caught:
        load_recipe(files, overrides)
    assert (caught.value.kind, caught.value.code) == (kind, ExitCode.USAGE)
    return caught.value


def error_lines(files: list[Path], *overrides: str) -> list[str]:
    """Return the lines `source: key: text` of the errors of a recipe."""
    return (load_error(files, *overrides).detail or "").splitlines()
