"""The documentation agrees with the code: components, settings, recipes, commands, links."""

import re
import subprocess
import tomllib
import typing

import pytest
from helpers.commands import QUICKSTART, ROOT, check_options, split_launcher
from helpers.documents import PAGES, code_blocks, recipe_sections, shown_commands

from opdctl.artifacts.versions import VERSIONS
from opdctl.errors import ExitCode
from opdctl.recipe.load import load_recipe
from opdctl.recipe.section import Section
from opdctl.registry import OBJECTIVES, WEIGHTS

DOCS = ROOT / "docs"
EXECUTED = {
    "sh": {"quickstart.md", "extending.md", "paper.md"},
    "python": {"notebook.md", "extending.md", "agents.md", "artifacts.md"},
}
"""The pages whose blocks a test runs, by language: test_tutorials.py, for agents.md test_agent_examples.py, for
artifacts.md test_losses_of_others.py, and for paper.md integration/test_paper.py."""


# ── Reference ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("registry", [WEIGHTS, OBJECTIVES], ids=["weights", "objectives"])
def test_components_are_described_with_their_parameters_and_defaults(registry):
    rows = [line for line in (DOCS / "methods.md").read_text().splitlines() if line.startswith("| `")]
    for entry in registry.entries():
        (row,) = (row for row in rows if f"`{entry.name}`" in row.split("|")[1])
        for name, default in entry.parameters.items():
            if not isinstance(default, str | bool) and registry is WEIGHTS:
                assert f"{name} {default:g}" in row.replace("0.30", "0.3").replace("0.10", "0.1"), (entry.name, name)
            else:
                assert registry is OBJECTIVES or name in row, (entry.name, name)


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its header."""
    section = (DOCS / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_exit_codes_are_listed():
    assert {int(row[0]) for row in table_rows("run-directory.md", "Exit codes")} == {int(code) for code in ExitCode}


def test_versions_are_listed():
    rows = table_rows("run-directory.md", "Versions")
    assert {row[0].strip("`"): int(row[2]) for row in rows} == VERSIONS


def test_the_glossary_has_its_terms():
    terms = {row[0] for row in table_rows("concepts.md", "Glossary")}
    assert terms == {
        *("advantage", "part", "stage", "step", "policy version", "fingerprint", "lease", "heartbeat", "scorer"),
        *("reference", "truncated", "staleness"),
    }


def test_every_fault_has_a_test():
    lines = (DOCS / "reliability.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("| test |")]
    assert len(rows) > 40
    for row in rows:
        tests = re.findall(r"`((?:unit|integration|acceptance)/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


@pytest.mark.parametrize(
    "section", sorted(recipe_sections(), key=lambda s: s.__name__), ids=lambda section: section.__name__
)
def test_settings_are_described(section):
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        is_section = any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
        assert is_section or field.description, f"{section.__name__}.{name}"


# ── Links and blocks ─────────────────────────────────────────────────────────────────────────────────────────────────

GUIDES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_links_have_a_target(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_no_executable_block_is_left_out():
    for page in PAGES:
        languages = set(re.findall(r"^```(\w*)\n(?:.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
        assert languages <= {"sh", "python", "toml", "console", "text", "json"}, page.name
        for language, tested in EXECUTED.items():
            assert language not in languages or page.name in tested, f"{page.name} has a {language} block"


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "toml")], ids=lambda page: page.name)
def test_pieces_of_recipes_are_valid(page, tmp_path):
    base = QUICKSTART.read_text()
    for text in code_blocks(page, "toml"):
        keys = tomllib.loads(text)
        files = [tmp_path / "base.toml", tmp_path / "piece.toml"]
        files[0].write_text(re.sub(r"\[teacher\]\n(.+\n)+", "", base) if "teachers" in keys else base)
        files[1].write_text(text)
        load_recipe(files[1:] if {"student", "prompts", "train"} <= keys.keys() else files)


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_shown_commands_have_such_options(page, line):
    check_options(split_launcher(line).words)


@pytest.mark.parametrize("script", sorted(DOCS.rglob("*.sh")), ids=lambda script: script.name)
def test_scripts_have_valid_syntax(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
