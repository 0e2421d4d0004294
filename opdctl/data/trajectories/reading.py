"""Responses that other programs sampled, as trajectories: read from their files, row by row, without settings.

docs/artifacts.md lists the columns that are recognised, by program. Nothing is unpickled. Imports no torch.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Ids, LossMask, Trajectory
from opdctl.data.messages import Message, parse_messages, parse_tools
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.sources import LocatedRow, read_source
from opdctl.data.trajectories.cells import TokenCells
from opdctl.data.trajectories.columns import STUDENT_TOP_IDS, find_finish_reason, read_logprobs, read_values
from opdctl.data.trajectories.message_graphs import is_message_graph, split_paths
from opdctl.data.trajectories.token_forms import StoredTokens, find_tokens
from opdctl.data.trajectories.turns import render_texts, render_turns
from opdctl.errors import OpdctlError
from opdctl.recipe.prompts import PromptSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = ("messages", "conversations")
TEXT_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("input", "output"))
"""A prompt and a response, both texts or both messages; verl's names are the last."""
RESPONSE_TEXTS = ("response", "completion")
"""Texts of a response beside its ids."""
TEACHER_PROMPT_IDS = "teacher_prompt_ids"
TOOLS = ("tools", "tool_defs")
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
SHOWN_TEXT_CHARS = 20


def read_trajectories(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    renderer: PromptRenderer | None = None,
) -> Iterator[Trajectory]:
    """Yield the trajectories of files, one row after the other.

    paths: of Parquet, JSONL, JSON or CSV files, of folders or patterns of these. tokenizer, vocab_size: of the student
    that sampled them. renderer: of messages.

    A row without a token of the student is skipped, and the number of such rows is logged.

    Raises:
        OpdctlError: a file is missing or no table, a row has no form that is known, or contradicts itself, two rows
            have one id, or no row has a token of the student.
    """
    for path in paths:
        _check_not_pickled(path)
    names = [str(path) for path in paths]
    reader = _RowReader(tokenizer, vocab_size, renderer)
    locations: dict[str, str] = {}
    skipped: list[str] = []
    number = 0
    rows = _split_rows(read_source(PromptSource(source=names), "input", has_arrays=True))
    for trajectory in (trajectory for located in rows for trajectory in reader.read(located)):
        number += 1
        if not _has_own_tokens(trajectory):
            skipped.append(trajectory.location)
            continue
        if (other := locations.get(trajectory.sample_id)) is not None:
            reason = f"the sample id `{trajectory.sample_id}` is that of {other}, too"
            raise OpdctlError("invalid_data", f"{trajectory.location}: {reason}", hint="give each row its own id")
        locations[trajectory.sample_id] = trajectory.location
        yield trajectory
    if len(skipped) == number:
        raise OpdctlError("invalid_data", f"{', '.join(names)}: no row has a token of the student")
    if skipped:
        reason = f"{len(skipped)} of {number} rows have no token of the student and are skipped"
        console.warn(f"{skipped[0]}: {reason}")


def _split_rows(rows: Iterable[LocatedRow]) -> Iterator[LocatedRow]:
    """Yield each row, and the paths of one that is a graph of messages."""
    for located in rows:
        if not is_message_graph(located.row):
            yield located
            continue
        for number, row in enumerate(split_paths(located.row, str(located.number), located.location)):
            yield LocatedRow(located.number, f"{located.location}, path {number}", row)


def _check_not_pickled(path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise OpdctlError(
            "invalid_data",
            f"{path}: a pickled file can run any code when it is read",
            hint="write its rows as JSON lines in the program that made it, such as `json.dumps(sample.to_dict())`",
        )


def _has_own_tokens(trajectory: Trajectory) -> bool:
    return bool(len(trajectory.response_ids)) and (trajectory.loss_mask is None or bool(trajectory.loss_mask.any()))


class _RowReader:
    """Reads the rows of files with the tokenizer of the student."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, renderer: PromptRenderer | None) -> None:
        self._tokenizer, self._vocab_size, self._given_renderer = tokenizer, vocab_size, renderer

    @cached_property
    def _renderer(self) -> PromptRenderer:
        form = PromptFormat(special_tokens_in_text="split")
        return self._given_renderer or PromptRenderer(self._tokenizer, self._vocab_size, form)

    def read(self, located: LocatedRow) -> Iterator[Trajectory]:
        """Yield the trajectories of a row: one, unless its messages make several sequences."""
        cells = TokenCells(located.row, located.location)
        if (tokens := find_tokens(cells, self._tokenizer)) is not None:
            console.info_once(f"input: {', '.join(tokens.columns)}")
            yield self._read_tokens(located, cells, tokens)
        elif (name := cells.find(MESSAGES)) is not None:
            yield from self._read_messages(located, name)
        elif pair := next((pair for pair in TEXT_PAIRS if cells.has(*pair) and not cells.has("instruction")), None):
            console.info_once(f"input: {', '.join(pair)}")
            yield from self._read_pair(located, *pair)
        else:
            known = ", ".join(f"`{name}`" for name in located.row)
            raise OpdctlError(
                "invalid_data",
                f"{located.location}: no columns of token ids or messages are known among {known}",
                hint="store `prompt_ids` and `response_ids`, or `messages`",
            )

    def _read_messages(self, located: LocatedRow, name: str) -> Iterator[Trajectory]:
        """Read a chat. Every message of the assistant is a turn of the student."""
        console.info_once(f"input: {name}")
        messages = parse_messages(located.row[name], f"{located.location}: `{name}`")
        yield from self._render(located, messages, [each.role == "assistant" for each in messages])

    def _read_pair(self, located: LocatedRow, prompt: str, response: str) -> Iterator[Trajectory]:
        """Read a prompt and a response, both as text or as messages."""
        row, location = located.row, located.location
        if isinstance(row[prompt], str) and isinstance(row[response], str):
            key = f"{location}: `{prompt}`"
            prompt_ids, ids = render_texts(self._renderer, self._tokenizer, row[prompt], row[response], key)
            self._check_vocabulary(prompt_ids, prompt, location)
            yield _make_trajectory(located, prompt_ids, ids, None)
            return
        before = parse_messages(row[prompt], f"{location}: `{prompt}`")
        answer = row[response]
        after = (
            [Message("assistant", answer)]
            if isinstance(answer, str)
            else parse_messages(answer, f"{location}: `{response}`")
        )
        is_own = [False] * len(before) + [message.role == "assistant" for message in after]
        yield from self._render(located, [*before, *after], is_own)

    def _render(self, located: LocatedRow, messages: Sequence[Message], is_own: Sequence[bool]) -> Iterator[Trajectory]:
        location, row = located.location, located.row
        tools_name = next((name for name in TOOLS if row.get(name)), None)
        tools = parse_tools(row[tools_name], f"{location}: `{tools_name}`") if tools_name else ()
        is_cut = find_finish_reason(row) == "length"
        sequences = [*render_turns(self._renderer, messages, is_own, location, tools, is_cut=is_cut)]
        for number, each in enumerate(sequences):
            made = _make_trajectory(located, each.prompt_ids, each.response_ids, each.loss_mask, turns=each.turns)
            yield replace(made, sample_id=f"{made.sample_id}/{number}") if len(sequences) > 1 else made
        if not sequences:
            yield _make_trajectory(located, np.zeros(0, np.int32), np.zeros(0, np.int32), None)

    def _read_tokens(self, located: LocatedRow, cells: TokenCells, tokens: StoredTokens) -> Trajectory:
        self._check_vocabulary(tokens.prompt_ids, tokens.columns[0], located.location)
        self._check_vocabulary(tokens.response_ids, tokens.columns[0], located.location)
        if not len(tokens.prompt_ids) and len(tokens.response_ids):
            reason = f"`{tokens.columns[0]}` has no token before the first one that is learned"
            raise OpdctlError("invalid_data", f"{located.location}: {reason}", hint="store the prompt, too")
        self._check_text(cells, tokens)
        columns = read_logprobs(cells, tokens)
        if "top_ids" in columns:
            self._check_vocabulary(columns["top_ids"].ravel(), STUDENT_TOP_IDS, located.location)
        if cells.has(TEACHER_PROMPT_IDS):
            columns["teacher_prompt_ids"] = cells.ids(TEACHER_PROMPT_IDS)
            self._check_vocabulary(columns["teacher_prompt_ids"], TEACHER_PROMPT_IDS, located.location)
        return _make_trajectory(located, tokens.prompt_ids, tokens.response_ids, tokens.loss_mask, **columns)

    def _check_vocabulary(self, ids: Ids, name: str, location: str) -> None:
        if len(ids) and (largest := int(ids.max())) >= self._vocab_size:
            reason = f"token {largest} is outside the vocabulary of {self._vocab_size} ids"
            hint = "use the model that sampled these responses, or one with its tokenizer"
            raise OpdctlError("incompatible_tokenizer", f"{location}: `{name}`: {reason}", hint=hint)

    def _check_text(self, cells: TokenCells, tokens: StoredTokens) -> None:
        """Check that the ids of a response decode to its text, with or without special tokens."""
        name = next((name for name in RESPONSE_TEXTS if isinstance(cells.row.get(name), str)), None)
        if name is None:
            return
        text = _trim(cells.row[name])
        decoded = ""
        for skip in (False, True):
            decoded = _trim(str(self._tokenizer.decode(tokens.response_ids, skip_special_tokens=skip)))
            if decoded == text:
                return
        at = next((i for i, pair in enumerate(zip(text, decoded, strict=False)) if pair[0] != pair[1]), None)
        at = min(len(text), len(decoded)) if at is None else at
        found, expected = text[at : at + SHOWN_TEXT_CHARS], decoded[at : at + SHOWN_TEXT_CHARS]
        raise OpdctlError(
            "incompatible_tokenizer",
            f"{cells.location}: `{name}` has {found!r} at character {at}, where the decoded ids have {expected!r}",
            hint="use the model that sampled these responses, or one with its tokenizer",
        )


def _trim(text: str) -> str:
    """Return a text without white space and incomplete characters at its ends, in which programs differ."""
    return text.strip(" \t\r\n\N{REPLACEMENT CHARACTER}")


def _make_trajectory(
    located: LocatedRow, prompt_ids: Ids, response_ids: Ids, loss_mask: LossMask | None, **columns: Any
) -> Trajectory:
    """Return the trajectory of a row. columns: those of tokens, and the turns, by their names."""
    values = read_values(located)
    return Trajectory(
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        loss_mask=None if loss_mask is None or loss_mask.all() else loss_mask,
        location=located.location,
        **{**values, "prompt_id": values["prompt_id"] or _digest(prompt_ids), **columns},
    )


def _digest(ids: Ids) -> str:
    """Return an id of a prompt that has none: equal prompts are one."""
    return hashlib.blake2b(np.ascontiguousarray(ids, "<i4").tobytes(), digest_size=8).hexdigest()
