"""The forms in which programs store the token ids of a prompt and its response, by their usual columns.

Programs differ in where the prompt ends, what pads it, and which tokens their masks and log-probs cover. A form finds
the ids, and which values of the other columns belong to the response. Imports no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from opdctl.artifacts.records import Ids, LossMask
from opdctl.data.trajectories.cells import TokenCells

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_IDS = ("prompt_ids", "prompt_token_ids", "input_ids")
RESPONSE_IDS = ("response_ids", "completion_ids", "response_token_ids", "completion_token_ids", "token_ids")
PADDING_MASK = "completion_mask"
"""TRL's mask of a padded response beside `prompt_mask`; of other programs a loss mask."""
LOSS_MASKS = ("loss_mask", "response_mask", "env_mask", "tool_mask", PADDING_MASK)
"""Masks of a response. A token that one of them excludes is not the student's own."""
SEQUENCE_MASKS = ("loss_mask", "assistant_masks", PADDING_MASK)
"""Masks of a prompt and its response together."""
IGNORED_LABEL = -100
PADDING_HINT = "store `attention_mask`, too, or the ids without padding"


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of a row.

    loss_mask: of the response, None if all of its tokens are the student's own. columns: those that were read. Each
    further column of tokens has `stored_length` values, by the column `stored`; those at `positions` [T] belong to the
    response.
    """

    prompt_ids: Ids
    response_ids: Ids
    loss_mask: LossMask | None
    columns: tuple[str, ...]
    stored: str
    stored_length: int
    positions: npt.NDArray[np.intp]


def find_tokens(cells: TokenCells, tokenizer: "PreTrainedTokenizerBase") -> StoredTokens | None:
    """Return the tokens of a row; None if it has no token ids.

    Raises:
        OpdctlError: the columns have other values or lengths than their form requires.
    """
    prompt, response = cells.find(PROMPT_IDS), cells.find(RESPONSE_IDS)
    if cells.has_ids("prompts") and cells.has_ids("responses"):
        return _read_padded(cells, tokenizer)
    if cells.has("tokens", "response_length"):
        return _read_end(cells)
    if prompt is not None and response is not None:
        return _read_two_parts(cells, prompt, response)
    return _read_sequence(cells, "input_ids") if cells.has("input_ids") else None


# ── Two columns ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_two_parts(cells: TokenCells, prompt: str, response: str) -> StoredTokens:
    """Read a prompt and a response, as opdctl, TRL, prime-rl, verifiers and vLLM have them."""
    prompt_ids, stored_ids = cells.ids(prompt), cells.ids(response)
    names = [name for name in LOSS_MASKS if cells.has(name)]
    masks = {name: cells.mask(name, len(stored_ids), response) for name in names}
    end = len(stored_ids)
    if cells.has("prompt_mask"):
        is_read = cells.mask("prompt_mask", len(prompt_ids), prompt)
        if is_read.any():  # TRL's mask of padding. That of prime-rl is a loss mask, which excludes the whole prompt.
            prompt_ids = prompt_ids[is_read]
            end = _end_of(masks[PADDING_MASK]) if PADDING_MASK in masks else end
    loss_mask = np.logical_and.reduce([*masks.values()])[:end] if masks else None
    columns = (prompt, response, *names)
    return StoredTokens(prompt_ids, stored_ids[:end], loss_mask, columns, response, len(stored_ids), np.arange(end))


def _read_padded(cells: TokenCells, tokenizer: "PreTrainedTokenizerBase") -> StoredTokens:
    """Read verl's `prompts`, padded on the left, and `responses`, padded on the right."""
    prompt_ids, stored_ids = cells.ids("prompts"), cells.ids("responses")
    both_ids, start = np.concatenate([prompt_ids, stored_ids]), len(prompt_ids)
    if cells.has("input_ids") and not np.array_equal(cells.ids("input_ids"), both_ids):
        raise cells.error("input_ids", "are not those of `prompts` and `responses`")
    name = cells.find(("response_mask", "loss_mask"))
    loss_mask = None
    if name is not None:
        is_whole = len(cells.row[name]) == len(both_ids) != len(stored_ids)
        length, other = (len(both_ids), "prompts` and `responses") if is_whole else (len(stored_ids), "responses")
        loss_mask = cells.mask(name, length, other)[start if is_whole else 0 :]
    if cells.has("attention_mask"):
        first, end = _find_padding(cells, cells.mask("attention_mask", len(both_ids), "prompts` and `responses"), start)
    else:
        first = _count_padding(cells, "prompts", prompt_ids, tokenizer, tokenizer.bos_token_id)
        padding = _count_padding(cells, "responses", stored_ids[::-1], tokenizer, tokenizer.eos_token_id, loss_mask)
        end = len(stored_ids) - padding
    names = ("prompts", "responses", *(each for each in (name, "attention_mask") if each and cells.has(each)))
    mask = None if loss_mask is None else loss_mask[:end]
    return StoredTokens(prompt_ids[first:], stored_ids[:end], mask, names, "responses", len(stored_ids), np.arange(end))


def _find_padding(cells: TokenCells, is_read: LossMask, start: int) -> tuple[int, int]:
    """Return the number of padding tokens before a prompt, and of tokens of the response that starts at `start`."""
    first, end = start - int(is_read[:start].sum()), int(is_read[start:].sum())
    if not is_read[first : start + end].all():
        raise cells.error(
            "attention_mask", "has padding between tokens, not at the left of the prompt and the right of the response"
        )
    return first, end


def _count_padding(
    cells: TokenCells,
    name: str,
    ids: Ids,
    tokenizer: "PreTrainedTokenizerBase",
    similar: int | None,
    loss_mask: LossMask | None = None,
) -> int:
    """Return the number of padding tokens that ids begin with.

    similar: an id that may be the first of the others. If it is that of padding, only a loss mask, in the order of the
    row, excludes padding.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None or not len(ids) or ids[0] != pad_id:
        return 0
    if pad_id == similar:
        if loss_mask is not None:
            return len(ids) - _end_of(loss_mask)
        token = tokenizer.convert_ids_to_tokens(pad_id)
        raise cells.error(name, f"may have padding: `{token}` is the token of padding and another one", PADDING_HINT)
    return int((ids != pad_id).argmax()) if (ids != pad_id).any() else len(ids)


# ── One column ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_end(cells: TokenCells) -> StoredTokens:
    """Read slime's `tokens`, of which the last `response_length` are the response."""
    ids, length = cells.ids("tokens"), cells.row["response_length"]
    if not isinstance(length, int) or not 0 <= length <= len(ids):
        raise cells.error("response_length", f"must be at most {len(ids)}, the length of `tokens`, got {length!r}")
    columns = ("tokens", "response_length", *(("loss_mask",) if cells.has("loss_mask") else ()))
    mask = cells.mask("loss_mask", length, "response_length") if cells.has("loss_mask") else None
    if cells.row.get("remove_sample"):
        mask = np.zeros(length, bool)
    start = len(ids) - length
    return StoredTokens(ids[:start], ids[start:], mask, columns, "response_length", length, np.arange(length))


def _read_sequence(cells: TokenCells, name: str) -> StoredTokens:
    """Read a prompt and its response together. The prompt ends at the first token that is learned."""
    ids = cells.ids(name)
    names = [mask for mask in SEQUENCE_MASKS if cells.has(mask)]
    is_learned = [cells.mask(mask, len(ids), name) for mask in names]
    if cells.has("labels"):
        labels = cells.labels("labels", len(ids), name)
        is_learned.append(labels != IGNORED_LABEL)
        if (different := (labels != ids) & is_learned[-1]).any():
            index = int(np.flatnonzero(different)[0])
            reason = f"is {labels[index]} at position {index}, where `{name}` is {ids[index]}"
            raise cells.error("labels", reason, "store the label of each token at its own position")
        names.append("labels")
    if not is_learned:
        known = ", ".join(f"`{each}`" for each in (*SEQUENCE_MASKS, "labels"))
        reason = f"has the prompt and the response, and no mask separates them: none of {known}"
        raise cells.error(name, reason, "add a loss mask, or store `prompt_ids` and `response_ids`")
    mask = np.logical_and.reduce(is_learned)
    first, end = 0, len(ids)
    if cells.has("attention_mask"):
        is_read = cells.mask("attention_mask", len(ids), name)
        first, end = int(is_read.argmax()), _end_of(is_read)
    start = int(mask.argmax()) if mask.any() else end
    return StoredTokens(
        ids[first:start], ids[start:end], mask[start:end], (name, *names), name, len(ids), np.arange(start, end)
    )


def _end_of(mask: LossMask) -> int:
    """Return the index after the last token that a mask includes."""
    return int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
