"""The site that mkdocs builds, with the pages that docs/hooks.py generates."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from helpers.commands import ROOT
from helpers.documents import PAGES, recipe_sections

from opdctl.artifacts.records import GradedResponse, Prompt, Response, TokenScores
from opdctl.cli.main import app
from opdctl.recipe.schema import Recipe

RECORDS = (Prompt, Response, GradedResponse, TokenScores)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    directory = tmp_path_factory.mktemp("site")
    build = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *build], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return directory


def test_every_page_is_built(site):
    assert all((site / page.with_suffix(".html").name).exists() for page in PAGES)


def test_every_command_has_a_page_with_its_options(site):
    commands = dict(typer.main.get_command(app).commands)
    group = commands.pop("run")
    commands |= {f"run-{name}": command for name, command in group.commands.items()}
    assert {path.stem for path in (site / "commands").iterdir()} == set(commands)
    for name, command in commands.items():
        text = (site / "commands" / f"{name}.html").read_text()
        assert all(option in text for parameter in command.params for option in parameter.opts if option[0] == "-")


def test_every_setting_and_column_is_listed(site):
    recipe = (site / "reference" / "recipe.html").read_text()
    for section in recipe_sections() - {Recipe}:
        assert all(f"<code>{name}</code>" in recipe for name in section.model_fields), section.__name__
    artifacts = (site / "reference" / "artifacts.html").read_text()
    for record in RECORDS:
        assert all(f"<code>{name}</code>" in artifacts for name in record.__dataclass_fields__)


def test_the_site_loads_nothing_from_other_servers(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img)[^>]* src="(https?:[^"]*)"|<link[^>]*stylesheet[^>]*"(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, page


def test_a_key_affects_the_stages_with_it_in_their_fingerprint(site):
    recipe = (site / "reference" / "recipe.html").read_text()
    rows = {cells[0]: cells for row in recipe.split("<tr>") if (cells := re.findall(r"<td>(.*?)</td>", row))}
    assert rows["<code>learning_rate</code>"][1:3] == ["number &gt; 0", "<code>1e-05</code>"]
    assert rows["<code>learning_rate</code>"][4] == "update"
    assert rows["<code>steps</code>"][2:5:2] == ["required", ""]  # may increase
    assert rows["<code>where</code>"][4] == "prompts"
    assert rows["<code>seed</code>"][4] == "prompts, rollout, update, eval, continuations"
