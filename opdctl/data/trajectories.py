"""Responses that other programs sampled, as trajectories: read from their files, row by row, without settings.

docs/artifacts.md lists the columns that are recognised, by program. Nothing is unpickled. Imports no torch.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Ids, Logprobs, LossMask, Trajectory
from opdctl.data.cells import parse_cell, read_cell
from opdctl.data.rendering import PromptRenderer
from opdctl.data.sources import LocatedRow, read_source
from opdctl.data.tables import TableRow
from opdctl.data.token_cells import TokenCells
from opdctl.data.token_forms import StoredTokens, find_tokens
from opdctl.errors import OpdctlError
from opdctl.recipe.prompts import PromptSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_IDS = ("sample_id", "id")
PROMPT_NAMES = ("prompt_id", "uid", "group_index", "example_id")
ANSWERS = ("answer", "reward_model.ground_truth", "ground_truth", "label", "solution")
REWARDS = ("reward", "score")
LOGPROBS = (
    "student_logprobs",
    "logprobs",
    "completion_logprobs",
    "rollout_log_probs",
    "inference_logprobs",
    "old_log_probs",
)
TEACHER_LOGPROBS = ("teacher_logprobs", "teacher_log_probs")
RESPONSE_TEXTS = ("response", "completion")
CUT_STATUSES = ("length", "truncated", "aborted")
ENDED_STATUSES = ("stop", "completed")
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
    reader = _RowReader(tokenizer, vocab_size)
    locations: dict[str, str] = {}
    skipped: list[str] = []
    number = 0
    for located in read_source(PromptSource(source=names), "input"):
        number += 1
        trajectory = reader.read(located)
        if not _has_own_tokens(trajectory):
            skipped.append(located.location)
            continue
        if (other := locations.setdefault(trajectory.sample_id, located.location)) != located.location:
            reason = f"the sample id `{trajectory.sample_id}` is that of {other}, too"
            raise OpdctlError("invalid_data", f"{located.location}: {reason}", hint="give each row its own id")
        yield trajectory
    if len(skipped) == number:
        raise OpdctlError("invalid_data", f"{', '.join(names)}: no row has a token of the student")
    if skipped:
        console.warn(
            f"{skipped[0]}: no token of the student; {len(skipped)} of {number} rows are skipped for this reason"
        )


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

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def read(self, located: LocatedRow) -> Trajectory:
        """Return the trajectory of a row."""
        row, location = located.row, located.location
        cells = TokenCells(row, location)
        found = find_tokens(cells, self._tokenizer)
        if found is None:
            known = ", ".join(f"`{name}`" for name in row)
            raise OpdctlError(
                "invalid_data",
                f"{location}: no columns of token ids or messages are known among {known}",
                hint="store `prompt_ids` and `response_ids`, or `messages`",
            )
        tokens, columns = found
        console.info_once(f"input: {', '.join(columns)}")
        self._check_vocabulary(tokens.prompt_ids, columns[0], location)
        self._check_vocabulary(tokens.response_ids, tokens.stored, location)
        if not len(tokens.prompt_ids):
            reason = f"`{columns[0]}` has no token before the first one that is learned"
            raise OpdctlError("invalid_data", f"{location}: {reason}", hint="store the prompt, too")
        self._check_text(cells, tokens)
        return Trajectory(
            sample_id=_find_id(row, SAMPLE_IDS, location) or str(located.number),
            prompt_id=_find_id(row, PROMPT_NAMES, location) or _digest(tokens.prompt_ids),
            prompt_ids=tokens.prompt_ids,
            response_ids=tokens.response_ids,
            loss_mask=None if tokens.loss_mask is None or tokens.loss_mask.all() else tokens.loss_mask,
            finish_reason=_find_finish_reason(row),
            **_read_logprobs(cells, tokens),
            answer=_find_answer(row, location),
            reward=_find_number(row, REWARDS),
            turns=_find_turns(row),
            tool_seconds=_find_number(row, ("tool_seconds", "non_generation_time")),
            location=location,
        )

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
            f"{cells.location}: `{name}` has {found!r} at character {at}, where `{tokens.stored}` has {expected!r}",
            hint="use the model that sampled these responses, or one with its tokenizer",
        )


def _trim(text: str) -> str:
    """Return a text without white space and incomplete characters at its ends, in which programs differ."""
    return text.strip(" \t\r\n\N{REPLACEMENT CHARACTER}")


# ── Log-probs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_logprobs(cells: TokenCells, tokens: StoredTokens) -> dict[str, Any]:
    """Return the columns of log-probs, by their names in `Trajectory`."""
    found = {
        "logprobs": _find_logprobs(cells, tokens, LOGPROBS),
        "sampling_logprobs": _find_logprobs(cells, tokens, ("sampling_logprobs",)),
        "teacher_logprobs": _find_logprobs(cells, tokens, TEACHER_LOGPROBS),
    }
    return found | _read_top(cells, tokens)


def _find_logprobs(cells: TokenCells, tokens: StoredTokens, names: Sequence[str]) -> Logprobs | None:
    name = cells.find(names)
    if name is None:
        return None
    stored = cells.logprobs(name, len(cells.row[tokens.stored]), tokens.stored)
    values = np.where(_own(tokens), stored[tokens.positions], np.float32(0))
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise cells.error(name, f"is {values[index]} at token {index} of the response")
    return values


def _read_top(cells: TokenCells, tokens: StoredTokens) -> dict[str, Any]:
    """Return the student's most probable tokens, [T, K], which opdctl stores flat."""
    if not cells.has("student_top_ids", "student_top_logprobs"):
        return {}
    count = len(tokens.response_ids)
    ids = cells.ids("student_top_ids")
    logprobs = cells.logprobs("student_top_logprobs", len(ids), "student_top_ids")
    if not count or len(ids) % count:
        raise cells.error(
            "student_top_ids", f"has {len(ids)} values, which are not the same number for each of {count} tokens"
        )
    values = logprobs.reshape(count, -1)
    if not np.isfinite(values[_own(tokens)]).all():
        raise cells.error("student_top_logprobs", "has values that are not finite")
    return {"top_ids": ids.reshape(count, -1), "top_logprobs": values}


def _own(tokens: StoredTokens) -> LossMask:
    return np.ones(len(tokens.response_ids), bool) if tokens.loss_mask is None else tokens.loss_mask


# ── Values of a row ──────────────────────────────────────────────────────────────────────────────────────────────────


def _find_value(row: TableRow, names: Sequence[str]) -> tuple[str, Any] | None:
    """Return the first of these columns, or fields of columns, that is not null."""
    for name in names:
        if name in row or ("." in name and isinstance(row.get(name.partition(".")[0]), dict)):
            try:
                value = read_cell(row, name, name, "")
            except OpdctlError:
                continue
            if value is not None:
                return name, value
    return None


def _find_id(row: TableRow, names: Sequence[str], location: str) -> str | None:
    found = _find_value(row, names)
    return parse_cell(found[1], f"{location}: `{found[0]}`") if found else None


def _find_answer(row: TableRow, location: str) -> str | None:
    found = _find_value(row, ANSWERS)
    if found is None or not isinstance(found[1], str | int | float) or found[1] == "":
        return None
    return parse_cell(found[1], f"{location}: `{found[0]}`")


def _find_number(row: TableRow, names: Sequence[str]) -> float | None:
    found = _find_value(row, names)
    if found is None or not isinstance(found[1], int | float) or not math.isfinite(found[1]):
        return None
    return float(found[1])


def _find_turns(row: TableRow) -> int | None:
    turns = _find_number(row, ("turns", "__num_turns__"))
    return None if turns is None else int(turns)


def _find_finish_reason(row: TableRow) -> str | None:
    if isinstance(row.get("is_truncated"), bool):
        return "length" if row["is_truncated"] else "stop"
    found = _find_value(row, ("finish_reason", "status"))
    if found is None:
        return None
    return "length" if found[1] in CUT_STATUSES else "stop" if found[1] in ENDED_STATUSES else None


def _digest(ids: Ids) -> str:
    """Return an id of a prompt that has none: equal prompts are one."""
    return hashlib.blake2b(np.ascontiguousarray(ids, "<i4").tobytes(), digest_size=8).hexdigest()
