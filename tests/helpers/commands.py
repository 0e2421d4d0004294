"""The command line in this process, and a small recipe on the embedded task."""

import argparse
import json
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import typer.main
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from opdctl import signals
from opdctl.artifacts import files
from opdctl.cli.main import app
from opdctl.errors import ExitCode
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]


QUICKSTART = ROOT / "recipes" / "quickstart.toml"


SMALL = (
    "prompts.limit=32",
    "rollout.prompts_per_step=8",
    "rollout.num_parts=2",
    "train.steps=2",
    "train.learning_rate=2e-4",
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
    """Run a command line in this process, which keeps its handlers of signals. It ends with a documented exit code."""
    before = {number: signal.getsignal(number) for number in signals.SIGNAL_CODES}
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    for number, handler in before.items():
        signal.signal(number, handler)
    assert result.exit_code in list(ExitCode), result.exit_code
    return Result(result.exit_code, result.stdout, result.stderr)


def has_plan(result: Result) -> bool:
    """Whether a dry run printed its plan, and reported nothing but the hub, which tests cannot reach."""
    return result.code == 0 or (result.kind == "failed_download" and bool(result.out))


class Launch(NamedTuple):
    """How many processes a command line starts, and the arguments that opdctl gets from it."""

    nodes: int
    processes_per_node: int
    words: list[str]

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node


def split_launcher(command: str) -> Launch:
    program, *words = shlex.split(command.replace("\\\n", " "))
    if program == "opdctl":
        return Launch(1, 1, words)
    if program == "srun":
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for name in ("--nodes", "--ntasks-per-node", "--gpus-per-node"):
            parser.add_argument(name, type=int, required=True)
        step = parser.parse_args(words[: words.index("opdctl")])
        assert step.gpus_per_node == step.ntasks_per_node, command  # a GPU for each rank
        return Launch(step.nodes, step.ntasks_per_node, words[words.index("opdctl") + 1 :])
    assert program == "torchrun", command
    launch = get_args_parser().parse_args(words)
    assert (launch.module, launch.training_script) == (True, "opdctl"), command
    nodes = int(launch.nnodes.split(":")[-1])
    assert nodes == 1 or (launch.rdzv_backend == "c10d" and launch.rdzv_endpoint), command
    return Launch(nodes, int(launch.nproc_per_node), launch.training_script_args)


def check_options(words: list[str]) -> None:
    """Parse the arguments of opdctl, which must name a command and its options. Nothing runs."""
    words, command = [*words], typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        name = words.pop(0)
        command = command.commands[name]
    assert not hasattr(command, "commands"), words
    command.make_context(name, words)  # raises for an unknown option


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


def artifacts(run: Path) -> dict[str, bytes]:
    """Return what must be identical however a run was interrupted: its parts, students and trainer states."""
    kept = ("part-", "student/", "trainer/")
    files = {str(p.relative_to(run)): p for p in sorted(run.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if any(k in name for k in kept)}


def names(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob("*")]
