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
from itertools import combinations
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

from opdctl.evaluation import math_answers

MATH_TIMEOUT_SECONDS = 15  # of one pair; pebble requires an integer
MAX_WORKERS = 8
MAX_TASKS_PER_WORKER = 1000
BOX_OR_BRACE_PATTERN = re.compile(r"\\boxed\s*\{|\\\\|\\[{}]|[{}]")
GRADABLE_VERDICTS = ("ok", "unparsable")
"""Verdicts of answers that can be compared with other answers."""
CHOICE = r"\(?([B-HJ]\b|A\b|I\b(?!\s+[a-z]))"
STATED_CHOICE_PATTERN = re.compile(
    r"\\boxed\s*\{\s*(?:\\(?:text|textbf|textrm|mathrm|mathbf|bf|rm)\s*\{?\s*)?\(?([A-Ja-j])(?![A-Za-z0-9'_^])"
    rf"|(?i:answer)(?:[\s:*_\"'$\[{{=]|(?i:is|option|choice|letter)\b)*{CHOICE}"
)
"""A letter in a box, or after the word `answer`."""
LONE_CHOICE_PATTERN = re.compile(r"\(([A-J])\)|^[\W_]*([A-J])[\W_]*$", re.MULTILINE)
"""A letter in parentheses, or alone on its line."""
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


class WithoutMajority:
    """The base class of graders of programs, among which there is no majority."""

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        """Return no votes."""
        return [[None] * len(grades) for _, grades in problems]


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
    """Compares the extracted text with the gold answer, character by character. is_gold: whether any can be equal."""

    extract: Callable[[str], str | None]
    rules: dict[str, Any] = field(default_factory=dict)
    name: str = "text"
    is_gold: Callable[[str], Any] = bool
    runs_code: bool = False
    package: None = None

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        answers = [(gold, self.extract(response)) for gold, response in pairs]
        return [Grade(answer, answer == gold, "ok" if answer is not None else "no_answer") for gold, answer in answers]

    def votes(self, problems: Sequence[tuple[str, Sequence[Grade]]]) -> Votes:
        return [[grade.extracted for grade in grades] for _, grades in problems]

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        return [bool(self.is_gold(gold)) for gold in golds]


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
        """Each incorrect answer has the vote of the first answer that it equals."""
        distinct = [_incorrect_answers(grades) for _, grades in problems]
        pairs = list({pair: None for answers in distinct for pair in combinations(answers, 2)})
        compared = zip(pairs, _compare_pairs(pairs, self.has_typed_values), strict=True)
        equal = {pair for pair, grade in compared if grade.correct}
        votes = []
        for (gold, grades), answers in zip(problems, distinct, strict=True):
            first: dict[str, str] = {}
            for answer in answers:
                first[answer] = next((known for known in first.values() if (known, answer) in equal), answer)
            votes.append([gold if g.correct else first.get(g.extracted or "", g.extracted) for g in grades])
        return votes

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        arguments = [(gold, self.has_typed_values) for gold in golds]
        return [result is True for result in _run_in_workers(math_answers.is_parsable, arguments)]


def _incorrect_answers(grades: Sequence[Grade]) -> list[str]:
    """Return the distinct incorrect answers that can be compared."""
    incorrect = [grade for grade in grades if not grade.correct and grade.verdict in GRADABLE_VERDICTS]
    return list({grade.extracted: None for grade in incorrect if grade.extracted})


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


def last_choice(response: str) -> str | None:
    """Return the letter of the choice that a response ends with, after any </think>, or None.

    The last letter in a box or after the word `answer` counts; if there is none, the last one in parentheses or alone
    on its line.
    """
    text = response.rpartition("</think>")[2]
    for pattern in (STATED_CHOICE_PATTERN, LONE_CHOICE_PATTERN):
        if letters := [one or other for one, other in pattern.findall(text)]:
            return letters[-1].upper()
    return None


MATH_GRADER = Mathematics()
CHOICE_GRADER = Text(last_choice, name="choice", is_gold=re.compile("[A-J]").fullmatch)
GRADERS: dict[str, Grader] = {
    "mathematics": MATH_GRADER,
    "math-verify": Mathematics(BOX_RULES.copy(), "math-verify", has_typed_values=False),
    "text": Text(last_boxed, BOX_RULES),
    "choice": CHOICE_GRADER,
}
"""Graders by the value of eval.grader."""


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
