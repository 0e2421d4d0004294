"""The pages of the documentation, the code blocks in them, and the sections of a recipe that they describe."""

import re
import typing
from pathlib import Path

from helpers.commands import ROOT

from opdctl.recipe.schema import Recipe
from opdctl.recipe.section import Section

PAGES = sorted((ROOT / "docs").glob("*.md"))
SHOWN_COMMAND = re.compile(
    r"^(?: {4}|\$ |#   command   )?((?:(?:torchrun|srun|mpirun|accelerate|python) [^`\n]*)?\bopdctl [a-z].*)$",
    re.MULTILINE,
)


def shown_commands() -> list[tuple[str, str]]:
    """Return (page, command line) of every line for opdctl, with its launcher, in pages, scripts and recipes."""
    found = []
    guides = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))
    for page in [*PAGES, *guides, *(ROOT / "docs").rglob("*.sh"), *(ROOT / "recipes").rglob("*.toml")]:
        lines = SHOWN_COMMAND.findall(re.sub(r" *\\\n(?:# )? *", " ", page.read_text()))
        found += [(page.name, re.split(r" {3,}| #", line)[0]) for line in lines if "…" not in line]
    return found


def code_blocks(path: Path, language: str) -> list[str]:
    """Return the content of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def recipe_sections(section: type[Section] = Recipe) -> set[type[Section]]:
    """Return a section of the recipe and all sections within it."""
    kinds = [kind for f in section.model_fields.values() for kind in (f.annotation, *typing.get_args(f.annotation))]
    inner = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)}
    return {section}.union(*map(recipe_sections, inner))
