"""sort12: sort twelve letters by repeatedly removing the smallest one, in writing.

    prompt    qkbz…?
    response  b:qkz…;k:qz…;…;z:;>bkq…z        each pass: the smallest remaining letter, then the rest

Every prompt has 13 characters and every worked answer 115 (116 tokens with the end of sequence), so positions are
comparable between responses.
"""

import random
import string

from opdctl.data.toy.task import Task

LETTERS = 12


def sample_word(rng: random.Random) -> str:
    return "".join(rng.sample(string.ascii_lowercase, LETTERS))


def sort_in_writing(word: str) -> str:
    remaining, passes = list(word), []
    while remaining:
        smallest = min(remaining)
        remaining.remove(smallest)
        passes.append(f"{smallest}:{''.join(remaining)};")
    return f"{''.join(passes)}>{''.join(sorted(word))}"


sort12 = Task("sort12", sample_word, sort_in_writing)
