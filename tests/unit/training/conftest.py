"""A run before its first update."""

import shutil
from pathlib import Path

import pytest

from opdctl.runs.run import Run


@pytest.fixture(scope="module")
def scored_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first step is sampled and scored, without an update."""
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("scored") / "run"))
    (path / "step-00000/update.json").unlink()
    for name in ("step-00001", "student", "trainer"):
        shutil.rmtree(path / name)
    return Run.load(path)
