"""A run before its first update."""

from pathlib import Path

import pytest
from helpers.training import copy_scored_run

from opdctl.runs.run import Run


@pytest.fixture(scope="module")
def scored_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first step is sampled and scored, without an update."""
    return copy_scored_run(finished_run, tmp_path_factory.mktemp("scored") / "run")
