"""Grades: is this response's answer the gold answer? Mathematics is judged by math-verify in worker processes.

math-verify can hang or die on an answer. Each worker can be killed alone, so such an answer costs its own grade only:
it is wrong, and the verdict says why.
"""

import atexit
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from opdctl.evaluation import math_answers

TIMEOUT_SECONDS = 15  # for one pair; whole, as pebble wants them
WORKERS = 8
BRACE = re.compile(r"\\boxed\s*\{|\\\\|\\[{}]|[{}]")
GRADABLE_VERDICTS = ("ok", "unparsable")  # verdicts after which an answer may be compared with others
Votes = list[list[str | None]]


@dataclass(frozen=True, slots=True)
class Grade:
    """verdict: ok (it could be judged), no_answer, unparsable, timeout or crash."""

    extracted: str | None
    correct: bool
    verdict: str


class Grader(Protocol):
    """Reads answers and judges them. `runs_code`: the answers are programs, which it runs."""

    @property
    def name(self) -> str: ...

    @property
    def runs_code(self) -> bool: ...

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold answer, response) pairs."""
        ...

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """Return what each sample of each problem, a gold answer and its samples' grades, votes for.

        A vote is a text: the gold answer where the sample is right, else the same for all wrong answers that are equal;
        None without an answer.
        """
        ...

    def readable(self, golds: Sequence[str]) -> list[bool]:
        """Return of each gold answer whether one in another spelling can be compared with it."""
        ...


@dataclass(frozen=True)
class Text:
    """Compares what `extract` finds with the gold answer, letter by letter."""

    extract: Callable[[str], str | None]
    name: str = "text"
    runs_code: bool = False

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        found = [(gold, self.extract(response)) for gold, response in pairs]
        return [Grade(answer, answer == gold, "ok" if answer is not None else "no_answer") for gold, answer in found]

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        return [[grade.extracted for grade in grades] for _, grades in problems]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        return [True] * len(golds)


@dataclass(frozen=True)
class Mathematics:
    """Compares the last \\boxed of a response with the gold answer by what they mean."""

    name: str = "mathematics"
    runs_code: bool = False

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        found = [last_boxed(response) for _, response in pairs]
        asked = [(gold, answer) for (gold, _), answer in zip(pairs, found, strict=True) if answer is not None]
        judged = iter(_judge(asked))
        return [Grade(None, False, "no_answer") if answer is None else Grade(answer, *next(judged)) for answer in found]

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """One answer a round is compared with all classes found so far, for all problems at once."""
        ballots = [_AnswerClusters(gold, grades) for gold, grades in problems]
        while any(ballot.open for ballot in ballots):
            asked = [ballot.questions() for ballot in ballots]
            judged = iter(_judge([pair for pairs in asked for pair in pairs]))
            for ballot, pairs in zip(ballots, asked, strict=True):
                ballot.settle([next(judged)[0] for _ in pairs])
        return [ballot.votes for ballot in ballots]

    def readable(self, golds: Sequence[str]) -> list[bool]:
        return [
            found is True
            for found in _in_workers(math_answers.is_parsable, [(math_answers.normalize(gold),) for gold in golds])
        ]


class _AnswerClusters:
    """One problem's vote while its classes of equal wrong answers are being found."""

    def __init__(self, gold: str, grades: Sequence[Grade]):
        self.votes = [gold if grade.correct else grade.extracted for grade in grades]
        wrong = {g.extracted: g.verdict for g in grades if not g.correct and g.extracted is not None}
        self.open = [answer for answer, verdict in wrong.items() if verdict in GRADABLE_VERDICTS]  # texts, each once
        self._classes: list[str] = []

    def questions(self) -> list[tuple[str, str]]:
        return [(known, self.open[0]) for known in self._classes] if self.open else []

    def settle(self, same: Sequence[bool]) -> None:
        if self.open:
            answer = self.open.pop(0)
            known = next((one for one, equal in zip(self._classes, same, strict=True) if equal), None)
            if known is None:
                self._classes.append(answer)
            else:
                self.votes = [known if vote == answer else vote for vote in self.votes]


def last_boxed(response: str) -> str | None:
    """Return what the last whole \\boxed{…} after any </think> holds, or None. One pass, whatever is left open."""
    text = response.rpartition("</think>")[2]
    opened: list[int | None] = []  # where a box's content begins; None for any other brace
    last: tuple[int, int] | None = None
    for brace in BRACE.finditer(text):
        if brace[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and (last is None or start > last[0]):
                last = (start, brace.start())
        elif brace[0] not in ("\\{", "\\}", "\\\\"):  # escaped ones are text
            opened.append(brace.end() if brace[0].startswith("\\") else None)
    # White space, dollar signs and a trailing period surround an answer without being one.
    return text[slice(*last)].strip(" \t\n$").rstrip(" \t\n$.\\") if last else None


mathematics = Mathematics()
text = Text(last_boxed)


# ── Worker processes ─────────────────────────────────────────────────────────────────────────────────────────────────


def _judge(pairs: Sequence[tuple[str, str]]) -> list[tuple[bool, str]]:
    """Return (whether they say the same, verdict) of (gold, answer) pairs. Equal pairs are judged once."""
    found: dict[tuple[str, str], tuple[bool, str]] = {}
    hard: dict[tuple[str, str], tuple[str, str]] = {}
    for gold, answer in dict.fromkeys(pairs):
        if not answer or len(answer) > math_answers.LONGEST:
            found[gold, answer] = (False, "unparsable")
            continue
        tidied = math_answers.normalize(gold), math_answers.normalize(answer)
        seen = math_answers.quick_compare(*tidied)
        if seen is None:
            hard[gold, answer] = tidied
        else:
            found[gold, answer] = (seen, "ok")
    for pair, result in zip(hard, _in_workers(math_answers.is_equivalent, list(hard.values())), strict=True):
        found[pair] = (result, "ok") if isinstance(result, bool) else (False, result)
    return [found[pair] for pair in pairs]


def _in_workers(function: Callable[..., bool], arguments: Iterable[tuple[str, ...]]) -> list[Any]:
    """Return function(*each) for each of `arguments`, or the verdict on what came of it instead."""
    futures = [_pool(os.getpid()).schedule(function, args=list(each), timeout=TIMEOUT_SECONDS) for each in arguments]
    return [_result(future) for future in futures]


def _result(future: Any) -> bool | str:
    try:
        return bool(future.result())
    except FutureTimeoutError:
        return "timeout"
    except (ProcessExpired, MemoryError, RecursionError):
        return "crash"
    except math_answers.UnreadableError:
        return "unparsable"


@cache
def _pool(owner: int) -> ProcessPool:
    """Return the workers of the process `owner`, which stay for the next answers: each takes a second to begin."""
    workers = min(len(os.sched_getaffinity(owner)), WORKERS)
    pool = ProcessPool(
        max_workers=workers,
        max_tasks=1000,
        initializer=math_answers.init_worker,
        context=multiprocessing.get_context("spawn"),
    )
    atexit.register(_close, pool, owner)
    return pool


def _close(pool: ProcessPool, owner: int) -> None:
    if os.getpid() == owner:
        pool.stop()
        pool.join()
