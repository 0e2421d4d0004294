"""Batches of sequences: cut by a token budget, laid out side by side. Knows nothing of what the tokens are for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opdctl.artifacts.records import Ids


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut sequences into batches of at most `budget` tokens, padding included; a longer sequence goes alone.

    Returns indices. Sorted by length, so that padding is small; ties keep their order, so the cut is always the same.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts and responses side by side, padded on the right.

    Token n of the batch's N response tokens, in the order of the rows given, is
    input_ids_BT[rows_N[n], positions_N[n]].
    """

    input_ids_BT: Tensor
    rows_N: Tensor
    positions_N: Tensor
    lengths: list[int]

    def split(self, values_N: Tensor) -> Iterator[Tensor]:
        """Cut per-token values back into one tensor a response."""
        return iter(values_N.split(self.lengths))


def pad_batch(sequences: Sequence[tuple[Ids, Ids]], device: torch.device | str) -> PaddedBatch:
    """Lay out (prompt ids, response ids) pairs. Real lengths come with it: a pad id may well be a real id too."""
    lengths = [len(response) for _, response in sequences]
    starts = np.array([len(prompt) for prompt, _ in sequences], np.int64)
    ids = np.zeros((len(sequences), max(int(s) + n for s, n in zip(starts, lengths, strict=True))), np.int64)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(response)] = response
    rows = np.repeat(np.arange(len(sequences)), lengths)
    within = np.arange(len(rows)) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return PaddedBatch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(starts[rows] + within).to(device),
        lengths,
    )
