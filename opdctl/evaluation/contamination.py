"""Contamination: how much of a benchmark stands in the training prompts, by n-grams of words. Imports no torch.

A problem is counted as seen when half of its 8-grams or more occur in the prompts, the rule of Tülu 3
(arXiv 2411.15124); a single one is often only a common phrase. A problem of fewer words must occur whole.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

N = 8
CONTAMINATED_FRACTION = 0.5
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")  # scripts without spaces: each character is a word
Gram = tuple[str, ...]


def overlap(problems: Mapping[str, str], prompts: Iterable[str]) -> dict[str, float]:
    """Return for each problem, by id, the share of its n-grams that occur in any prompt."""
    grams = {name: {*_grams(words, min(N, len(words)))} for name, text in problems.items() if (words := _words(text))}
    wanted = set().union(*grams.values())
    sizes = {len(gram) for gram in wanted}
    found: set[Gram] = set()
    for prompt in prompts:
        words = _words(prompt)
        found |= wanted.intersection(gram for size in sizes for gram in _grams(words, size))
    return {name: len(own & found) / len(own) for name, own in grams.items()}


def report(problems: Mapping[str, str], prompts: list[str]) -> dict[str, Any]:
    """Return the overlap as an evaluation's summary holds it; `shares` are of the problems that have any."""
    shares = {name: share for name, share in overlap(problems, prompts).items() if share}
    return {
        "ngram": N,
        "prompts": len(prompts),
        "problems": len(problems),
        "overlapping": len(shares),
        "seen": sum(share >= CONTAMINATED_FRACTION for share in shares.values()),
        "shares": dict(sorted(shares.items(), key=lambda pair: -pair[1])),
    }


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: list[str], size: int) -> Iterator[Gram]:
    for start in range(len(words) - size + 1):
        yield tuple(words[start : start + size])
