"""The loop that every sampling and scoring stage runs: claim a part, make it, write it, report progress."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from opdctl import console
from opdctl.artifacts.records import GradedResponse, Response
from opdctl.artifacts.stage_dir import StageDir
from opdctl.artifacts.tables import write_rows


@dataclass(frozen=True)
class Part:
    """The content of a part: `save` writes it to a path; rows and tokens go into its record."""

    save: Callable[[Path], None]
    rows: int
    tokens: int


ResponseRow = TypeVar("ResponseRow", Response, GradedResponse)


def rows_part(rows: Sequence[ResponseRow], record: type[ResponseRow]) -> Part:
    """Return a part of Parquet rows."""
    tokens = sum(len(row.response_ids) for row in rows)
    return Part(partial(write_rows, rows=rows, record=record), len(rows), tokens)


MakePart = Callable[[int, Callable[[int], None]], Part]
"""(part index, on_progress) → part. on_progress(n) reports that n more items are done."""


def make_missing_parts(
    stage: StageDir,
    title: str,
    num_items: int,
    prepare: Callable[[], tuple[Mapping[str, Any], MakePart]],
    *,
    wait: bool = False,
) -> int:
    """Make the parts of a stage that are missing, and return how many were made here.

    prepare: called once, only if there is a part to make: it gets the engine and returns the log-prob metadata and the
    function that makes a part. wait: until all parts exist, also those that other workers have leased.

    Raises:
        OpdctlError: what `prepare` and the engine raise; the disk is full.
    """
    made = 0
    with stage.claim_parts(wait=wait) as parts:
        if parts is None:
            return 0
        for path in stage.finished_but_missing():
            console.warn(f"{path}: a finished part is missing; regenerating it")
        logprob_metadata, make_part = prepare()
        stage.start(logprob_metadata)
        with console.progress(title, num_items) as on_progress:
            for index in parts:
                part = make_part(index, on_progress)
                made += stage.write(index, part.save, rows=part.rows, tokens=part.tokens)
    return made
