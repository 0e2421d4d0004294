"""Prompts: read from the toy task, a file or the hub, put into the chat template, and tokenized."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from opdctl.artifacts.records import Prompt
from opdctl.data.cells import parse_cell, read_cell
from opdctl.data.columns import PROMPT_COLUMNS, Names, find_prompt
from opdctl.data.messages import Chat, Message, Tool, parse_chat, parse_tools
from opdctl.data.rendering import PromptRenderer
from opdctl.data.sources import LocatedRow, read_source
from opdctl.data.tables import TableRow
from opdctl.data.toy import TASKS
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.recipe.data_names import is_local
from opdctl.recipe.prompts import MixedSource, Prompts, PromptSource, source_key
from opdctl.recipe.schema import teacher_name

MAX_LISTED_PROMPTS = 5  # in an error message
CHATS_AHEAD = 64  # that the process of the chat template renders while earlier ones are tokenized


@dataclass(frozen=True)
class Problem:
    """A prompt before the chat template.

    text: the last message of the user. answer: the gold answer, if there is one. teacher: the name of its teacher in a
    run with several. teacher_chat: the teacher's version of the chat, if it differs. location: the file and the row,
    for errors. earlier, later: the messages of the chat before and after `text`. tools: schemas for the chat template.
    row: of the source in JSON, if it is kept.
    """

    id: str
    text: str
    answer: str | None
    teacher: str | None = None
    teacher_chat: Chat | None = None
    location: str = field(default="", compare=False)
    earlier: tuple[Message, ...] = ()
    later: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    row: str | None = field(default=None, compare=False)

    @property
    def chat(self) -> Chat:
        return Chat(self.text, self.earlier, self.later)

    def __str__(self) -> str:
        return f"{self.location}: prompt `{self.id}`" if self.location else f"prompt `{self.id}`"


def tokenize(
    problems: list[Problem],
    renderer: PromptRenderer,
    settings: Prompts,
    teachers: Mapping[str, PromptRenderer | None] | None = None,
) -> tuple[list[Prompt], int]:
    """Return the prompts of at most `max_tokens` tokens, in order, and the number of longer ones that were dropped.

    teachers: by the names of the run's teachers, the renderers of those with separate prompts. A prompt without a
    name has the first teacher.

    Raises:
        OpdctlError: a prompt is empty, cannot be tokenized, names an unknown teacher, or is too long and
            `prompts.on_too_long` is "error"; or no prompt is left.
    """
    teachers = teachers or {"teacher": None}
    prompts: list[Prompt] = []
    too_long: list[tuple[str, int]] = []
    for number, problem in enumerate(problems):
        if number % CHATS_AHEAD == 0:
            following = problems[number : number + CHATS_AHEAD]
            renderer.render_ahead([(each.chat, each.tools) for each in following])
        location = str(problem)
        prompt_ids = renderer.token_ids(problem.chat, location, problem.tools)
        teacher, teacher_ids = _teacher_of(problem, [*teachers]), None
        if problem.teacher_chat is not None or teachers[teacher]:
            chat, for_teacher = problem.teacher_chat or problem.chat, f"{location} for the teacher"
            teacher_ids = (teachers[teacher] or renderer).token_ids(chat, for_teacher, problem.tools)
        lengths = [len(ids) for ids in (prompt_ids, teacher_ids) if ids is not None]
        if max(lengths) > settings.max_tokens:
            too_long.append((problem.id, max(lengths)))
        elif not min(lengths):
            raise OpdctlError("invalid_data", f"{location} has no tokens")
        else:
            prompts.append(Prompt(problem.id, prompt_ids, problem.answer, teacher, teacher_ids, problem.row))
    if too_long and settings.on_too_long == "error":
        shown = ", ".join(f"`{name}` with {length}" for name, length in too_long[:MAX_LISTED_PROMPTS])
        raise OpdctlError(
            "invalid_data",
            f"{settings.names}: {len(too_long)} prompts exceed prompts.max_tokens = {settings.max_tokens}: {shown}",
            hint='raise prompts.max_tokens, or set prompts.on_too_long = "drop"',
        )
    if not prompts:
        raise OpdctlError("invalid_data", f"{settings.names}: no prompts left after filtering")
    return prompts, len(too_long)


def _teacher_of(problem: Problem, teachers: Sequence[str]) -> str:
    if problem.teacher is None:
        return teachers[0]
    if (name := teacher_name(problem.teacher)) not in teachers:
        known = [teacher.removeprefix(teacher_name("")) for teacher in teachers]
        raise OpdctlError(
            "invalid_data",
            f"{problem}: no teacher `{problem.teacher}`{did_you_mean(problem.teacher, known)}",
            hint="put a name of [teachers] into the column of prompts.teacher_column",
        )
    return name


def load_problems(settings: Prompts, *, keep_rows: bool = False) -> list[Problem]:
    """Read the prompts of the recipe, source by source, and check every row. keep_rows: with the rows of the sources.

    Raises:
        OpdctlError: a row or a source is invalid, or a download fails.
    """
    problems: list[Problem] = []
    for name, source in settings.parts().items():
        part = _load_part(source, source_key(name), settings.shuffle_seed, keep_rows=keep_rows)
        teacher = source.teacher if isinstance(source, MixedSource) else None
        problems += [
            replace(problem, id=f"{name}/{problem.id}" if name else problem.id, teacher=teacher or problem.teacher)
            for problem in part
        ]
    return problems


def load_local_problems(settings: Prompts) -> list[Problem] | None:
    """Read toy or local prompts, or return None if a source is a hub data set. Raises OpdctlError as `load_problems`
    does."""
    are_local = all(source.is_toy or is_local(source.source) for source in settings.parts().values())
    return load_problems(settings) if are_local else None


def split_held_out(problems: Sequence[Problem], share: float) -> tuple[list[Problem], list[Problem]]:
    """Return the prompts for training, and those that are held out: a share of the texts, by their hash."""
    parts: tuple[list[Problem], list[Problem]] = [], []
    for problem in problems:
        digest = hashlib.sha256(problem.text.encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < share * 2**64].append(problem)
    return parts


def _load_part(source: PromptSource, key: str, shuffle_seed: int | None, *, keep_rows: bool) -> list[Problem]:
    if source.is_toy:
        return _toy_problems(source, key, keep_rows=keep_rows)
    if source.is_imported:
        why = f"{key}.source: the prompts are those of imported responses, and none are imported yet"
        raise OpdctlError("missing_input", why, hint="run `opdctl run import RUN_DIR FILES --recipe FILE` first")
    rows = read_source(source, key)
    if shuffle_seed is None:
        return _parse_rows(islice(rows, source.limit), source, key, keep_rows=keep_rows)
    problems = _parse_rows(rows, source, key, keep_rows=keep_rows)
    order = np.random.default_rng(shuffle_seed).permutation(len(problems))
    return [problems[i] for i in order[: source.limit]]


def _toy_problems(source: PromptSource, key: str, *, keep_rows: bool) -> list[Problem]:
    (name,) = source.paths
    task = TASKS.get(name.removeprefix("toy:"))
    if task is None:
        known = [f"toy:{each}" for each in TASKS]
        raise OpdctlError("unknown_name", f"{key}.source: no toy task `{name}`{did_you_mean(name, known)}")
    for column in ("teacher_column", "teacher_prompt_column", "tools_column"):
        if getattr(source, column):
            raise OpdctlError(
                "unsupported_setting",
                f"{key}.{column}: `{name}` has no columns",
                hint="use prompts from a file or the hub",
            )
    try:
        stream = task.problems(source.split, seed=0)
        return [
            Problem(
                each.id,
                append_suffix(each.prompt, source.suffix),
                each.answer,
                location=name,
                row=_to_json({"id": each.id, "prompt": each.prompt, "answer": each.answer}) if keep_rows else None,
            )
            for each in islice(stream, source.limit)
        ]
    except ValueError as error:
        raise OpdctlError("unsupported_setting", f"{key}.split: {error}") from error


def _to_json(row: TableRow) -> str:
    """Return a row as JSON; values without a form in it, such as dates, are texts."""
    return json.dumps(row, ensure_ascii=False, default=str)


def _parse_rows(rows: Iterator[LocatedRow], settings: PromptSource, key: str, *, keep_rows: bool) -> list[Problem]:
    problems: list[Problem] = []
    numbers: dict[str, int] = {}
    duplicates: list[str] = []
    for located in rows:
        problem = _parse_row(located, settings)
        problem = replace(problem, row=_to_json(located.row)) if keep_rows else problem
        if problem.id in numbers:
            duplicates.append(f"`{problem.id}` of row {numbers[problem.id]} in row {located.number}")
        numbers.setdefault(problem.id, located.number)
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
        condition = f"no row satisfies {key}.where = {settings.where}"
        reason = condition if settings.where else "contains no prompts"
        raise OpdctlError("invalid_data", f"{settings.location}: {reason}", hint="provide at least one prompt")
    return problems


def _parse_row(located: LocatedRow, settings: PromptSource) -> Problem:
    row, location = located.row, located.location
    name: Any = located.number - 1
    if settings.id_column:
        name = read_cell(row, settings.id_column, "prompts.id_column", location)
    names = (settings.prompt_column,) if settings.prompt_column else PROMPT_COLUMNS
    chat = _parse_chat(row, names, "prompts.prompt_column", settings, location)
    teacher_chat = None
    if settings.teacher_prompt_column is not None:
        names = (settings.teacher_prompt_column,)
        teacher_chat = _parse_chat(row, names, "prompts.teacher_prompt_column", settings, location)
    return Problem(
        parse_cell(name, f"{location}: `{settings.id_column}`"),
        chat.text,
        _answer_cell(row, settings, location),
        _teacher_cell(row, settings, location),
        teacher_chat,
        location,
        chat.earlier,
        chat.later,
        _tools_cell(row, settings, location),
    )


def _parse_chat(row: TableRow, names: Names, key: str, settings: PromptSource, location: str) -> Chat:
    chat = parse_chat(*find_prompt(row, names, key, location), settings.final_assistant)
    return replace(chat, text=append_suffix(chat.text, settings.suffix))


def append_suffix(text: str, suffix: str) -> str:
    """Return the text of a user message with the suffix, which is not repeated."""
    is_there = suffix.strip() and text.rstrip().endswith(suffix.rstrip())
    return text if is_there else text + suffix


def _answer_cell(row: TableRow, settings: PromptSource, location: str) -> str | None:
    if settings.answer_column is None:
        return None
    answer = read_cell(row, settings.answer_column, "prompts.answer_column", location)
    if isinstance(answer, dict):
        fields = ", ".join(f"`{settings.answer_column}.{name}`" for name in answer)
        reason = f"`{settings.answer_column}` (prompts.answer_column) has fields"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint=f"use one of the columns {fields}")
    return None if answer is None else parse_cell(answer, f"{location}: `{settings.answer_column}`")


def _teacher_cell(row: TableRow, settings: PromptSource, location: str) -> str | None:
    if settings.teacher_column is None:
        return None
    name = read_cell(row, settings.teacher_column, "prompts.teacher_column", location)
    if not isinstance(name, str):
        raise OpdctlError("invalid_data", f"{location}: `{settings.teacher_column}` must be text, got {name!r}")
    return name


def _tools_cell(row: TableRow, settings: PromptSource, location: str) -> tuple[Tool, ...]:
    if settings.tools_column is None:
        return ()
    cell = read_cell(row, settings.tools_column, "prompts.tools_column", location)
    return parse_tools(cell, f"{location}: `{settings.tools_column}`")
