"""sort12: sort twelve letters by taking out the least one, again and again, in writing.

    prompt    qkbz…?
    response  b:qkz…;k:qz…;…;z:;>bkq…z        each pass names the least letter left, then the rest

Every prompt has 13 characters and every worked answer 115 (116 tokens with the end of sequence), so a reader can tell
at a glance where in the response a trace went wrong.
"""

import random
import string

from opdctl.data.toy.task import Task

LETTERS = 12


def generate(rng: random.Random) -> str:
    return "".join(rng.sample(string.ascii_lowercase, LETTERS))


def solve(word: str) -> str:
    left, passes = list(word), []
    while left:
        least = min(left)
        left.remove(least)
        passes.append(f"{least}:{''.join(left)};")
    return f"{''.join(passes)}>{''.join(sorted(word))}"


sort12 = Task("sort12", generate, solve)
