"""The columns of a trajectory's row beside its token ids: log-probs, names, answer, reward, end. Imports no torch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdctl.artifacts.records import Logprobs, LossMask
from opdctl.data.cells import parse_cell, read_cell
from opdctl.data.sources import LocatedRow
from opdctl.data.tables import TableRow
from opdctl.data.trajectories.cells import TokenCells
from opdctl.data.trajectories.token_forms import StoredTokens
from opdctl.errors import OpdctlError

SAMPLE_IDS = ("sample_id", "id")
PROMPT_NAMES = ("prompt_id", "uid", "group_index", "example_id")
ANSWERS = ("answer", "reward_model.ground_truth", "ground_truth", "gts", "label", "solution")
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
STUDENT_TOP_IDS, STUDENT_TOP_LOGPROBS = "student_top_ids", "student_top_logprobs"
TURNS, TOOL_SECONDS = ("turns",), ("tool_seconds", "non_generation_time")
CUT_STATUSES = ("length", "truncated", "aborted")
ENDED_STATUSES = ("stop", "completed")


# ── Log-probs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_logprobs(cells: TokenCells, tokens: StoredTokens) -> dict[str, Any]:
    """Return the log-probs [T] in nats and most probable tokens [T, K] of a response, by their names in `Trajectory`.

    At tokens that are not the student's own, log-probs are 0.

    Raises:
        OpdctlError: a column has another length, or the log-prob of a token of the student is not finite.
    """
    found = {
        "logprobs": _find_logprobs(cells, tokens, LOGPROBS),
        "sampling_logprobs": _find_logprobs(cells, tokens, ("sampling_logprobs",)),
        "teacher_logprobs": _find_logprobs(cells, tokens, TEACHER_LOGPROBS),
        "entropies": _find_logprobs(cells, tokens, ("student_entropies",)),
    }
    return found | _read_top(cells, tokens)


def _find_logprobs(cells: TokenCells, tokens: StoredTokens, names: Sequence[str]) -> Logprobs | None:
    name = cells.find(names)
    if name is None:
        return None
    stored = cells.logprobs(name, tokens.stored_length, tokens.stored)
    values = np.where(_own(tokens), stored[tokens.positions], np.float32(0))
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise cells.error(name, f"is {values[index]} at token {index} of the response")
    return values


def _read_top(cells: TokenCells, tokens: StoredTokens) -> dict[str, Any]:
    """Return the student's most probable tokens, [T, K], which opdctl stores flat."""
    if not cells.has(STUDENT_TOP_IDS, STUDENT_TOP_LOGPROBS):
        return {}
    count = len(tokens.response_ids)
    ids = cells.ids(STUDENT_TOP_IDS)
    logprobs = cells.logprobs(STUDENT_TOP_LOGPROBS, len(ids), STUDENT_TOP_IDS)
    if not count or len(ids) % count:
        raise cells.error(
            STUDENT_TOP_IDS, f"has {len(ids)} values, which are not the same number for each of {count} tokens"
        )
    values = logprobs.reshape(count, -1)
    if not np.isfinite(values[_own(tokens)]).all():
        raise cells.error(STUDENT_TOP_LOGPROBS, "has values that are not finite")
    return {"top_ids": ids.reshape(count, -1), "top_logprobs": values}


def _own(tokens: StoredTokens) -> LossMask:
    return np.ones(len(tokens.response_ids), bool) if tokens.loss_mask is None else tokens.loss_mask


# ── Values of a row ──────────────────────────────────────────────────────────────────────────────────────────────────


def read_values(located: LocatedRow) -> dict[str, Any]:
    """Return the columns that are not of tokens, by their names in `Trajectory`; None if they are unknown.

    Raises:
        OpdctlError: an id or an answer is no text and no number.
    """
    row, location = located.row, located.location
    sample_ids = ("index",) if "response_length" in row else SAMPLE_IDS
    return {
        "sample_id": _find_id(row, sample_ids, location) or str(located.number),
        "prompt_id": _find_id(row, PROMPT_NAMES, location),
        "finish_reason": find_finish_reason(row),
        "answer": _find_answer(row, location),
        "reward": _find_number(row, REWARDS),
        "turns": _find_integer(row, TURNS),
        "tool_seconds": _find_number(row, TOOL_SECONDS),
        "step": _find_integer(row, ("step",)),
        "policy_version": _find_integer(row, ("policy_version",)),
    }


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


def _find_integer(row: TableRow, names: Sequence[str]) -> int | None:
    number = _find_number(row, names)
    return None if number is None else int(number)


def find_finish_reason(row: TableRow) -> str | None:
    """Return whether a response ended by itself, "stop", or was cut off, "length"; None if it is unknown."""
    if isinstance(row.get("is_truncated"), bool):
        return "length" if row["is_truncated"] else "stop"
    found = _find_value(row, ("finish_reason", "status"))
    if found is None:
        return None
    return "length" if found[1] in CUT_STATUSES else "stop" if found[1] in ENDED_STATUSES else None
