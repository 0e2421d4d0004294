"""Writes the tables of docs/models.md: one row for each finding. The text around them is written by hand."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from helpers import architectures
from sweep.findings import Finding
from sweep.outcomes import Outcome

PATH = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(<!-- table: ([a-zA-Z ]+) -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
HEADERS = {
    "model": ("model", "training", "LoRA", "reason"),
    "vllm": ("model", "rollout and scores", "reason"),
    "quantised": ("weights of the teacher", "scores", "reason"),
    "tokenizer": ("tokenizer", "prompts", "reason"),
    "not built": ("type", "reason"),
}
USES = {"model": ("training", "lora"), "vllm": ("vllm",), "quantised": ("scores",), "tokenizer": ("prompts",)}
WORDS = {"right": "yes", "late": "refused late", "error": "internal error"}


def write(path: Path, findings: Sequence[Finding]) -> None:
    """Replace the tables of the page. The one of vLLM stays if vLLM was not used."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name == "not built":
            rows = [(f"`{key}`", reason) for key, reason in architectures.NOT_BUILT.items()]
        else:
            rows = [row(name, each) for each in findings if set(USES[name]) <= each.outcomes.keys()]
        return match[1] + (format_table(HEADERS[name], rows) if rows else match[3]) + match[4]

    path.write_text(TABLE.sub(table, path.read_text()))


def format_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *sorted(rows))]
    return "\n" + "\n".join(lines) + "\n"


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
    outcomes = [finding.outcomes[use] for use in USES[table]]
    reasons = dict.fromkeys(_reason(each) for each in outcomes if each.kind != "right")
    name = finding.name if table in ("quantised", "tokenizer") else f"`{finding.name}`"
    return name, *(WORDS.get(each.kind, each.kind) for each in outcomes), "; ".join(reasons) or "–"


def _reason(outcome: Outcome) -> str:
    first = next(iter(outcome.detail.strip().splitlines()), "")
    return re.sub(r"\d\S* nats", "… nats", first).replace("|", "\\|").replace("<", "&lt;")
