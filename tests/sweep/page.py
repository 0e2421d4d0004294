"""Writes the tables of docs/models.md: one row for each finding. The text around them is written by hand."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from helpers import architectures
from sweep.findings import CATEGORIES, Finding
from sweep.outcomes import Outcome

PATH = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(<!-- table: ([a-zA-Z ]+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
HEADERS = {
    "model": ("model", "training", "LoRA", "reason"),
    "vllm": ("model", "rollout and scores", "reason"),
    "quantized": ("weights of the teacher", "scores", "reason"),
    "tokenizer": ("tokenizer", "prompts", "reason"),
    "not built": ("type", "reason"),
}
TABLES = {
    "model": ("model", ("training", "lora")),
    "vllm": ("model", ("vllm",)),
    "quantized": ("quantized", ("scores",)),
    "tokenizer": ("tokenizer", ("prompts",)),
}
"""The category of each table's findings, and the uses of its columns."""
WORDS = {"right": "yes", "late": "refused late", "error": "internal error"}


def write(path: Path, findings: Sequence[Finding]) -> None:
    """Write the findings into the tables of the page. The rows of what was not examined stay."""
    rows = read_rows(path)
    for finding in findings:
        for table, (category, uses) in TABLES.items():
            if category == finding.category and set(uses) <= finding.outcomes.keys():
                rows[table, finding.name] = row(table, finding)
    known = {(table, name) for table, (category, _) in TABLES.items() for name in CATEGORIES[category]}
    rows = {key: cells for key, cells in rows.items() if key in known}
    rows |= {("not built", name): (f"`{name}`", reason) for name, reason in architectures.NOT_BUILT.items()}

    def fill(match: re.Match[str]) -> str:
        of_table = [cells for (table, _), cells in rows.items() if table == match[2]]
        return f"{match[1]}\n{format_table(HEADERS[match[2]], of_table)}\n{match[4]}"

    path.write_text(TABLE.sub(fill, path.read_text()))


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (header, ("---",) * len(header), *sorted(rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read_rows(path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the rows of the page by table and name."""
    rows = {}
    for _, table, text, _ in TABLE.findall(path.read_text()):
        for line in text.strip().splitlines()[2:]:
            cells = tuple(line.removeprefix("| ").removesuffix(" |").split(" | "))
            rows[table, cells[0].strip("`")] = cells
    return rows


def row(table: str, finding: Finding) -> tuple[str, ...]:
    """Return the cells of a finding in a table. They contain no number that depends on the machine."""
    outcomes = [finding.outcomes[use] for use in TABLES[table][1]]
    reasons = dict.fromkeys(_reason(each) for each in outcomes if each.kind != "right")
    name = finding.name if table in ("quantized", "tokenizer") else f"`{finding.name}`"
    return name, *(WORDS.get(each.kind, each.kind) for each in outcomes), "; ".join(reasons) or "–"


def _reason(outcome: Outcome) -> str:
    if outcome.kind == "wrong":
        return f"differs from transformers: {', '.join(key for key in outcome.differences if key in outcome.detail)}"
    first = outcome.detail.strip().partition("\n")[0].partition(". ")[0]
    first = re.sub(r"(?<=: )(student|teacher): ", "", first)  # which of the two is loaded first does not matter
    return re.sub(r"\d\S* nats", "… nats", first).replace("|", "\\|").replace("<", "&lt;")
