"""What the documents say is so: their code runs, and every component is described."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from opdctl.registry import OBJECTIVES, WEIGHTS

DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_tutorial_s_components_are_short_and_every_command_of_it_runs(tmp_path):
    page = ROOT / "docs" / "extending.md"
    codes = blocks(page, "python")
    assert len(codes) == 3
    assert all(len([line for line in code.splitlines() if line.strip()]) < 20 for code in codes)
    (tmp_path / "mine.py").write_text("\n".join(codes))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "riddles.csv").write_text("riddle,answer\nabc?,c\n")
    commands = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    assert len(commands) == 5
    said = ""
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        said += done.stderr
    assert "unsure  `weight` where the student's entropy is above `limit` nats, else 1." in said
    assert "limit = 0.5, weight = 2.0; this tutorial" in said
    assert "riddles, step-00002: 1 problems, 1 samples each" in said  # as the recipe has it


@pytest.mark.parametrize("registry", [WEIGHTS, OBJECTIVES])
def test_every_component_is_described_with_its_parameters_and_defaults(registry):
    rows = [line for line in (ROOT / "docs" / "methods.md").read_text().splitlines() if line.startswith("| `")]
    for entry in registry.entries():
        (row,) = (row for row in rows if f"`{entry.name}`" in row.split("|")[1])
        for name, default in entry.parameters.items():
            if not isinstance(default, str | bool) and registry is WEIGHTS:
                assert f"{name} {default:g}" in row.replace("0.30", "0.3").replace("0.10", "0.1"), (entry.name, name)
            else:
                assert registry is OBJECTIVES or name in row, (entry.name, name)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
