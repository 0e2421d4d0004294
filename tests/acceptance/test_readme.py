"""Every command of the README runs; its links and its two set-up commands are right.

The first command, `make quickstart`, runs as it is. The other blocks run in its directory, with short trainings.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.browser import WIDTH, open_page
from helpers.commands import ROOT

README = (ROOT / "README.md").read_text()
SETUP = "make quickstart"
NOT_RUN = ("make test",)
"""The command that runs this test."""


def shell_blocks() -> list[list[str]]:
    """Return the command lines of each `sh` block, with continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ").splitlines() for block in blocks]


BLOCKS = [block for block in shell_blocks() if block[0] not in (SETUP, *NOT_RUN)]


def shorten(command: str) -> str:
    """Return the command with two steps of training: the length is not the point."""
    is_training = command.startswith("opdctl train ") and "--recipe" in command and "--dry-run" not in command
    if "--recipe cross_scale --dry-run" in command:  # without a network it ends with 5, after the plan
        return f"{command} || [ $? = 5 ]"
    return f"{command} --set train.steps=2" if is_training else command


def run(command: str, directory: Path) -> None:
    variables = os.environ | {"PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euc", command], cwd=directory, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh directory after `make quickstart`, with the environment that make has made."""
    environment = Path(sys.prefix)
    if not (environment / "installed").exists():
        pytest.skip("needs the environment that make creates")
    directory = tmp_path_factory.mktemp("readme")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", ".ci/constraints.txt"):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
        os.utime(directory / name, (0, 0))  # older than the environment, so that make does not install again
    shutil.copytree(ROOT / "recipes", directory / "recipes")
    (directory / ".venv").symlink_to(environment)
    run(SETUP, directory)
    return directory


def test_two_commands_set_everything_up():
    assert re.findall(r"^make \w+$", README, flags=re.MULTILINE)[:2] == [SETUP, "make test"]


def test_all_stages_are_shown():
    commands = " ".join(command for block in BLOCKS for command in block)
    for stage in ("rollout", "score-teacher", "train", "eval", "analyze-position", "status"):
        assert f"opdctl {stage}" in commands


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0].split(" --")[0].replace("opdctl ", ""))
def test_commands_run(block, workspace):
    for command in block:
        run(shorten(command), workspace)


def test_the_report_opens_without_a_network(workspace):
    path = workspace / "runs" / "quickstart" / "analysis" / "report.html"
    page = open_page(path)
    assert page.messages == []
    assert page.external_requests == [path.as_uri()]
    assert {"position", "cumulative_signal", "steps", "prefix_logp", "weights", "prefix_ratio"} < set(page.figures)
    assert "one_response" in page.figures
    assert all(panels and min(panels) > 0 for panels in page.figures.values())
    assert page.width <= WIDTH


def test_links_have_a_target():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


def test_the_architecture_has_every_package_and_module_at_the_top():
    layers = (ROOT / "docs/architecture.md").read_text().partition("|---|---|---|")[2].partition("\n\n")[0]
    shown = set(re.findall(r"`(\w+)`", "".join(row.split("|")[2] for row in layers.splitlines() if "|" in row)))
    top = {path for path in (ROOT / "opdctl").iterdir() if not path.name.startswith("__")}
    modules = {path.stem for path in top if path.suffix == ".py"}
    assert shown == modules | {path.name for path in top if (path / "__init__.py").exists()}


def test_it_is_short():
    assert len(README.splitlines()) < 200
