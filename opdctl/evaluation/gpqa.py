"""GPQA: questions with four choices, which are put in order here. Imports no torch."""

import hashlib
from collections.abc import Iterator
from functools import partial
from string import ascii_uppercase

from opdctl.data.cells import parse_cell
from opdctl.data.prompts import Problem
from opdctl.data.tables import TableRow
from opdctl.errors import OpdctlError

SHUFFLE_SEED = 0
"""Of the order of the choices. It is not the recipe's: seeds of one setting are compared on the same problems."""
CORRECT = "Correct Answer"
CHOICES = (CORRECT, *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
QUESTION_TEMPLATE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\n{choices}"
)
"""Source: `QUERY_TEMPLATE_MULTICHOICE` of openai/simple-evals."""


def read_gpqa(rows: Iterator[TableRow], location: str) -> Iterator[Problem]:
    """Yield the problem of each row; the gold answer is a letter. location: of the rows, for errors.

    Raises:
        OpdctlError: a row has no such question.
    """
    for number, row in enumerate(rows, 1):
        at = f"{location}: row {number}"
        name, question, *choices = (_read_text(row, column, at) for column in ("Record ID", "Question", *CHOICES))
        order = sorted(range(len(choices)), key=partial(_rank, name))
        lines = [f"{letter}) {choices[choice]}" for letter, choice in zip(ascii_uppercase, order, strict=False)]
        text = QUESTION_TEMPLATE.format(question=question, choices="\n".join(lines))
        yield Problem(name, text, ascii_uppercase[order.index(CHOICES.index(CORRECT))], location=at)


def _read_text(row: TableRow, column: str, location: str) -> str:
    if column not in row:
        raise OpdctlError("invalid_data", f"{location}: no column `{column}`", hint="give gpqa_diamond.csv of the hub")
    return parse_cell(row[column], f"{location}: `{column}`").strip()


def _rank(problem: str, choice: int) -> bytes:
    """Return the sort key of a choice, which depends on no other problem."""
    return hashlib.sha256(f"{SHUFFLE_SEED}/{problem}/{choice}".encode()).digest()
