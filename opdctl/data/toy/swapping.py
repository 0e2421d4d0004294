"""perm: apply twelve swaps to five letters, in writing.

    prompt    jhdil:0103…14?                  five cells, then pairs of cells to swap
    response  01hjdil;03ijdhl;…;>jhdli        each pair with the cells after its swap, then the final cells

Every prompt has 31 characters and every worked answer 102. perm4 and perm8 have fewer swaps: the same skill in
responses of 38 and 70 characters.
"""

import random
import string
from functools import partial

from opdctl.data.toy.task import Task

CELLS = 5


def sample_swaps(rng: random.Random, swaps: int) -> str:
    cells = "".join(rng.sample(string.ascii_lowercase, CELLS))
    pairs = (sorted(rng.sample(range(CELLS), 2)) for _ in range(swaps))
    return f"{cells}:{''.join(f'{first}{second}' for first, second in pairs)}"


def parse_prompt(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the cells and the pairs of a prompt."""
    cells, _, digits = text.partition(":")
    return list(cells), [(int(first), int(second)) for first, second in zip(digits[::2], digits[1::2], strict=True)]


def swap_in_writing(text: str) -> str:
    cells, pairs = parse_prompt(text)
    passes = []
    for first, second in pairs:
        cells[first], cells[second] = cells[second], cells[first]
        passes.append(f"{first}{second}{''.join(cells)};")
    return f"{''.join(passes)}>{''.join(cells)}"


perm = Task("perm", partial(sample_swaps, swaps=12), swap_in_writing)
perm4 = Task("perm4", partial(sample_swaps, swaps=4), swap_in_writing)
perm8 = Task("perm8", partial(sample_swaps, swaps=8), swap_in_writing)
