"""LiveCodeBench: programs that read stdin, or methods of a class, are run on the tests of a contest's problem.

Problems, prompts, extraction and comparison are those of LiveCodeBench's scenario `codegeneration`. The tests of all
problems take gigabytes: they stay in their files, are read again for each part of an evaluation, and those of a few
problems are in memory at the same time. The expected outputs never enter the sandbox.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import parsing
from opdctl.data.cells import check_unicode, parse_cell
from opdctl.data.messages import Message
from opdctl.data.prompts import Problem
from opdctl.data.tables import TableRow, read_table
from opdctl.errors import OpdctlError, summarize_exception
from opdctl.evaluation.code_processes import (
    MAX_SANDBOXES,
    SPARE_OUTPUT_BYTES,
    TooLongError,
    check_sandbox,
    run_sandbox,
)
from opdctl.evaluation.code_values import MalformedValueError, decode
from opdctl.evaluation.graders import Grade, WithoutMajority
from opdctl.evaluation.pickled_text import decompress, read_pickled_text

DATASET, REVISION = "livecodebench/code_generation_lite", "48d36ed304dca42cf8ab20e941262ccd096518a3"
"""At this commit each release is a directory of Parquet files. The newest one has a loading script."""
NEW_PROBLEMS = {"v1": 400, "v2": 111, "v3": 101, "v4": 101, "v5": 167, "v6": 175}
"""The problems that each version added. release_vN has those of the first N."""
TIME_LIMIT_SECONDS = 6.0
"""Of one test. Source: `lcb_runner.evaluation.testing_util.run_test`."""
GRACE_SECONDS, SPARE_SECONDS = 1.0, 5.0
"""A response has this much more for each test, and in all. Source: `check_correctness` there."""
MAX_TESTS_BYTES = parsing.MAX_JSON_BYTES
"""Of the tests of one problem, as JSON."""
ENCODED_FACTOR = 16
"""A response may return this many times as many bytes as expected: nested lists take five times as many here."""
SYSTEM_MESSAGE = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program."
)
WITH_STARTER_CODE = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
WITHOUT_STARTER_CODE = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows."
)
"""The prompt of `lcb_runner.prompts.code_generation` for chat models (`get_generic_question_template_answer`)."""
ROW_COLUMNS = (
    *("question_id", "question_content", "starter_code", "contest_date"),
    *("public_test_cases", "private_test_cases", "metadata"),
)
DATA_HINT = "give a file of livecodebench/code_generation_lite, such as test6.jsonl"


# ── Problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ProblemTests:
    """The tests of a problem, the public ones first. function: the name of the method to call; None reads stdin."""

    function: str | None
    inputs: list[str]
    outputs: list[str]


@dataclass
class Questions:
    """The problems of a release between two dates, and their tests. files: those of the last call of `problems`."""

    release: str
    start_date: str | None = None
    end_date: str | None = None
    is_local: bool = False
    files: list[Path] = field(default_factory=list)

    @property
    def location(self) -> str:
        return f"{DATASET}@{REVISION}"

    @property
    def size(self) -> int | None:
        """The number of problems; None between dates."""
        if self.start_date or self.end_date:
            return None
        versions = [*NEW_PROBLEMS]
        number = versions.index(self.release.removeprefix("release_")) + 1
        return sum(NEW_PROBLEMS[each] for each in versions[0 if "_" in self.release else number - 1 : number])

    def problems(self, name: str, limit: int | None, data: Path | None) -> Iterator[Problem]:
        """Yield the problems. The gold answer is a reference to the tests: their problem and their checksum."""
        self.files = _find_files(self.release, data) if data else _download(self.release)
        for location, row in self._rows():
            question = parse_cell(row["question_id"], f"{location}: `question_id`")
            _check_tests(row, location)
            gold = json.dumps({"question_id": question, "tests": _tests_digest(row)})
            yield Problem(question, _prompt(row), gold, earlier=(Message("system", SYSTEM_MESSAGE),))

    def tests(self, questions: Mapping[str, Any]) -> Iterator[tuple[str, ProblemTests]]:
        """Yield the tests of these problems, in the order of the files."""
        remaining = {*questions}
        for location, row in self._rows():
            if (name := str(row["question_id"])) in remaining:
                yield name, _read_tests(row, location)
                remaining.discard(name)
            if not remaining:
                return

    def _rows(self) -> Iterator[tuple[str, TableRow]]:
        for path in self.files:
            for number, row in enumerate(read_table(path), 1):
                location = f"{path}: row {number}"
                if missing := [column for column in ROW_COLUMNS if row.get(column) is None]:
                    raise OpdctlError("invalid_data", f"{location}: no `{missing[0]}`", hint=DATA_HINT)
                if (self.start_date or "") <= _contest_date(row, location) <= (self.end_date or "9999-12-31"):
                    yield location, row


def _contest_date(row: TableRow, location: str) -> str:
    value = row["contest_date"]
    try:
        return (value if isinstance(value, datetime) else datetime.fromisoformat(value)).date().isoformat()
    except (TypeError, ValueError):
        reason = f"`contest_date` must be a date such as 2025-02-01, got {value!r:.80}"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint=DATA_HINT) from None


def _prompt(row: TableRow) -> str:
    starter = row["starter_code"]
    instruction, code = (WITH_STARTER_CODE, starter) if starter else (WITHOUT_STARTER_CODE, "# YOUR CODE HERE")
    return (
        f"### Question:\n{row['question_content']}\n\n### Format: {instruction}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def _download(release: str) -> list[Path]:
    """Return the Parquet files of a release; the first call downloads them into the hub's cache."""
    import huggingface_hub

    pattern = f"{release}/test-*.parquet"
    try:
        root = huggingface_hub.snapshot_download(
            DATASET, repo_type="dataset", revision=REVISION, allow_patterns=pattern
        )
        if files := sorted(Path(root).glob(pattern)):
            return files
        reason = f"no {pattern}"
    except Exception as error:  # huggingface_hub raises its own errors, and those of httpx and the OS
        reason = summarize_exception(error)
    raise OpdctlError(
        "failed_download",
        f"--bench livecodebench: `{DATASET}`: {reason}",
        hint="give local copies by --data FILE_OR_DIR, such as test6.jsonl; or run it once with a network",
    )


def _find_files(release: str, data: Path) -> list[Path]:
    """Return `data` if it is a file, or the files of a release in a copy of the data set."""
    if not data.is_dir():
        return [data]
    if files := sorted((data / release).glob("test-*.parquet")) or sorted(data.glob("livecodebench.*")):
        return files
    number = int(release[-1])
    numbers = range(1, number + 1) if release.startswith("release_") else [number]
    files = [data / f"test{each if each > 1 else ''}.jsonl" for each in numbers]
    if missing := [file.name for file in files if not file.is_file()]:
        raise OpdctlError("missing_file", f"--data {data}: no {release}/test-*.parquet and no {', '.join(missing)}")
    return files


# ── Tests ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_checked: set[str] = set()
"""Digests of tests that were read once: every evaluation of a run reads the problems."""


def _tests_digest(row: TableRow) -> str:
    digest = hashlib.sha256()
    for column in ("public_test_cases", "private_test_cases", "metadata"):
        digest.update(f"{row[column]}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _check_tests(row: TableRow, location: str) -> None:
    if (digest := _tests_digest(row)) not in _checked:
        _read_tests(row, location)
        _checked.add(digest)


def _read_tests(row: TableRow, location: str) -> ProblemTests:
    """Return the tests in a row.

    Raises:
        OpdctlError: there are none, or they are not in LiveCodeBench's form.
    """
    try:
        metadata = parsing.parse_json(row["metadata"])
        private = row["private_test_cases"]
        private = private if private.lstrip().startswith("[") else _decode_private(private)
        cases = [case for text in (row["public_test_cases"], private) for case in parsing.parse_json(text)]
        tests = ProblemTests(
            metadata.get("func_name"), [case["input"] for case in cases], [case["output"] for case in cases]
        )
        for text in (*tests.inputs, *tests.outputs):
            check_unicode(text, location)
        if tests.function is not None:
            for text in tests.outputs:
                json.loads(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else summarize_exception(error)
        reason = f"the tests cannot be read: {why}"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint=DATA_HINT) from None
    if not tests.inputs:
        raise OpdctlError("invalid_data", f"{location}: no tests", hint=DATA_HINT)
    return tests


def _decode_private(encoded: str) -> str:
    """Return the JSON of private tests: base64 of zlib of a pickled text.

    Raises:
        ValueError: it is something else, or too large.
    """
    try:
        compressed = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    return read_pickled_text(decompress(compressed, MAX_TESTS_BYTES))


# ── Grades ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Programs(WithoutMajority):
    """Runs the program of a response on the tests of its problem. The first test that it fails decides."""

    questions: Questions
    name: str = "livecodebench"
    runs_code: bool = True
    package: None = None

    @property
    def rules(self) -> dict[str, Any]:
        return {"grader_version": 1, "time_limit_seconds": TIME_LIMIT_SECONDS}

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grade (reference to the tests, response) pairs.

        Raises:
            OpdctlError: the sandbox is not available, or the tests are not those of the reference.
        """
        _check_sandbox()
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, (gold, _) in enumerate(pairs):
            numbers[json.loads(gold)["question_id"]].append(number)
        grades: dict[int, Future[Grade]] = {}
        workers = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(workers) as pool:
            try:
                for name, tests in self.questions.tests(numbers):
                    for number in numbers[name]:
                        grades[number] = pool.submit(_grade, name, tests, pairs[number][1])
                        # A response that waits keeps its tests in memory.
                        waiting = [each for each in grades.values() if not each.done()]
                        while len(waiting) > workers:
                            waiting = [*wait(waiting, return_when=FIRST_COMPLETED).not_done]
                if missing := [name for name, of_name in numbers.items() if of_name[0] not in grades]:
                    detail = f"{self.questions.location}: the tests of problem `{missing[0]}` are gone"
                    raise OpdctlError("invalid_data", detail, hint="keep the data unchanged during an evaluation")
                return [grades[number].result() for number in range(len(pairs))]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def are_parsable(self, golds: Sequence[str]) -> list[bool]:
        """Return True for each problem: its tests have been read, and there is no reference solution."""
        return [True] * len(golds)


def extract_program(response: str) -> str:
    """Return the code between the last two lines with three backticks, after any </think>; "" if there are none."""
    lines = response.rpartition("</think>")[2].split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def _grade(question: str, tests: ProblemTests, response: str) -> Grade:
    if not (code := extract_program(response)):
        return Grade(None, False, "no_answer")
    request = _request(question, code, tests.function, tests.inputs)
    max_bytes = ENCODED_FACTOR * len(json.dumps(tests.outputs)) + len(tests.outputs) * SPARE_OUTPUT_BYTES
    seconds = (TIME_LIMIT_SECONDS + GRACE_SECONDS) * len(tests.inputs) + SPARE_SECONDS
    for _ in range(MAX_SANDBOXES):
        status = _run_tests(request, tests, max_bytes, seconds)
        if status != "crash":
            break
    return Grade(code, status == "pass", status if status in ("timeout", "crash") else "ok")


def _request(question: str, code: str, function: str | None, inputs: list[str]) -> dict[str, Any]:
    """Return a request to code_sandbox.py."""
    return {
        "task_id": question,
        "code": code,
        "function": function,
        "tests": inputs,
        "limit": TIME_LIMIT_SECONDS,
    }


def _run_tests(request: dict[str, Any], tests: ProblemTests, max_bytes: int, seconds: float) -> str:
    """Return the status of a response: pass, fail, timeout or crash."""
    accepts = accepts_output if tests.function is None else accepts_value
    try:
        with contextlib.closing(run_sandbox(request, max_bytes, seconds)) as messages:
            for expected in tests.outputs:
                if (status := _run_test(messages, partial(accepts, expected=expected))) != "pass":
                    return status
    except subprocess.TimeoutExpired:
        return "timeout"
    except (MalformedValueError, ValueError):
        return "crash"
    except TooLongError:
        return "fail"
    return "pass"


def _run_test(messages: Iterator[list[Any]], accepts: Callable[[Any], bool]) -> str:
    """Return the status of one test. Its process returned one value, or none."""
    has_passed = False
    for kind, *contents in messages:
        if kind == "end":
            ending, exit_code = contents
            if not has_passed:
                console.debug(f"a test of LiveCodeBench: {ending}, exit code {exit_code}")
            return "pass" if has_passed else "fail" if ending == "timeout" else "crash"
        if kind != "value" or has_passed or not accepts(decode(contents[1])):
            return "fail"
        has_passed = True
    return "crash"  # of the sandbox


def accepts_output(found: Any, expected: str) -> bool:
    """Return whether a program's output is correct: line by line, equal as text or as decimal numbers."""
    lines, wanted = (_stripped_lines(str(text)) for text in (found, expected))
    return len(lines) == len(wanted) and all(map(_is_equal_line, lines, wanted))


def _stripped_lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _is_equal_line(found: str, expected: str) -> bool:
    if found == expected:
        return True
    try:
        return [Decimal(word) for word in found.split()] == [Decimal(word) for word in expected.split()]
    except ArithmeticError:
        return False


def accepts_value(found: Any, expected: str) -> bool:
    """Return whether a function's value is the expected JSON. A tuple counts as a list, one within it does not."""
    value = list(found) if isinstance(found, tuple) else found
    try:
        return bool(value == json.loads(expected))
    except Exception:  # as there, a comparison that fails is a difference: an array of several elements has no truth
        return False


@cache
def _check_sandbox() -> None:
    """Run a correct program in the sandbox and say which wall is missing.

    Raises:
        OpdctlError: the program does not run.
    """
    check_sandbox(_request("echo", "print(input())", None, ["1", "2"]), ["1\n", "2\n"], 60.0)
