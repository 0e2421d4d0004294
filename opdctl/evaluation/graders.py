"""Graders: whether a response's answer is the gold answer. Mathematics is compared in worker processes.

math-verify can hang or crash on an answer. Each worker can be killed alone, so such an answer affects no other grade.
It counts as incorrect, and its verdict is the reason.
"""

import atexit
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from opdctl.evaluation import math_answers

MATH_TIMEOUT_SECONDS = 15  # of one pair; pebble requires an integer
MAX_WORKERS = 8
MAX_TASKS_PER_WORKER = 1000
BOX_OR_BRACE_PATTERN = re.compile(r"\\boxed\s*\{|\\\\|\\[{}]|[{}]")
GRADABLE_VERDICTS = ("ok", "unparsable")
"""Verdicts of answers that can be compared with other answers."""
BOX_RULES: dict[str, Any] = {"grader_version": 2}
"""Rules of the graders that read a \\boxed. Version 1 read the last closed one, even if an open one followed."""
MATH_RULES: dict[str, Any] = {"grader_version": 3}
"""Rules of mathematics. In version 2, opdctl normalized the texts before math-verify compared them."""
Votes = list[list[str | None]]


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of one response. verdict: ok (the answer was compared), no_answer, unparsable, timeout or crash.

    math_verify: whether math-verify alone calls the answer correct; None where it is not asked.
    """

    extracted: str | None
    correct: bool
    verdict: str
    math_verify: bool | None = None


class Grader(Protocol):
    """Extracts answers and compares them with the gold answers.

    rules: what else decides a grade, by protocol key. Without the key `grader_version` the version is 1, as in older
    summaries. runs_code: the answers are programs that it runs. package: the one that compares the answers.
    """

    @property
    def name(self) -> str: ...

    @property
    def rules(self) -> dict[str, Any]: ...

    @property
    def runs_code(self) -> bool: ...

    @property
    def package(self) -> str | None: ...

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (gold answer, response) pairs."""
        ...

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """Return the vote of each sample, for problems given as (gold answer, grades of the samples).

        The vote of a correct sample is the gold answer. Equal incorrect answers have the same vote. The vote is None
        without an answer.
        """
        ...

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        """Return for each gold answer whether it can be compared with an answer in a different notation."""
        ...


@dataclass(frozen=True)
class Text:
    """Compares the extracted text with the gold answer, character by character."""

    extract: Callable[[str], str | None]
    rules: dict[str, Any] = field(default_factory=dict)
    name: str = "text"
    runs_code: bool = False
    package: None = None

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        answers = [(gold, self.extract(response)) for gold, response in pairs]
        return [Grade(answer, answer == gold, "ok" if answer is not None else "no_answer") for gold, answer in answers]

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        return [[grade.extracted for grade in grades] for _, grades in problems]

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        return [True] * len(golds)


@dataclass(frozen=True)
class Mathematics:
    """Compares the last \\boxed of a response with the gold answer by its mathematical value.

    has_typed_values: opdctl's rules decide before math-verify does; else math-verify decides alone.
    """

    rules: dict[str, Any] = field(default_factory=MATH_RULES.copy)
    name: str = "mathematics"
    has_typed_values: bool = True
    runs_code: bool = False
    package: str = "math-verify"

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        answers = [last_boxed(response) for _, response in pairs]
        answered = [(gold, answer) for (gold, _), answer in zip(pairs, answers, strict=True) if answer is not None]
        graded = iter(_compare_pairs(answered, self.has_typed_values))
        return [Grade(None, False, "no_answer", False) if answer is None else next(graded) for answer in answers]

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """Each round compares one answer per problem with the known clusters, for all problems at once."""
        clusters = [_AnswerClusters(gold, grades) for gold, grades in problems]
        while any(each.pending for each in clusters):
            pairs_by_problem = [each.next_pairs() for each in clusters]
            all_pairs = [pair for pairs in pairs_by_problem for pair in pairs]
            compared = iter(_compare_pairs(all_pairs, self.has_typed_values))
            for each, pairs in zip(clusters, pairs_by_problem, strict=True):
                each.assign([next(compared).correct for _ in pairs])
        return [each.votes for each in clusters]

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        arguments = [(gold, self.has_typed_values) for gold in golds]
        return [result is True for result in _run_in_workers(math_answers.is_parsable, arguments)]


class _AnswerClusters:
    """The votes of one problem, while its equal incorrect answers are clustered. pending: distinct unassigned texts."""

    def __init__(self, gold: str, grades: Sequence[Grade]):
        self.votes = [gold if grade.correct else grade.extracted for grade in grades]
        incorrect = {g.extracted: g.verdict for g in grades if not g.correct and g.extracted is not None}
        self.pending = [answer for answer, verdict in incorrect.items() if verdict in GRADABLE_VERDICTS]
        self._representatives: list[str] = []

    def next_pairs(self) -> list[tuple[str, str]]:
        """Return the first pending answer paired with the representative of each cluster."""
        return [(known, self.pending[0]) for known in self._representatives] if self.pending else []

    def assign(self, are_equal: Sequence[bool]) -> None:
        """Assign the first pending answer to the first cluster that it equals, or to a new one."""
        if not self.pending:
            return
        answer = self.pending.pop(0)
        matches = (known for known, equal in zip(self._representatives, are_equal, strict=True) if equal)
        representative = next(matches, None)
        if representative is None:
            self._representatives.append(answer)
        else:
            self.votes = [representative if vote == answer else vote for vote in self.votes]


def last_boxed(response: str) -> str | None:
    """Return the content of the last \\boxed{…} after any </think>, or None if there is none or it is never closed.

    One pass over the text, so unclosed braces do not make it slow. A \\boxed without a brace is text.
    """
    text = response.rpartition("</think>")[2]
    start, end, depth = None, None, 0  # of the last box's content; open braces since its start
    for match in BOX_OR_BRACE_PATTERN.finditer(text):
        if match[0].startswith("\\boxed"):
            start, end, depth = match.end(), None, 1
        elif match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0 and end is None:
                end = match.start()
    # White space, dollar signs and a trailing period around an answer do not belong to it.
    return None if start is None or end is None else text[start:end].strip(" \t\n$").rstrip(" \t\n$.\\")


MATH_GRADER = Mathematics()
BOX_GRADERS: dict[str, Grader] = {
    "mathematics": MATH_GRADER,
    "math-verify": Mathematics(BOX_RULES.copy(), "math-verify", has_typed_values=False),
    "text": Text(last_boxed, BOX_RULES),
}
"""Graders of answers in a box, by the value of eval.grader."""


# ── Worker processes ─────────────────────────────────────────────────────────────────────────────────────────────────


def _compare_pairs(pairs: Sequence[tuple[str, str]], has_typed_values: bool) -> list[Grade]:
    """Return the grades of (gold, answer) pairs. Identical pairs are compared once."""
    is_short = {pair: 0 < len(pair[1]) <= math_answers.MAX_ANSWER_CHARS for pair in pairs}
    arguments = [(*pair, has_typed_values) for pair, short in is_short.items() if short]
    compared = iter(_run_in_workers(math_answers.judge, arguments))
    grades = {}
    for pair, short in is_short.items():
        result = next(compared) if short else "unparsable"
        correct, plain, verdict = (False, False, result) if isinstance(result, str) else (*result, "ok")
        grades[pair] = Grade(pair[1], correct, verdict, plain)
    return [grades[pair] for pair in pairs]


def _run_in_workers(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the function's result for each tuple of arguments, or the verdict on its failure."""
    pool = _pool(os.getpid())
    futures = [pool.schedule(function, args=list(values), timeout=MATH_TIMEOUT_SECONDS) for values in arguments]
    return [_result_or_verdict(future) for future in futures]


def _result_or_verdict(future: Any) -> Any:
    try:
        return future.result()
    except FutureTimeoutError:
        return "timeout"
    except (ProcessExpired, MemoryError, RecursionError):
        return "crash"
    except math_answers.UnparsableError:
        return "unparsable"


@cache
def _pool(owner: int) -> ProcessPool:
    """Return the workers of the process `owner`. They are kept, since each takes a second to start."""
    pool = ProcessPool(
        max_workers=min(len(os.sched_getaffinity(owner)), MAX_WORKERS),
        max_tasks=MAX_TASKS_PER_WORKER,
        initializer=math_answers.init_worker,
        context=multiprocessing.get_context("spawn"),
    )
    atexit.register(_close, pool, owner)
    return pool


def _close(pool: ProcessPool, owner: int) -> None:
    if os.getpid() == owner:
        pool.stop()
        pool.join()
