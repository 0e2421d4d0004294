"""A toy task: an endless stream of problems, a worked answer to each, and the extraction of an answer."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TEST_MODULUS = 8  # one problem in eight, selected by its hash, is in the test split
SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class ToyProblem:
    """A problem with its gold answer, which is not the worked response."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class ToyTool:
    """A tool that responses call. `run` returns the output after a call; each ends with a fixed character."""

    run: Callable[[str], str]
    call_end: str
    output_end: str

    def outputs(self, response: str) -> Iterator[range]:
        """Yield the positions of each output in a worked answer."""
        for match in re.finditer(f"(?<={self.call_end})[^{self.output_end}]*{self.output_end}", response):
            yield range(*match.span())


@dataclass(frozen=True, slots=True)
class Task:
    """A task. `generate` returns a prompt without its final `?`. `write_solution` returns the worked answer to it, on
    which the teacher was trained, with the outputs of the tool; the answer follows its last `>`."""

    name: str
    generate: Callable[[random.Random], str]
    write_solution: Callable[[str], str]
    tool: ToyTool | None = None

    def problems(self, split: str, seed: int) -> Iterator[ToyProblem]:
        """Yield an endless sequence of distinct problems of `split`, determined by `seed`."""
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
                yield ToyProblem(f"{self.name}-{text.replace(':', '-')}", f"{text}?", answer)

    def solve(self, prompt: str) -> str:
        """Return the worked answer to `prompt`."""
        return self.write_solution(prompt.removesuffix("?"))

    def extract(self, response: str) -> str | None:
        """Return the answer in `response`, or None if it has none."""
        _, marker, answer = response.rpartition(">")
        return answer if marker else None

    def on_track(self, prompt: str, prefix: str) -> bool:
        """Whether the prefix of a response is also one of the worked answer: no step is missing or incorrect."""
        return self.solve(prompt).startswith(prefix)


def split_of(text: str) -> str:
    """Return the split of a prompt. It depends on the text only, so the splits are disjoint for all seeds."""
    return "test" if hashlib.sha256(text.encode()).digest()[0] % TEST_MODULUS == 0 else "train"
