"""Grades: is this response's answer the gold answer? Mathematics is judged by math-verify in worker processes.

math-verify can hang or die on an answer. Each worker can be killed alone, so such an answer costs its own grade only:
it is wrong, and the verdict says why.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from pebble import ProcessExpired, ProcessPool

SECONDS = 15
WORKERS = 2
BRACE = re.compile(r"\\boxed\s*\{|\\\\|\\[{}]|[{}]")
INTEGER = re.compile(r"[+-]?\d{1,18}")


@dataclass(frozen=True, slots=True)
class Grade:
    """verdict: ok (it could be judged), no_answer, unparsable, timeout or crash."""

    extracted: str | None
    correct: bool
    verdict: str


Grader = Callable[[Sequence[tuple[str, str]]], list[Grade]]


def exact(extract: Callable[[str], str | None]) -> Grader:
    """Return a grader of (gold, response) pairs that compares what `extract` finds with the gold answer as text."""

    def grade(pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        found = [(gold, extract(response)) for gold, response in pairs]
        return [Grade(answer, answer == gold, "ok" if answer is not None else "no_answer") for gold, answer in found]

    return grade


def mathematics(pairs: Sequence[tuple[str, str]]) -> list[Grade]:
    """Grade (gold, response) pairs by the last \\boxed of each response. Plain integers are compared as integers."""
    answers = [last_boxed(response) for _, response in pairs]
    grades: dict[int, Grade] = {}
    hard: list[int] = []
    for index, ((gold, _), answer) in enumerate(zip(pairs, answers, strict=True)):
        if answer is None:
            grades[index] = Grade(None, False, "no_answer")
        elif INTEGER.fullmatch(gold.strip()) and INTEGER.fullmatch(answer):
            grades[index] = Grade(answer, int(gold) == int(answer), "ok")
        else:
            hard.append(index)
    for index, (correct, verdict) in zip(hard, _judge([(pairs[i][0], answers[i] or "") for i in hard]), strict=True):
        grades[index] = Grade(answers[index], correct, verdict)
    return [grades[index] for index in range(len(pairs))]


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
    return _stripped(text[slice(*last)]) if last else None


def _stripped(answer: str) -> str:
    """Take off what surrounds an answer without being one: white space, dollar signs, a trailing period."""
    while (bare := answer.strip(" \t\n$").removesuffix(".").removesuffix("\\")) != answer:
        answer = bare
    return answer


def _judge(pairs: Sequence[tuple[str, str]]) -> list[tuple[bool, str]]:
    if not pairs:
        return []
    # gmpy2, where sympy finds it, hangs for ever or aborts on towers of powers.
    os.environ["SYMPY_GROUND_TYPES"] = "python"
    judged = []
    with ProcessPool(max_workers=WORKERS, context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.schedule(_equal, args=list(pair), timeout=SECONDS) for pair in pairs]
        for future in futures:
            try:
                judged.append(future.result())
            except FutureTimeoutError:
                judged.append((False, "timeout"))
            except (ProcessExpired, MemoryError, RecursionError):
                judged.append((False, "crash"))
    return judged


def _equal(gold: str, answer: str) -> tuple[bool, str]:
    """Judge one pair; runs in a worker, whose main thread math-verify's own time limits need."""
    from math_verify import parse, verify

    try:
        want = parse(f"\\boxed{{{gold}}}", raise_on_error=True)
        got = parse(f"\\boxed{{{answer}}}", raise_on_error=True)
        return (bool(verify(want, got, raise_on_error=True)), "ok") if want and got else (False, "unparsable")
    except (MemoryError, RecursionError):
        raise  # the worker's end, not the answer's form
    except Exception:  # math-verify passes on whatever sympy and its parser raise
        return False, "unparsable"
