"""The embedded task: sort twelve letters by taking out the least one, again and again, in writing.

Knows how a problem is drawn, how its worked answer is written, and how an answer is read. Knows nothing of models.

    prompt    qkbz…?
    response  b:qkz…;k:qz…;…;z:;>bkq…z        each pass names the least letter left, then the rest

The answer is what follows the last `>`. Every prompt has 13 characters and every worked answer 115 (116 tokens with
the end of sequence), so a reader can tell at a glance where in the response a trace went wrong.
"""

import hashlib
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

LETTERS = 12
TEST_SHARE = 8  # one word in eight, chosen by its hash, is kept for testing
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `answer` is the gold answer, not the worked response."""

    id: str
    prompt: str
    answer: str


def split_of(word: str) -> str:
    """Return the split that `word` belongs to; a property of the word, so the splits are disjoint for every seed."""
    return "test" if hashlib.sha256(word.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def problems(split: str, seed: int) -> Iterator[Problem]:
    """Yield the endless, reproducible sequence of distinct problems of `split` that `seed` fixes."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"sort12/{split}/{seed}")
    seen: set[str] = set()
    while True:
        word = "".join(rng.sample(string.ascii_lowercase, LETTERS))
        if split_of(word) == split and word not in seen:
            seen.add(word)
            yield Problem(id=f"sort12-{word}", prompt=f"{word}?", answer="".join(sorted(word)))


def solve(word: str) -> str:
    """Return the worked answer to `word`, the text that the teacher was trained to write."""
    left, passes = list(word), []
    while left:
        least = min(left)
        left.remove(least)
        passes.append(f"{least}:{''.join(left)};")
    return f"{''.join(passes)}>{''.join(sorted(word))}"


def extract(response: str) -> str | None:
    """Return the answer that `response` gives, or None where it gives none."""
    _, marker, answer = response.rpartition(">")
    return answer if marker else None


def on_track(prompt: str, beginning: str) -> bool:
    """Whether the beginning of a response is that of the worked answer: no step has been missed or gone wrong."""
    return solve(prompt.removesuffix("?")).startswith(beginning)
