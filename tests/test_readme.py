"""Every command in the README runs as it stands there, in order, in a fresh folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, WIDTH, look

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NOT_HERE = ("make test",)  # is what runs this test


def commands() -> list[str]:
    """Return the lines of the README's `sh` blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#") and line not in NOT_HERE]


def test_the_two_commands_that_do_all_the_setup_are_there():
    everything = re.findall(r"^make \w+$", README, flags=re.MULTILINE)
    assert everything[:2] == ["make quickstart", "make test"]


def test_all_five_stages_are_shown():
    shown = " ".join(commands())
    for stage in ("rollout", "score-teacher", "train", "eval", "analyze-position", "status"):
        assert f"opdctl {stage}" in shown


def test_every_command_runs(tmp_path):
    environment = Path(sys.prefix)
    if not (environment / "installed").exists():
        pytest.skip("needs the environment that make makes")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    for name in ("recipes", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(environment)
    variables = os.environ | {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for command in commands():
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if CHROMIUM:
        _look_at_the_report(tmp_path / "runs" / "quickstart" / "analysis" / "report.html")


def _look_at_the_report(page: Path) -> None:
    seen = look(page)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [page.as_uri()]
    assert {"position", "spent", "steps", "prefix_logp", "weights", "prefix_ratio", "one_response"} < set(seen.figures)
    assert all(natural > 0 for natural, _ in seen.figures.values())
    assert seen.width <= WIDTH


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_is_short():
    assert len(README.splitlines()) < 200
