"""Prompts: from the embedded task, a file or the hub, through the chat template, to token ids."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opdctl.artifacts.records import Prompt
from opdctl.data.tables import Row, load_from_hub, read_table
from opdctl.data.toy import TASKS
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.recipe.schema import TABLE_SUFFIXES, Prompts, is_data_file, teacher_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN_CHARS = 5  # faulty rows that a message names


@dataclass(frozen=True)
class Problem:
    """A prompt's text before the template, with its id, the gold answer where there is one, the name of its teacher
    where there are several, and the text that the teacher reads where it is another."""

    id: str
    text: str
    answer: str | None
    teacher: str | None = None
    teacher_text: str | None = None


def tokenize(
    problems: list[Problem],
    tokenizer: "PreTrainedTokenizerBase",
    settings: Prompts,
    teachers: Sequence[str] = ("teacher",),
) -> tuple[list[Prompt], int]:
    """Return the prompts that fit, in their order, and how many were dropped for their length.

    teachers: the names of the run's teachers; a prompt that names none has the only one. Raises OpdctlError (code 3)
    when a prompt is too long and the recipe says `too_long = "error"`, when one names a teacher that there is not, or
    when none is left.
    """
    prompts, too_long = [], []
    for problem in problems:
        own, *others = (
            np.asarray(apply_chat_template(problem.id, text, tokenizer, settings.template_arguments), np.int32)
            for text in (problem.text, problem.teacher_text)
            if text is not None
        )
        lengths = [len(ids) for ids in (own, *others)]
        if max(lengths) > settings.max_tokens:
            too_long.append((problem.id, max(lengths)))
        elif not min(lengths):
            raise OpdctlError(f"{settings.source}: prompt `{problem.id}` has no tokens", code=ExitCode.BAD_DATA)
        else:
            teacher = _teacher(problem, settings, teachers)
            prompts.append(Prompt(problem.id, own, problem.answer, teacher, *others))
    if too_long and settings.on_too_long == "error":
        shown = ", ".join(f"`{name}` with {length}" for name, length in too_long[:MAX_SHOWN_CHARS])
        raise OpdctlError(
            f"{settings.source}: {len(too_long)} prompts are longer than prompts.max_tokens = {settings.max_tokens}: "
            f"{shown}",
            hint='raise prompts.max_tokens, or leave them out with prompts.on_too_long = "drop"',
            code=ExitCode.BAD_DATA,
        )
    if not prompts:
        raise OpdctlError(f"{settings.source}: no prompts are left", code=ExitCode.BAD_DATA)
    return prompts, len(too_long)


def _teacher(problem: Problem, settings: Prompts, teachers: Sequence[str]) -> str:
    if problem.teacher is None:
        return teachers[0]
    if (name := teacher_name(problem.teacher)) not in teachers:
        known = [each.removeprefix(teacher_name("")) for each in teachers]
        raise OpdctlError(
            f"{settings.source}: prompt `{problem.id}`: no teacher `{problem.teacher}`"
            f"{did_you_mean(problem.teacher, known)}",
            hint=f"column `{settings.teacher_column}` must hold one of [teachers]",
            code=ExitCode.BAD_DATA,
        )
    return name


def apply_chat_template(
    name: str, text: str, tokenizer: "PreTrainedTokenizerBase", arguments: dict[str, Any]
) -> list[int]:
    """Return the token ids of one user turn, ready to be answered; a tokenizer without a template gets plain text.

    Raises OpdctlError (code 3) when the template or the tokenizer refuses the text.
    """
    try:
        if not tokenizer.chat_template:
            return list(tokenizer(text)["input_ids"])
        turn = [{"role": "user", "content": text}]
        # A template's variables cannot be listed, so a typo among `arguments` goes unseen.
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **arguments)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    except Exception as error:  # tokenizers raises bare Exception, a template whatever it likes
        raise OpdctlError(
            f"prompt `{name}` cannot be written in this tokenizer: {error}",
            hint=f"its text begins {text[:60]!r}",
            code=ExitCode.BAD_DATA,
        ) from error


def load_problems(settings: Prompts) -> list[Problem]:
    """Read the prompts that the recipe names, checked row by row.

    Raises OpdctlError: code 3 for bad data, with file and row; 5 when the hub cannot be reached.
    """
    found = load_local_problems(settings)
    if found is not None:
        return found
    rows = load_from_hub(settings.source, settings.split, settings.revision, "prompts.source")
    return _checked(rows, settings)


def load_local_problems(settings: Prompts) -> list[Problem] | None:
    """Read embedded or local prompts, or return None for a hub data set. Raises OpdctlError as `load_problems` does."""
    if settings.source.startswith("toy:"):
        return _embedded(settings)
    path = Path(settings.source).expanduser()
    if is_data_file(settings.source):
        return _checked(read_table(path), settings)
    if path.exists():
        raise OpdctlError(f"prompts.source: {path}: must end in {' or '.join(TABLE_SUFFIXES)}")
    return None


def _embedded(settings: Prompts) -> list[Problem]:
    task = TASKS.get(settings.source.removeprefix("toy:"))
    if task is None:
        known = [f"toy:{name}" for name in TASKS]
        raise OpdctlError(f"prompts.source: no embedded task `{settings.source}`{did_you_mean(settings.source, known)}")
    for key in ("teacher_column", "teacher_prompt_column"):
        if getattr(settings, key):
            raise OpdctlError(f"prompts.{key}: `{settings.source}` has no columns", hint="it needs a file of prompts")
    try:
        stream = task.problems(settings.split, seed=0)
        return [Problem(p.id, p.prompt + settings.suffix, p.answer) for p in islice(stream, settings.limit)]
    except ValueError as error:
        raise OpdctlError(f"prompts.split: {error}") from error


def _checked(rows: Iterator[Row], settings: Prompts) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    twice: list[str] = []
    for number, row in islice(_wanted(rows, settings), settings.limit):
        where = f"{settings.source}: row {number}"
        name = _cell(row, settings.id_column, "prompts.id_column", where) if settings.id_column else number - 1
        text = _text_cell(row, settings.prompt_column, "prompts.prompt_column", where) + settings.suffix
        teacher_text = None
        if (column := settings.teacher_prompt_column) is not None:
            teacher_text = _text_cell(row, column, "prompts.teacher_prompt_column", where) + settings.suffix
        answer = _cell(row, settings.answer_column, "prompts.answer_column", where) if settings.answer_column else None
        if name is None:
            raise OpdctlError(f"{where}: `{settings.id_column}` is null", code=ExitCode.BAD_DATA)
        if str(name) in seen:
            twice.append(f"`{name}` of row {seen[str(name)]} in row {number}")
        seen.setdefault(str(name), number)
        gold = None if answer is None else _valid_text(str(answer), where)
        teacher = _teacher_cell(row, settings, where)
        problems.append(Problem(_valid_text(str(name), where), text, gold, teacher, teacher_text))
    if twice:
        shown = ", ".join(twice[:MAX_SHOWN_CHARS])
        raise OpdctlError(
            f"{settings.source}: {len(twice)} ids occur again: {shown}{', …' if len(twice) > MAX_SHOWN_CHARS else ''}",
            hint="give each prompt an id of its own (prompts.id_column), or leave the column out: then it is the row",
            code=ExitCode.BAD_DATA,
        )
    if not problems:
        why = f"no row passes prompts.min_values = {settings.min_values}" if settings.min_values else "holds no prompts"
        raise OpdctlError(f"{settings.source}: {why}", hint="at least one prompt is needed", code=ExitCode.BAD_DATA)
    return problems


def _text_cell(row: Row, column: str, key: str, where: str) -> str:
    text = _cell(row, column, key, where)
    if not isinstance(text, str) or not text:
        raise OpdctlError(f"{where}: `{column}` must be text, got {text!r}", code=ExitCode.BAD_DATA)
    return _valid_text(text, where)


def _teacher_cell(row: Row, settings: Prompts, where: str) -> str | None:
    if settings.teacher_column is None:
        return None
    name = _cell(row, settings.teacher_column, "prompts.teacher_column", where)
    if not isinstance(name, str):
        raise OpdctlError(f"{where}: `{settings.teacher_column}` must be text, got {name!r}", code=ExitCode.BAD_DATA)
    return name


def _wanted(rows: Iterator[Row], settings: Prompts) -> Iterator[tuple[int, Row]]:
    """Yield (number from 1, row) of the rows that `at_least` lets through."""
    for number, row in enumerate(rows, 1):
        where = f"{settings.source}: row {number}"
        if all(_number(row, column, where) >= least for column, least in settings.min_values.items()):
            yield number, row


def _number(row: Row, column: str, where: str) -> float:
    value = _cell(row, column, "prompts.min_values", where)
    if value is None:
        return -math.inf  # unknown is not enough
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"{where}: `{column}` (prompts.min_values) must be a number, got {value!r}"
        raise OpdctlError(message, code=ExitCode.BAD_DATA)
    return value


def _cell(row: Row, column: str, key: str, where: str) -> Any:
    if column not in row:
        raise OpdctlError(
            f"{where}: no column `{column}` ({key}){did_you_mean(column, row)}",
            hint=f"its columns are {', '.join(f'`{name}`' for name in row) or 'none'}",
            code=ExitCode.BAD_DATA,
        )
    return row[column]


def _valid_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        raise OpdctlError(f"{where}: not valid Unicode at character {error.start}", code=ExitCode.BAD_DATA) from error
    return text
