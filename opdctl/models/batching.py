"""Batches of sequences: split by a token budget, and padded or packed.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opdctl.artifacts.records import Ids
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

    Response token n, in the order of the given sequences, is input_ids_BT[rows_N[n], positions_N[n]]. lengths: the
    tokens of each response. packed: the sequences of the single row; None if each row has one.
    """

    input_ids_BT: Tensor
    rows_N: Tensor
    positions_N: Tensor
    lengths: list[int]
    packed: PackedSequences | None = None

    def split(self, values_N: Tensor) -> Iterator[Tensor]:
        """Split per-token values into one tensor per response."""
        return iter(values_N.split(self.lengths))


def pad_batch(sequences: Sequence[tuple[Ids, Ids]], device: torch.device | str) -> SequenceBatch:
    """Pad (prompt ids, response ids) pairs with id 0. It is a valid id too, so the batch holds the real lengths."""
    lengths = [len(response) for _, response in sequences]
    starts = np.array([len(prompt) for prompt, _ in sequences], np.int64)
    ids = np.zeros((len(sequences), max(int(s) + n for s, n in zip(starts, lengths, strict=True))), np.int64)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(response)] = response
    rows = np.repeat(np.arange(len(sequences)), lengths)
    return SequenceBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(starts[rows] + _positions_within(lengths)).to(device),
        lengths,
    )


def pack_batch(sequences: Sequence[tuple[Ids, Ids]], device: torch.device | str) -> SequenceBatch:
    """Put (prompt ids, response ids) pairs one after another into one row. A prompt has at least one id."""
    lengths = [len(response) for _, response in sequences]
    ends = np.cumsum([len(prompt) + len(response) for prompt, response in sequences])
    positions = np.repeat(ends - lengths, lengths) + _positions_within(lengths)
    ids = np.concatenate([ids for pair in sequences for ids in pair]).astype(np.int64)
    device = torch.device(device)
    return SequenceBatch(
        torch.from_numpy(ids[None]).to(device),
        torch.zeros(len(positions), dtype=torch.int64, device=device),
        torch.from_numpy(positions).to(device),
        lengths,
        PackedSequences(tuple(np.diff(ends, prepend=0).tolist()), device),
    )


def _positions_within(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the position of each token in its response, [N]."""
    return np.arange(sum(lengths)) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
