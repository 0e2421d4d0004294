"""What the tests share: a small recipe on the embedded task, the command line in this process, and work for engines."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy processes with two threads each crawl on two cores
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from opdctl.artifacts.records import sample_seed
from opdctl.cli.main import app
from opdctl.engines.base import Completion, Engine, Request
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Model, Recipe, Sampling

# No test is timed, and a run on CI must not depend on luck.
hypothesis.settings.register_profile("opdctl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("opdctl")

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
SMALL = (
    "prompts.count=32",
    "rollout.prompts_per_step=8",
    "rollout.parts=2",
    "train.steps=2",
    "eval.problems=8",
    "eval.every=0",
    "pipeline.threads=1",
)


@dataclass(frozen=True)
class Result:
    """What a command came to: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def invoke(*args: object) -> Result:
    """Run a command line in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def opdctl() -> Callable[..., Result]:
    return invoke


def small_recipe(*overrides: str) -> Recipe:
    """Return the quickstart recipe cut down to two steps of eight prompts, with further overrides."""
    return load_recipe([QUICKSTART], [*SMALL, *overrides])


@pytest.fixture
def small() -> Callable[..., Recipe]:
    return small_recipe


def sets(*overrides: str) -> list[str]:
    """Return `--set` arguments for the small recipe and further overrides."""
    return [word for override in (*SMALL, *overrides) for word in ("--set", override)]


@pytest.fixture
def stage_args(tmp_path: Path) -> Callable[..., list[object]]:
    """Return `--recipe … --set … --output …` for a small run in the test's own folder."""

    def build(*overrides: str, output: str = "run") -> list[object]:
        return ["--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / output]

    return build


def artifacts(run: Path) -> dict[str, object]:
    """Everything a run made that must not depend on how it was made: parts, students, trainer states.

    Of trainer states every tensor to the bit: safetensors writes several metadata entries in an order that changes.
    """
    kept = ("part-", "student/", "trainer/")
    files = {str(p.relative_to(run)): p for p in sorted(run.rglob("*")) if p.is_file()}
    return {name: _content(path) for name, path in files.items() if any(k in name for k in kept)}


def _content(path: Path) -> object:
    if "trainer" not in path.parts or path.suffix != ".safetensors":
        return path.read_bytes()
    return {name: (value.shape, value.tobytes()) for name, value in load_file(path).items()}


def names(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob("*")]


def directory(name: str) -> ModelDir:
    return ModelDir(find_or_download(Model(model=name), "model"), "float32")


def requests(count: int, cut: int = 0) -> list[Request]:
    """Prompts of 13 tokens; with `cut`, of 13 down to 13 - cut tokens, so that most need padding."""
    rng = np.random.default_rng(7)
    prompts = [rng.choice(np.arange(2, 28), 13, replace=False).astype(np.int32) for _ in range(count)]
    return [Request(p[: 13 - i % (cut + 1)], sample_seed(0, f"sample {i}")) for i, p in enumerate(prompts)]


def generate(engine: Engine, wanted: list[Request], batch_size: int = 64, **sampling: Any) -> list[Completion]:
    return engine.generate(wanted, Sampling(**({"max_tokens": 40} | sampling)), batch_size, lambda n: None)
