"""What the documents say is so: their code runs, every component and setting is described, and the site is built."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import typer.main
from helpers.commands import QUICKSTART, ROOT

from opdctl.cli.main import app
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Recipe, Section
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


def test_every_fault_has_a_test_that_there_is():
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 40
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the quickstart's page was run, in order."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    python = f'opdctl() {{ {shlex.quote(sys.executable)} -m opdctl "$@"; }}'
    for block in blocks(ROOT / "docs" / "quickstart.md", "sh"):
        script = f"set -euo pipefail\n{python}\n{block}"
        done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    return folder


def test_every_command_of_the_quickstart_runs(walked):
    assert {run.name for run in (walked / "runs").iterdir()} == {"first", "staged", "own"}  # uniform was a plan
    assert (walked / "runs" / "first" / "student" / "step-00003").is_dir()
    assert (walked / "runs" / "own" / "student" / "step-00001").is_dir()


def test_the_notebook_s_lines_load_a_run(walked, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(walked / "runs" / "first")
    script = "\n".join(blocks(ROOT / "docs" / "notebook.md", "python")) + "\nprint(len(frame), len(metrics))"
    variables = os.environ | {"HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "192 3"  # three steps of 64 responses


def test_no_block_that_could_run_is_left_out():
    run_elsewhere = {"sh": {"quickstart.md", "extending.md"}, "python": {"notebook.md", "extending.md"}}
    for page in DOCS:
        languages = set(re.findall(r"^```(\w*)\n(?:.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
        assert languages <= {"sh", "python", "toml", "console", "text", "json"}, page.name
        for language, tested in run_elsewhere.items():
            assert language not in languages or page.name in tested, f"{page.name} has a {language} block"


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page, "toml")], ids=lambda page: page.name)
def test_every_piece_of_a_recipe_is_valid(page, tmp_path):
    base = QUICKSTART.read_text()
    for text in blocks(page, "toml"):
        own = tomllib.loads(text)
        files = [tmp_path / "base.toml", tmp_path / "own.toml"]
        files[0].write_text(re.sub(r"\[teacher\]\n(.+\n)+", "", base) if "teachers" in own else base)
        files[1].write_text(text)
        load_recipe(files[1:] if {"name", "student", "train"} <= own.keys() else files)


def shown_commands() -> list[tuple[str, str]]:
    """Return (page, command line) of every line for opdctl that is shown without being run."""
    found = []
    for page in [*DOCS, *(ROOT / "docs").rglob("*.sh")]:
        text = page.read_text().replace("\\\n", " ")
        lines = re.findall(r"^(?: {4}|\$ )?(opdctl [a-z].*)$", text, flags=re.MULTILINE)
        found += [(page.name, re.split(r" {3,}| #", line)[0]) for line in lines if "…" not in line]
    return found


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_every_command_that_is_shown_has_such_options(page, line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # raises for an option that there is not


@pytest.mark.parametrize("script", sorted((ROOT / "docs").rglob("*.sh")), ids=lambda script: script.name)
def test_scripts_are_whole(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def sections(section: type[Section] = Recipe) -> set[type[Section]]:
    kinds = [kind for f in section.model_fields.values() for kind in (f.annotation, *typing.get_args(f.annotation))]
    inner = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)}
    return {section}.union(*map(sections, inner))


@pytest.mark.parametrize("section", sorted(sections(), key=lambda s: s.__name__), ids=lambda section: section.__name__)
def test_every_setting_is_described(section):
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        is_section = any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
        assert is_section or field.description, f"{section.__name__}.{name}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is built, in a folder of its own."""
    pytest.importorskip("mkdocs", reason="needs the extra `docs`, which `make test` installs")
    folder = tmp_path_factory.mktemp("site")
    build = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *build], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_site_has_every_page_command_setting_and_column(site):
    for page in DOCS:
        assert (site / page.with_suffix(".html").name).exists()
    for name, command in typer.main.get_command(app).commands.items():
        text = (site / "commands" / f"{name}.html").read_text()
        assert all(option in text for parameter in command.params for option in parameter.opts if option[0] == "-")
    recipe = (site / "reference" / "recipe.html").read_text()
    for section in sections():
        assert all(f"<code>{name}</code>" in recipe for name in section.model_fields if name not in Recipe.model_fields)
    assert "<code>top_logprobs</code>" in (site / "reference" / "artifacts.html").read_text()


def test_the_site_fetches_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img)[^>]* src="(https?:[^"]*)"|<link[^>]*stylesheet[^>]*"(https?:[^"]*)"', page.read_text()
        )
        assert not fetched, page


def test_what_a_key_shapes_is_what_its_fingerprint_holds(site):
    recipe = (site / "reference" / "recipe.html").read_text()
    rows = {cells[0]: cells for row in recipe.split("<tr>") if (cells := re.findall(r"<td>(.*?)</td>", row))}
    assert rows["<code>learning_rate</code>"][1:3] == ["number &gt; 0", "<code>1e-05</code>"]
    assert rows["<code>learning_rate</code>"][4] == "update"
    assert rows["<code>steps</code>"][2:5:2] == ["required", ""]  # may be raised
    assert rows["<code>at_least</code>"][4] == "prompts"
    assert rows["<code>seed</code>"][4] == "prompts, rollout, update, eval, continuations"
