"""The loop that every sampling and scoring stage runs: claim parts, make them, write each, report progress."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from opdctl import console, signals
from opdctl.artifacts.records import GradedResponse, Response
from opdctl.artifacts.stage_dir import PartMakers, StageDir
from opdctl.artifacts.tables import write_rows


@dataclass(frozen=True)
class Part:
    """The content of a part: `save` writes it to a path; rows, tokens and the ids of what failed go into its record."""

    save: Callable[[Path], None]
    rows: int
    tokens: int
    failed: Sequence[str] = ()


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
ResponseRow = TypeVar("ResponseRow", Response, GradedResponse)


def rows_part(rows: Sequence[ResponseRow], record: type[ResponseRow], failed: Sequence[str] = ()) -> Part:
    """Return a part of Parquet rows. failed: the ids of those that it lacks."""
    tokens = sum(len(row.response_ids) for row in rows)
    return Part(partial(write_rows, rows=rows, record=record), len(rows), tokens, failed)


BuildPart = Callable[[list[_Result]], Part]
"""Results in the order of the requests → part."""


@dataclass(frozen=True)
class StageWork(Generic[_Item, _Result]):
    """How the parts of a stage are made.

    open_part: part index → the requests of the part, and the function that makes the part of their results.
    process: yields the result of each request as soon as it is there, with the number of the request. across_parts:
    whether `process` takes requests of several parts, so that an engine never waits for the last response of one part.
    """

    logprob_metadata: Mapping[str, Any]
    open_part: Callable[[int], tuple[Sequence[_Item], BuildPart[_Result]]]
    process: Callable[[Iterable[_Item]], Generator[tuple[int, _Result]]]
    across_parts: bool


def make_missing_parts(
    stage: StageDir,
    title: str,
    num_items: int,
    prepare: Callable[[], StageWork[Any, Any]],
    *,
    wait: bool = False,
    makers: PartMakers = PartMakers(),  # noqa: B008 - immutable
) -> int:
    """Make the parts of a stage that are missing, and return how many were made here, or by the workers of a cluster.

    prepare: called once, only if there is a part to make: it gets the engine. wait: until all parts exist, also those
    that other workers have leased.

    Raises:
        OpdctlError: what `prepare` and the engine raise; the disk is full.
    """
    if makers.remotely:
        with console.progress(title, num_items) as on_progress:
            return makers.remotely(stage, on_progress)
    if not makers.is_here:
        if wait:
            stage.wait_until_finished()
        return 0
    made = 0
    with stage.claim_available_parts(wait=wait) as claims:
        if claims is None:
            return 0
        for path in stage.finished_but_missing():
            console.warn(f"{path}: a finished part is missing; regenerating it")
        work = prepare()
        start = cache(partial(stage.start, work.logprob_metadata))
        if stage.has_fingerprint:
            start()
        with (
            console.progress(title, num_items) as on_progress,
            contextlib.closing(_make_parts(claims, work, on_progress)) as parts,
        ):
            for index, part in parts:
                start()  # which waits for the fingerprint
                made += stage.write(index, part.save, rows=part.rows, tokens=part.tokens, failed=part.failed)
    return made


def _make_parts(
    claims: Iterator[int | None], work: StageWork[_Item, _Result], on_progress: Callable[[int], None]
) -> Generator[tuple[int, Part]]:
    """Yield each part with its index as soon as it is made.

    A None among the claims ends a round: the engine finishes the parts that it has, before the next claim waits.
    """
    for first in claims:
        if first is not None:
            others = itertools.takewhile(lambda index: index is not None, claims) if work.across_parts else ()
            yield from _make_round(itertools.chain([first], others), work, on_progress)


@dataclass
class _OpenPart(Generic[_Result]):
    """A part in work, with the results that it has."""

    index: int
    build: BuildPart[_Result]
    count: int
    results: dict[int, _Result] = field(default_factory=dict)


def _make_round(
    indices: Iterable[Any], work: StageWork[_Item, _Result], on_progress: Callable[[int], None]
) -> Generator[tuple[int, Part]]:
    places: dict[int, tuple[_OpenPart[_Result], int]] = {}  # of each request in work: its part, its position in it
    complete: list[_OpenPart[_Result]] = []

    def take_requests() -> Iterator[_Item]:
        numbers = itertools.count()
        for index in indices:
            requests, build = work.open_part(index)
            part = _OpenPart(index, build, len(requests))
            if not requests:
                complete.append(part)
            for position, request in enumerate(requests):
                places[next(numbers)] = part, position
                yield request

    def build_complete() -> Iterator[tuple[int, Part]]:
        while complete:
            part = complete.pop()
            yield part.index, part.build([part.results[position] for position in range(len(part.results))])

    with contextlib.closing(work.process(take_requests())) as results:
        for number, result in results:
            signals.check()
            part, position = places.pop(number)
            part.results[position] = result
            on_progress(1)
            if len(part.results) == part.count:
                complete.append(part)
            yield from build_complete()
    yield from build_complete()
