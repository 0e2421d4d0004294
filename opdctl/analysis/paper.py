"""The figures of arXiv 2606.22600 for a run, beside what the paper has: `analyze-position --paper`."""

from dataclasses import dataclass
from pathlib import Path

from opdctl.analysis.captions import figure_captions
from opdctl.analysis.result_formats import escape_markdown
from opdctl.analysis.results import Analysis
from opdctl.artifacts import files


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper.

    figure: the one of the report that shows the same; None if it needs several runs. published: what it shows in the
    paper. command: makes its numbers, if the run has none.
    """

    number: str
    figure: str | None
    published: str
    command: str


PAPER_FIGURES = (
    PaperFigure(
        "1a",
        None,
        "Accuracy by step: the first 30% of a response teach about as much as all of it, the last 30% almost nothing.",
        "opdctl compare RUN_DIR … --output DIR",
    ),
    PaperFigure(
        "1b",
        "continuations",
        "The teacher's accuracy falls with the length of the student's prefix, and approaches the student's.",
        "opdctl run continuations RUN_DIR",
    ),
    PaperFigure(
        "2a",
        "accuracy",
        "Accuracy by step, 30B-A3B to 4B: AIME25 at step 10 is 49.3% with IW-OPD and 42.4% with OPD.",
        "opdctl eval RUN_DIR",
    ),
    PaperFigure(
        "2b",
        None,
        "The relative gain of IW-OPD increases with the compression: 4.0%, 5.1% and 14.9% at 1.0, 2.4 and 6.7.",
        "opdctl compare RUN_DIR … --output DIR",
    ),
    PaperFigure(
        "3a",
        "steps",
        "The mean token KL falls by about 20%, and then stays above 0.",
        "opdctl train RUN_DIR",
    ),
    PaperFigure(
        "3b",
        "position",
        "The KL decreases at all positions, and vanishes at none.",
        "opdctl train RUN_DIR",
    ),
    PaperFigure(
        "3c",
        "prefix_logp",
        "The student's prefixes are less likely under the teacher, increasingly with their length.",
        "opdctl train RUN_DIR",
    ),
    PaperFigure(
        "4a",
        "prefix_ratio",
        "The ratio vanishes: at alpha 0.1 after about 60 tokens, at alpha 0.01 after about 600.",
        "opdctl analyze-position RUN_DIR --weights prefix_ratio:alpha=0.1",
    ),
    PaperFigure("4b", "one_response", "Signed terms cancel along a response.", "opdctl analyze-position RUN_DIR"),
    PaperFigure(
        "4c", "weights", "The weight falls from 1.5 towards 1; signed and unsigned are near.", "opdctl train RUN_DIR"
    ),
)


def write_overview(path: Path, analysis: Analysis) -> None:
    """Write the table of the paper's figures: the files, the numbers of this run, and what the paper has."""
    captions = figure_captions(analysis)
    lines = [
        f"# {escape_markdown(analysis.run)} and the figures of arXiv 2606.22600",
        "",
        "| figure | file | this run | published, of other models |",
        "|---|---|---|---|",
    ]
    for each in PAPER_FIGURES:
        if each.figure in captions:
            file, text = f"[{each.figure}.pdf](figures/{each.figure}.pdf)", escape_markdown(captions[each.figure])
        else:
            file, text = "", f"no numbers yet: `{each.command}`"
        lines.append(f"| {each.number} | {file} | {text} | {each.published} |")
    files.write_text(path, "\n".join([*lines, ""]))
