"""Figures and the HTML report of analyze-position. Draws numbers; computes none."""

import base64
import csv
import html
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from opdctl import store

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TITLES = {
    "abs_advantage": ("Discrepancy |A|", "mean |A| (nats)"),
    "k1": ("Reverse KL, sampled (k1)", "mean −A (nats)"),
    "weight": ("Token weight", "mean weight"),
}
COLOURS = ("#c2410c", "#1d4ed8")


def write(folder: Path, phases: list[Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Write position.png, position.csv and report.html under `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, table, page = folder / "position.png", folder / "position.csv", folder / "report.html"
    image = draw(phases)
    store.write_bytes(figure, image)
    store.write_text(table, _csv(phases))
    store.write_text(page, _page(summary, image))
    return {"report": str(page), "figures": [str(figure)], "table": str(table)}


def draw(phases: list[Any]) -> bytes:
    """Return a PNG with one panel a quantity: mean by token position, with its 95 % interval, one curve a phase."""
    figure, axes = plt.subplots(1, len(TITLES), figsize=(13, 3.8), layout="constrained")
    for axis, (quantity, (title, label)) in zip(axes, TITLES.items(), strict=True):
        for phase, colour in zip(phases, COLOURS, strict=False):
            sums = phase.position
            shown = np.flatnonzero(sums.count_P >= max(2, phase.responses // 10))  # the ragged end is noise
            mean, half = sums.mean(quantity)[shown], sums.half_width(quantity)[shown]
            axis.plot(shown, mean, color=colour, lw=1.2, label=phase.name)
            axis.fill_between(shown, mean - half, mean + half, color=colour, alpha=0.18, lw=0)
        axis.set(title=title, xlabel="token position in the response", ylabel=label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _csv(phases: list[Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["phase", "position", "tokens", *(f"{q}{end}" for q in TITLES for end in ("", "_half_width"))])
    for phase in phases:
        columns = [c for q in TITLES for c in (phase.position.mean(q), phase.position.half_width(q))]
        for position, count in enumerate(phase.position.count_P):
            writer.writerow([phase.name, position, int(count), *(f"{column[position]:.6g}" for column in columns)])
    return buffer.getvalue()


def _page(summary: dict[str, Any], image: bytes) -> str:
    name = html.escape(summary["run"])
    weight = html.escape(", ".join(f"{key} {value}" for key, value in summary["weight"].items()))
    sentences = "".join(f"<p>{html.escape(sentence(phase))}</p>" for phase in summary["phases"])
    tables = "".join(_tenths(phase) for phase in summary["phases"])
    picture = base64.b64encode(image).decode()
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}: positions</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}img{width:100%}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right}"
        "th{border-bottom:1px solid}caption{text-align:left;font-weight:600}</style>"
        f"<h1>{name}: where the teacher’s signal lies</h1>{sentences}"
        f"<p>Token weight: {weight}.</p>"
        f'<img alt="Discrepancy, reverse KL and weight by token position" src="data:image/png;base64,{picture}">'
        f"{tables}</html>\n"
    )


def sentence(phase: dict[str, Any]) -> str:
    """Return one sentence made from a phase's numbers."""
    return (
        f"{phase['phase']}: {phase['responses']} responses, {phase['tokens']} tokens; a token differs by "
        f"{phase['abs_advantage']:.4f} nats in the mean, reverse KL {phase['k1']:.4f}; the first 30 % of the tokens "
        f"hold {phase['share_of_first_30_percent']:.0%} of the discrepancy."
    )


def tenths(phase: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return a phase's numbers by tenths of the response: the header, and a row a tenth."""
    rows = [
        [
            str(t["tenth"]),
            f"{t['share']:.1%}",
            f"{t['abs_advantage']:.4f}",
            f"{t['k1']:.4f}",
            f"{t['weight']:.3f}",
        ]
        for t in phase["tenths"]
    ]
    return ("tenth", "share of Σ|A|", "|A|", "k1", "weight"), rows


def _tenths(phase: dict[str, Any]) -> str:
    header, rows = tenths(phase)
    body = "".join(f"<tr>{''.join(f'<td>{cell}' for cell in row)}" for row in rows)
    return (
        f"<table><caption>{html.escape(phase['phase'])}, by tenths of the response</caption>"
        f"<tr>{''.join(f'<th>{name}' for name in header)}{body}</table>"
    )
