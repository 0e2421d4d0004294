"""The language of the code and of the documentation: words that have a plainer or a standard counterpart."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted((ROOT / "opdctl").rglob("*.py"))
TEXT = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
COUNTERPARTS = {
    r"made (again|once more)": "regenerated",
    r"begun": "started",
    r"(go|goes|going|gone) on": "continue, resume",
    r"so many": "N",
    r"in the mean": "on average",
    r"tak(en|es) over": "reused, acquired",
    r"of (its|their|your) own": "separate, custom",
    r"told|tells|says|said|speaks?": "reported, contains, logs",
    r"lies in|stands for": "is",
    r"damaged?": "corrupt",
    r"spoilt": "invalid",
    r"a person": "the user",
    r"for want of": "for lack of",
    r"signs? of life": "heartbeat",
    r"wholly": "completely",
    r"claims? (to|on) (a|the) part": "lease",
    r"nought": "0",
}
"""Each pattern and what to write instead."""
PATTERN = re.compile(rf"\b({'|'.join(COUNTERPARTS)})\b", re.IGNORECASE)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of comments, docstrings and messages of a Python file, or all lines of a text."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield from enumerate(token.string.splitlines(), token.start[0])


@pytest.mark.parametrize("path", [*PYTHON, *TEXT], ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_english(path):
    matches = [(number, match[0]) for number, line in prose(path) for match in PATTERN.finditer(line)]
    assert not matches, f"{matches}: write {COUNTERPARTS}"
