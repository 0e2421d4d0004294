"""How the responses of a step are divided into micro-batches, and these among the ranks.

All ranks gather each sharded layer together, so in a round, one micro-batch of each rank, all wait for the most costly.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from opdctl.models.batching import by_token_budget, pack_by_token_budget


@dataclass(frozen=True)
class Division:
    """The rules of the division. attention_span: see `models.shapes`; if infinite, costs are linear in the length."""

    world_size: int = 1
    packs: bool = False
    attention_span: float = math.inf

    def cost(self, length: int) -> float:
        """Return the cost of a sequence relative to that of one token without attention."""
        return length * (1 + length / self.attention_span)

    def batch_cost(self, lengths: Sequence[int]) -> float:
        """Return the cost of a micro-batch of sequences of these lengths."""
        return sum(map(self.cost, lengths)) if self.packs else len(lengths) * self.cost(max(lengths))


@dataclass(frozen=True)
class Share:
    """The indices of a micro-batch's responses. A filler repeats those of another one, and must not count."""

    indices: list[int]
    is_filler: bool = False


def divide(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, division: Division
) -> list[list[Share]]:
    """Return the micro-batches of each rank in order; every rank gets the same number.

    The micro-batches of a round have similar costs, and so have the sums of the ranks. Each has responses of one group,
    and at most `budget` tokens unless it is one response.

    groups: the indices of responses that may be together. lengths: the tokens of all responses, with their prompts.
    """
    divide_groups = _divide_packed if division.packs else _divide_padded
    batches = divide_groups([group for group in groups if group], lengths, budget, division)

    def cost(batch: list[int]) -> float:
        return division.batch_cost([lengths[i] for i in batch])

    shares = [Share(batch) for batch in sorted(batches, key=cost, reverse=True)]
    shares += [Share(shares[-1].indices, is_filler=True)] * (-len(shares) % division.world_size)
    rounds = [shares[i : i + division.world_size] for i in range(0, len(shares), division.world_size)]
    # The first rank has the most costly micro-batch of one round and the least costly one of the next.
    alternating = [of_round[:: -1 if i % 2 else 1] for i, of_round in enumerate(rounds)]
    return [list(of_rank) for of_rank in zip(*alternating, strict=True)]


def _divide_packed(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, division: Division
) -> list[list[int]]:
    """Return the fewest packed micro-batches of similar cost whose number the ranks divide, if there are as many."""
    costs = [sum(division.cost(lengths[i]) for i in group) for group in groups]
    asked: list[int] = [1] * len(groups)
    while True:
        packs = [_pack(group, lengths, budget, division, count) for group, count in zip(groups, asked, strict=True)]
        counts = [len(of_group) for of_group in packs]
        for _ in range(-sum(counts) % division.world_size):
            growing = [g for g in range(len(groups)) if counts[g] < len(groups[g])]
            if growing:
                counts[max(growing, key=lambda g: costs[g] / counts[g])] += 1
        if counts == asked:
            return [pack for of_group in packs for pack in of_group]
        asked = counts


def _pack(group: Sequence[int], lengths: Sequence[int], budget: int, division: Division, count: int) -> list[list[int]]:
    own = [lengths[i] for i in group]
    packs = pack_by_token_budget(own, budget, [division.cost(length) for length in own], count)
    return [[group[i] for i in pack] for pack in packs]


def _divide_padded(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], budget: int, division: Division
) -> list[list[int]]:
    """Return padded micro-batches of the least budget that needs as many rounds as the given one.

    The most costly ones are halved until the ranks divide their number.
    """

    def split(limit: int) -> list[list[int]]:
        own = [([lengths[i] for i in group], group) for group in groups]
        return [[group[i] for i in batch] for sizes, group in own for batch in by_token_budget(sizes, limit)]

    rounds = math.ceil(len(split(budget)) / division.world_size)
    batches = split(
        bisect.bisect_left(range(budget), True, key=lambda b: len(split(b)) <= rounds * division.world_size)
    )
    while len(batches) % division.world_size and (divisible := [batch for batch in batches if len(batch) > 1]):
        largest = max(divisible, key=lambda batch: division.batch_cost([lengths[i] for i in batch]))
        half = len(largest) // 2
        batches.remove(largest)
        batches += [largest[:half], largest[half:]]
    return batches
