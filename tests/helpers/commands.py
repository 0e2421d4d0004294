"""The command line in this process, and a small recipe on the embedded task."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from typer.testing import CliRunner

from opdctl.artifacts import files
from opdctl.cli.main import app
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]


QUICKSTART = ROOT / "recipes" / "quickstart.toml"


SMALL = (
    "prompts.limit=32",
    "rollout.prompts_per_step=8",
    "rollout.num_parts=2",
    "train.steps=2",
    "eval.limit=8",
    "eval.every_steps=0",
    "pipeline.threads=1",
)


@dataclass(frozen=True)
class Result:
    """The result of a command: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def kind(self) -> str:
        """The kind of the error that the command reports: its first words, "" for none."""
        found = re.search(r"^error: (?:rank \d+: )?([A-Z][a-z ]+):", self.err, flags=re.MULTILINE)
        return found[1].lower().replace(" ", "_") if found else ""

    def json(self) -> Any:
        return json.loads(self.out)


def invoke(*args: object) -> Result:
    """Run a command line in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return Result(result.exit_code, result.stdout, result.stderr)


def small_recipe(*overrides: str) -> Recipe:
    """Return the quickstart recipe cut down to two steps of eight prompts, with further overrides."""
    return load_recipe([QUICKSTART], [*SMALL, *overrides])


def sets(*overrides: str) -> list[str]:
    """Return `--set` arguments for the small recipe and further overrides."""
    return [word for override in (*SMALL, *overrides) for word in ("--set", override)]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file by relative path, without hidden files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rewrite_json(path: Path, **changes: object) -> None:
    """Write other values into a JSON artifact, with a digest that fits them; `...` removes a key."""
    value = {key: each for key, each in {**json.loads(path.read_text()), **changes}.items() if each is not ...}
    value.pop("digest", None)
    files.write_json(path, value)


def artifacts(run: Path) -> dict[str, object]:
    """Return what must be identical however a run was interrupted: its parts, students and trainer states.

    Trainer states are compared tensor by tensor: safetensors writes metadata entries in an order that varies.
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
