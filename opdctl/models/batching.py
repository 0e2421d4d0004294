"""Batches of sequences: split by a token budget, and padded or packed.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opdctl.artifacts.records import Ids, LossMask
from opdctl.models.packing import PackedSequences


def by_token_budget(lengths: Sequence[int], budget: int, pad_up_to: int | None = None) -> list[list[int]]:
    """Return batches of indices with at most `budget` tokens each, padding included. A longer sequence is alone.

    Sequences are sorted by length, which minimizes padding. Ties keep their order, so the batches are reproducible.
    pad_up_to: a batch of sequences longer than this has only sequences of one length.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and longest * (len(batches[-1]) + 1) <= budget
        if fits and (pad_up_to is None or longest <= pad_up_to or longest == lengths[index]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pack_by_token_budget(
    lengths: Sequence[int], budget: int, costs: Sequence[float], count: int = 1
) -> list[list[int]]:
    """Return at least `count` batches of indices with at most `budget` tokens each and similar costs; none is empty.

    Each sequence, the longest first, goes to the batch of least cost that has room, or to a new one: Graham's LPT rule
    (SIAM J. Appl. Math. 17, 1969) with a bound. A sequence longer than the budget is alone. Ties keep their order.
    """
    batches: list[list[int]] = [[] for _ in lengths]
    is_open = np.arange(len(lengths)) < count
    tokens_B, cost_B = np.zeros(len(lengths), np.int64), np.zeros(len(lengths))
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        has_room = is_open & ((tokens_B + lengths[index] <= budget) | (tokens_B == 0))
        batch = int(np.where(has_room, cost_B, np.inf).argmin()) if has_room.any() else int(is_open.argmin())
        is_open[batch] = True
        batches[batch].append(index)
        tokens_B[batch] += lengths[index]
        cost_B[batch] += costs[index]
    return [batch for batch in batches if batch]


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with their responses, one in each row and padded on the right, or packed into a single row.

    Response token n, in the order of the given sequences, is input_ids_BT[rows_N[n], positions_N[n]]; of a response
    with a mask, only the student's own tokens count. lengths: the number of these tokens of each response. packed: the
    sequences of the single row; None if each row has one.
    """

    input_ids_BT: Tensor
    rows_N: Tensor
    positions_N: Tensor
    lengths: list[int]
    packed: PackedSequences | None = None

    def split(self, values_N: Tensor) -> Iterator[Tensor]:
        """Split per-token values into one tensor per response."""
        return iter(values_N.split(self.lengths))


Masks = Sequence[LossMask | None]
"""The masks of responses, [T] each; None of a response whose tokens are all the student's own."""


def pad_batch(
    sequences: Sequence[tuple[Ids, Ids]], device: torch.device | str, masks: Masks | None = None
) -> SequenceBatch:
    """Pad (prompt ids, response ids) pairs with id 0. It is a valid id too, so the batch holds the real lengths."""
    places = _places_of_tokens(sequences, masks)
    ids = np.zeros((len(sequences), max(len(prompt) + len(response) for prompt, response in sequences)), np.int64)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(response)] = response
    lengths = [len(each) for each in places]
    return SequenceBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(np.repeat(np.arange(len(sequences)), lengths)).to(device),
        torch.from_numpy(np.concatenate(places)).to(device),
        lengths,
    )


def pack_batch(
    sequences: Sequence[tuple[Ids, Ids]], device: torch.device | str, masks: Masks | None = None
) -> SequenceBatch:
    """Put (prompt ids, response ids) pairs one after another into one row. A prompt has at least one id."""
    places = _places_of_tokens(sequences, masks)
    sizes = [len(prompt) + len(response) for prompt, response in sequences]
    starts = np.cumsum([0, *sizes[:-1]])
    positions = np.concatenate([start + each for start, each in zip(starts, places, strict=True)])
    ids = np.concatenate([ids for pair in sequences for ids in pair]).astype(np.int64)
    device = torch.device(device)
    return SequenceBatch(
        torch.from_numpy(ids[None]).to(device),
        torch.zeros(len(positions), dtype=torch.int64, device=device),
        torch.from_numpy(positions).to(device),
        [len(each) for each in places],
        PackedSequences(tuple(sizes), device),
    )


def _places_of_tokens(sequences: Sequence[tuple[Ids, Ids]], masks: Masks | None) -> list[npt.NDArray[np.int64]]:
    """Return the positions of each response's tokens that count in its sequence."""
    return [
        len(prompt) + (np.arange(len(response)) if mask is None else np.flatnonzero(mask))
        for (prompt, response), mask in zip(sequences, masks or [None] * len(sequences), strict=True)
    ]
