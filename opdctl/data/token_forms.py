"""The forms in which programs store the token ids of a prompt and its response, by their usual columns.

Programs differ in where the prompt ends, what pads it, and which tokens their masks and log-probs cover. A form finds
the ids, and which values of the other columns belong to the response. Imports no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from opdctl.artifacts.records import Ids, LossMask
from opdctl.data.token_cells import TokenCells

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


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of a row.

    loss_mask: of the response, None if all of its tokens are the student's own. stored: the column of the response, and
    positions: where in it the response is, [T]. The other columns of tokens have as many values as that column.
    """

    prompt_ids: Ids
    response_ids: Ids
    loss_mask: LossMask | None
    stored: str
    positions: npt.NDArray[np.intp]


def find_tokens(cells: TokenCells, tokenizer: "PreTrainedTokenizerBase") -> tuple[StoredTokens, tuple[str, ...]] | None:
    """Return the tokens of a row and the columns that they come from; None if the row has no token ids.

    Raises:
        OpdctlError: the columns have other values or lengths than their form requires.
    """
    prompt, response = cells.find(PROMPT_IDS), cells.find(RESPONSE_IDS)
    if prompt is not None and response is not None:
        return _read_two_parts(cells, prompt, response)
    if cells.has("input_ids"):
        return _read_sequence(cells, "input_ids")
    return None


def _read_two_parts(cells: TokenCells, prompt: str, response: str) -> tuple[StoredTokens, tuple[str, ...]]:
    """Read a prompt and a response in two columns, as opdctl, TRL, prime-rl, verifiers and vLLM have them."""
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
    return StoredTokens(prompt_ids, stored_ids[:end], loss_mask, response, np.arange(end)), (prompt, response, *names)


def _read_sequence(cells: TokenCells, name: str) -> tuple[StoredTokens, tuple[str, ...]]:
    """Read a prompt and its response in one column. The prompt ends at the first token that is learned."""
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
    end = _end_of(cells.mask("attention_mask", len(ids), name)) if cells.has("attention_mask") else len(ids)
    start = int(mask.argmax()) if mask.any() else end
    padding = start_of_attention(cells, len(ids), name)
    tokens = StoredTokens(ids[padding:start], ids[start:end], mask[start:end], name, np.arange(start, end))
    return tokens, (name, *names)


def start_of_attention(cells: TokenCells, length: int, other: str) -> int:
    """Return the number of padding tokens before a sequence."""
    return int(cells.mask("attention_mask", length, other).argmax()) if cells.has("attention_mask") else 0


def _end_of(mask: LossMask) -> int:
    """Return the index after the last token that a mask includes."""
    return int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
