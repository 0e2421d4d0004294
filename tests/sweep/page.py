"""Writes the tables of docs/models.md: one row for each finding. The text around them is written by hand."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers import architectures
from sweep.findings import Finding
from sweep.outcomes import Outcome

PATH = Path(__file__).parents[2] / "docs" / "models.md"
MARKER = re.compile(r"(<!-- table: ([a-z ]+) -->\n\n)(.*?)(\n\n<!-- end -->)", re.DOTALL)
HEADERS = {
    "model": ("model", "training", "LoRA", "vLLM", "reason"),
    "quantised": ("weights of the teacher", "scores", "reason"),
    "tokenizer": ("tokenizer", "prompts", "reason"),
    "not built": ("type", "reason"),
}
USES = {"model": ("training", "lora", "vllm"), "quantised": ("scores",), "tokenizer": ("prompts",)}
WORDS = {"right": "yes", "refused": "refused", "late": "refused late", "wrong": "wrong", "error": "internal error"}


def write(path: Path, findings: list[Finding]) -> None:
    """Replace every table of the page."""
    tables = {category: [row(each) for each in findings if each.category == category] for category in USES}
    tables["not built"] = [(f"`{name}`", reason) for name, reason in sorted(architectures.NOT_BUILT.items())]

    def table(match: re.Match[str]) -> str:
        return match[1] + "\n".join(format_table(HEADERS[match[2]], tables[match[2]])) + match[4]

    path.write_text(MARKER.sub(table, path.read_text()))


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for cells in (header, ("---",) * len(header), *sorted(rows)):
        yield f"| {' | '.join(cells)} |"


def read_rows(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the rows of the page's tables by category and name."""
    rows = {}
    for _, category, table, _ in MARKER.findall(path.read_text()):
        for line in table.splitlines()[2:]:
            cells = tuple(line[2:-2].split(" | "))
            rows[category, cells[0].strip("`")] = cells
    return rows


def row(finding: Finding) -> tuple[str, ...]:
    """Return the cells of a finding. They hold no number that depends on the machine."""
    outcomes = [finding.outcomes.get(use) for use in USES[finding.category]]
    reasons = dict.fromkeys(reason(each) for each in outcomes if each is not None and each.kind != "right")
    name = f"`{finding.name}`" if finding.category == "model" else finding.name
    return (name, *(WORDS[each.kind] if each else "" for each in outcomes), "; ".join(reasons))


def reason(outcome: Outcome) -> str:
    first = outcome.detail.strip().splitlines()[0]
    return re.sub(r"\d+(\.\d+)?(e[+-]\d+)? nats", "… nats", first).replace("|", "\\|").replace("<", "&lt;")
