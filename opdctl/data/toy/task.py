"""What an embedded task is: problems without end, a worked answer to each, and how an answer is read. No models."""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TEST_FRACTION = 8  # one problem in eight, chosen by its hash, is kept for testing
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `answer` is the gold answer, not the worked response."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """One task. `generate` returns a prompt's text before its `?`; `write_solution` the answer to it, step by step, the text that the
    teacher was trained to write: what follows its last `>` is the answer."""

    name: str
    generate: Callable[[random.Random], str]
    write_solution: Callable[[str], str]

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield the endless, reproducible sequence of distinct problems of `split` that `seed` fixes."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        seen: set[str] = set()
        while True:
            text = self.generate(rng)
            if split_of(text) == split and text not in seen:
                seen.add(text)
                answer = self.extract(self.write_solution(text))
                assert answer is not None  # a worked answer has one
                yield Problem(f"{self.name}-{text.replace(':', '-')}", f"{text}?", answer)

    def solve(self, prompt: str) -> str:
        """Return the worked answer to `prompt`."""
        return self.write_solution(prompt.removesuffix("?"))

    def extract(self, response: str) -> str | None:
        """Return the answer that `response` gives, or None where it gives none."""
        _, marker, answer = response.rpartition(">")
        return answer if marker else None

    def on_track(self, prompt: str, beginning: str) -> bool:
        """Whether the beginning of a response is that of the worked answer: no step has been missed or gone wrong."""
        return self.solve(prompt).startswith(beginning)


def split_of(text: str) -> str:
    """Return the split that a prompt belongs to; a property of its text, so the splits are disjoint for every seed."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % TEST_FRACTION == 0 else "train"
