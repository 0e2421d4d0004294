from pathlib import Path

import pytest
from helpers.recipes import SMALLEST


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """A file with the smallest recipe."""
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    return path
