"""Prompts: read from the toy task, a file or the hub, put into the chat template, and tokenized."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from opdctl.artifacts.records import Prompt
from opdctl.data.cells import parse_cell, read_cell
from opdctl.data.columns import PROMPT_COLUMNS, find_prompt
from opdctl.data.messages import Message, parse_messages
from opdctl.data.rendering import PromptRenderer
from opdctl.data.tables import TableRow, load_from_hub, read_table
from opdctl.data.toy import TASKS
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.recipe.schema import TABLE_SUFFIXES, Prompts, is_data_file, teacher_name

MAX_LISTED_PROMPTS = 5  # in an error message


@dataclass(frozen=True)
class Problem:
    """A prompt before the chat template.

    text: the user's message. answer: the gold answer, if there is one. teacher: the name of its teacher in a run with
    several. teacher_text: the teacher's version of the text, if it differs. row: its number in the source, from 1.
    earlier, teacher_earlier: the messages of the chat before `text` and `teacher_text`.
    """

    id: str
    text: str
    answer: str | None
    teacher: str | None = None
    teacher_text: str | None = None
    row: int | None = field(default=None, compare=False)
    earlier: tuple[Message, ...] = ()
    teacher_earlier: tuple[Message, ...] = ()

    def location(self, source: str) -> str:
        """Return where the prompt is, for errors."""
        row = f"row {self.row}: " if self.row is not None else ""
        return f"{source}: {row}prompt `{self.id}`"


def tokenize(
    problems: list[Problem], renderer: PromptRenderer, settings: Prompts, teachers: Sequence[str] = ("teacher",)
) -> tuple[list[Prompt], int]:
    """Return the prompts of at most `max_tokens` tokens, in order, and the number of longer ones that were dropped.

    teachers: the names of the run's teachers. A prompt without a name has the first one.

    Raises:
        OpdctlError: a prompt is empty, cannot be tokenized, names an unknown teacher, or is too long and
            `prompts.on_too_long` is "error"; or no prompt is left.
    """
    prompts: list[Prompt] = []
    too_long: list[tuple[str, int]] = []
    for problem in problems:
        location = problem.location(settings.location)
        prompt_ids = renderer.token_ids(problem.text, location, problem.earlier)
        teacher_ids = None
        if problem.teacher_text is not None:
            for_teacher = f"{location} for the teacher"
            teacher_ids = renderer.token_ids(problem.teacher_text, for_teacher, problem.teacher_earlier)
        lengths = [len(ids) for ids in (prompt_ids, teacher_ids) if ids is not None]
        if max(lengths) > settings.max_tokens:
            too_long.append((problem.id, max(lengths)))
        elif not min(lengths):
            raise OpdctlError("invalid_data", f"{settings.location}: prompt `{problem.id}` has no tokens")
        else:
            teacher = _teacher_of(problem, settings, teachers)
            prompts.append(Prompt(problem.id, prompt_ids, problem.answer, teacher, teacher_ids))
    if too_long and settings.on_too_long == "error":
        shown = ", ".join(f"`{name}` with {length}" for name, length in too_long[:MAX_LISTED_PROMPTS])
        raise OpdctlError(
            "invalid_data",
            f"{settings.location}: {len(too_long)} prompts exceed prompts.max_tokens = {settings.max_tokens}: {shown}",
            hint='raise prompts.max_tokens, or set prompts.on_too_long = "drop"',
        )
    if not prompts:
        raise OpdctlError("invalid_data", f"{settings.location}: no prompts left after filtering")
    return prompts, len(too_long)


def _teacher_of(problem: Problem, settings: Prompts, teachers: Sequence[str]) -> str:
    if problem.teacher is None:
        return teachers[0]
    if (name := teacher_name(problem.teacher)) not in teachers:
        known = [teacher.removeprefix(teacher_name("")) for teacher in teachers]
        raise OpdctlError(
            "invalid_data",
            f"{settings.location}: prompt `{problem.id}`: no teacher `{problem.teacher}`"
            f"{did_you_mean(problem.teacher, known)}",
            hint=f"put a name of [teachers] into column `{settings.teacher_column}`",
        )
    return name


def load_problems(settings: Prompts) -> list[Problem]:
    """Read the prompts of the recipe, and check every row.

    Raises:
        OpdctlError: a row or the source is invalid, or the download fails.
    """
    problems = load_local_problems(settings)
    if problems is not None:
        return problems
    source, files = settings.source, settings.data_files
    rows = load_from_hub(source, settings.split, settings.revision, "prompts.source", data_files=files)
    return _parse_rows(rows, settings)


def load_local_problems(settings: Prompts) -> list[Problem] | None:
    """Read toy or local prompts, or return None for a hub data set. Raises OpdctlError as `load_problems` does."""
    if settings.source.startswith("toy:"):
        return _toy_problems(settings)
    path = Path(settings.source).expanduser()
    if is_data_file(settings.source):
        return _parse_rows(read_table(path), settings)
    if path.exists():
        suffixes = " or ".join(TABLE_SUFFIXES)
        raise OpdctlError("unsupported_setting", f"prompts.source: {path}: the name must end in {suffixes}")
    return None


def _toy_problems(settings: Prompts) -> list[Problem]:
    task = TASKS.get(settings.source.removeprefix("toy:"))
    if task is None:
        known = [f"toy:{name}" for name in TASKS]
        suggestion = did_you_mean(settings.source, known)
        raise OpdctlError("unknown_name", f"prompts.source: no toy task `{settings.source}`{suggestion}")
    for key in ("teacher_column", "teacher_prompt_column"):
        if getattr(settings, key):
            raise OpdctlError(
                "unsupported_setting",
                f"prompts.{key}: `{settings.source}` has no columns",
                hint="use prompts from a file or the hub",
            )
    try:
        stream = task.problems(settings.split, seed=0)
        return [Problem(p.id, _with_suffix(p.prompt, settings), p.answer) for p in islice(stream, settings.limit)]
    except ValueError as error:
        raise OpdctlError("unsupported_setting", f"prompts.split: {error}") from error


def _parse_rows(rows: Iterator[TableRow], settings: Prompts) -> list[Problem]:
    problems: list[Problem] = []
    row_numbers: dict[str, int] = {}
    duplicates: list[str] = []
    for number, row in islice(_filter_rows(rows, settings), settings.limit):
        problem = _parse_row(row, number, settings)
        if problem.id in row_numbers:
            duplicates.append(f"`{problem.id}` of row {row_numbers[problem.id]} in row {number}")
        row_numbers.setdefault(problem.id, number)
        problems.append(problem)
    if duplicates:
        more = ", …" if len(duplicates) > MAX_LISTED_PROMPTS else ""
        shown = ", ".join(duplicates[:MAX_LISTED_PROMPTS]) + more
        raise OpdctlError(
            "invalid_data",
            f"{settings.location}: {len(duplicates)} duplicate ids: {shown}",
            hint="give each prompt a unique id (prompts.id_column), or unset the column to use row numbers",
        )
    if not problems:
        condition = f"no row satisfies prompts.min_values = {settings.min_values}"
        reason = condition if settings.min_values else "contains no prompts"
        raise OpdctlError("invalid_data", f"{settings.location}: {reason}", hint="provide at least one prompt")
    return problems


def _parse_row(row: TableRow, number: int, settings: Prompts) -> Problem:
    location = f"{settings.location}: row {number}"
    name: Any = number - 1
    if settings.id_column:
        name = read_cell(row, settings.id_column, "prompts.id_column", location)
    names = (settings.prompt_column,) if settings.prompt_column else PROMPT_COLUMNS
    *earlier, last = parse_messages(*find_prompt(row, names, "prompts.prompt_column", location))
    problem = Problem(
        parse_cell(name, f"{location}: `{settings.id_column}`"),
        _with_suffix(last.text, settings),
        _answer_cell(row, settings, location),
        _teacher_cell(row, settings, location),
        row=number,
        earlier=tuple(earlier),
    )
    if settings.teacher_prompt_column is None:
        return problem
    names = (settings.teacher_prompt_column,)
    *earlier, last = parse_messages(*find_prompt(row, names, "prompts.teacher_prompt_column", location))
    return replace(problem, teacher_text=_with_suffix(last.text, settings), teacher_earlier=tuple(earlier))


def _with_suffix(text: str, settings: Prompts) -> str:
    """Return the text of a user message with the suffix, which is not repeated."""
    suffix = settings.suffix.rstrip()
    return text if suffix and text.rstrip().endswith(suffix) else text + settings.suffix


def _answer_cell(row: TableRow, settings: Prompts, location: str) -> str | None:
    if settings.answer_column is None:
        return None
    answer = read_cell(row, settings.answer_column, "prompts.answer_column", location)
    if isinstance(answer, dict):
        fields = ", ".join(f"`{settings.answer_column}.{name}`" for name in answer)
        reason = f"`{settings.answer_column}` (prompts.answer_column) has fields"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint=f"use one of the columns {fields}")
    return None if answer is None else parse_cell(answer, f"{location}: `{settings.answer_column}`")


def _teacher_cell(row: TableRow, settings: Prompts, location: str) -> str | None:
    if settings.teacher_column is None:
        return None
    name = read_cell(row, settings.teacher_column, "prompts.teacher_column", location)
    if not isinstance(name, str):
        raise OpdctlError("invalid_data", f"{location}: `{settings.teacher_column}` must be text, got {name!r}")
    return name


def _filter_rows(rows: Iterator[TableRow], settings: Prompts) -> Iterator[tuple[int, TableRow]]:
    """Yield (number from 1, row) of the rows that satisfy `prompts.min_values`."""
    for number, row in enumerate(rows, 1):
        location = f"{settings.location}: row {number}"
        if all(_number(row, column, location) >= minimum for column, minimum in settings.min_values.items()):
            yield number, row


def _number(row: TableRow, column: str, location: str) -> float:
    value = read_cell(row, column, "prompts.min_values", location)
    if value is None:
        return -math.inf  # null satisfies no minimum
    if isinstance(value, bool) or not isinstance(value, int | float):
        reason = f"`{column}` (prompts.min_values) must be a number, got {value!r}"
        raise OpdctlError("invalid_data", f"{location}: {reason}")
    return value
