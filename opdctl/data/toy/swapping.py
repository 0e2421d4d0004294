"""perm: follow five letters through twelve swaps, in writing.

    prompt    jhdil:0103…14?                  five cells, then pairs of cells whose letters change places
    response  01hjdil;03ijdhl;…;>jhdli        each pair with the cells after it, then the cells at the end

Every prompt has 31 characters and every worked answer 102. perm4 and perm8 are the same with fewer swaps: one skill in
responses of 38, 70 and 102 characters.
"""

import random
import string
from functools import partial

from opdctl.data.toy.task import Task

CELLS = 5


def generate(rng: random.Random, swaps: int) -> str:
    cells = "".join(rng.sample(string.ascii_lowercase, CELLS))
    pairs = (sorted(rng.sample(range(CELLS), 2)) for _ in range(swaps))
    return f"{cells}:{''.join(f'{one}{other}' for one, other in pairs)}"


def read(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return a prompt's cells and its pairs."""
    cells, _, digits = text.partition(":")
    return list(cells), [(int(one), int(other)) for one, other in zip(digits[::2], digits[1::2], strict=True)]


def solve(text: str) -> str:
    cells, pairs = read(text)
    passes = []
    for one, other in pairs:
        cells[one], cells[other] = cells[other], cells[one]
        passes.append(f"{one}{other}{''.join(cells)};")
    return f"{''.join(passes)}>{''.join(cells)}"


perm = Task("perm", partial(generate, swaps=12), solve)
perm4 = Task("perm4", partial(generate, swaps=4), solve)
perm8 = Task("perm8", partial(generate, swaps=8), solve)
