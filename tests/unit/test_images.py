"""Every image of the docs is shown by a page, and made by a script that a page names."""

import re
from pathlib import Path

import pytest
from helpers.commands import ROOT

IMAGES = sorted(path.name for path in (ROOT / "docs/images").iterdir())
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
DRAWN_BY_HAND = {"pipeline.svg"}


def named_scripts() -> set[str]:
    """Return the scripts, and directories of a program, that the pages name in a command."""
    return {name for text in PAGES.values() for name in re.findall(r"python (tests/[\w./]+)", text)}


def scripts_that_make(image: str) -> set[Path]:
    sources: set[Path] = set()
    for name in named_scripts():
        path = ROOT / name
        assert path.exists(), f"a page names {name}"
        sources |= {*path.glob("*.py")} if path.is_dir() else {path}
    return {source for source in sources if re.search(rf"\b{re.escape(image)}\b", source.read_text())}


@pytest.mark.parametrize("image", IMAGES)
def test_image_is_shown_and_made_by_a_command_of_the_docs(image):
    assert [path for path, text in PAGES.items() if f"images/{image})" in text]
    assert len(scripts_that_make(image)) == (image not in DRAWN_BY_HAND)


def test_every_shown_image_exists():
    shown = {name for text in PAGES.values() for name in re.findall(r"images/([\w.-]+)\)", text)}
    assert shown == {*IMAGES}
