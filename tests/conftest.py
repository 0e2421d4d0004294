"""What the tests share: a small recipe on the embedded task, the command line in this process, and work for engines."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy processes with two threads each crawl on two cores
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
from helpers.commands import QUICKSTART, Result, invoke, sets, small_recipe

from opdctl.recipe.schema import Recipe

# No test is timed, and a run on CI must not depend on luck.
hypothesis.settings.register_profile("opdctl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("opdctl")


@pytest.fixture
def opdctl() -> Callable[..., Result]:
    return invoke


@pytest.fixture
def small() -> Callable[..., Recipe]:
    return small_recipe


@pytest.fixture
def stage_args(tmp_path: Path) -> Callable[..., list[object]]:
    """Return `--recipe … --set … --output …` for a small run in the test's own folder."""

    def build(*overrides: str, output: str = "run") -> list[object]:
        return ["--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / output]

    return build
