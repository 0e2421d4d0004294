"""Batches of sequences: split by a token budget, and padded.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opdctl.artifacts.records import Ids


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


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts with their responses, padded on the right.

    Response token n, in the order of the given rows, is input_ids_BT[rows_N[n], positions_N[n]].
    """

    input_ids_BT: Tensor
    rows_N: Tensor
    positions_N: Tensor
    lengths: list[int]

    def split(self, values_N: Tensor) -> Iterator[Tensor]:
        """Split per-token values into one tensor per response."""
        return iter(values_N.split(self.lengths))


def pad_batch(sequences: Sequence[tuple[Ids, Ids]], device: torch.device | str) -> PaddedBatch:
    """Pad (prompt ids, response ids) pairs with id 0. It is a valid id too, so the batch holds the real lengths."""
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
