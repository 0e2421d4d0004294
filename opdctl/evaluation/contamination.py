"""Contamination: the fraction of a benchmark's word n-grams that occur in the training prompts. Imports no torch.

A problem counts as contaminated if at least half of its 8-grams occur in the prompts. The threshold is that of Tülu 3
(arXiv 2411.15124), which counts the tokens in 8-grams that are shared with one training document. One shared 8-gram is
often only a common phrase. A problem with fewer than 8 words is one n-gram.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NGRAM_WORDS = 8
CONTAMINATED_FRACTION = 0.5
CJK_CHARS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD_PATTERN = re.compile(f"[{CJK_CHARS}]|[^\\W_{CJK_CHARS}]+")  # in scripts without spaces, each character is a word
NGram = tuple[str, ...]


def ngram_overlap(problems: Mapping[str, str], prompts: Iterable[str]) -> dict[str, float]:
    """Return the fraction of each problem's n-grams that occur in any prompt, by problem id.

    A problem without words is left out.
    """
    ngrams = {name: {*_ngrams(words, min(NGRAM_WORDS, len(words)))} for name, words in _split_all(problems)}
    wanted = set().union(*ngrams.values())
    sizes = {len(ngram) for ngram in wanted}
    present: set[NGram] = set()
    for prompt in prompts:
        words = _split_words(prompt)
        present |= wanted.intersection(ngram for size in sizes for ngram in _ngrams(words, size))
    return {name: len(of_problem & present) / len(of_problem) for name, of_problem in ngrams.items()}


def measure_contamination(problems: Mapping[str, str], prompts: list[str]) -> dict[str, Any]:
    """Return the overlap for an evaluation's summary. fractions: of the problems with any overlap, largest first."""
    fractions = {name: fraction for name, fraction in ngram_overlap(problems, prompts).items() if fraction}
    return {
        "ngram": NGRAM_WORDS,
        "prompts": len(prompts),
        "problems": len(problems),
        "overlapping": len(fractions),
        "contaminated": sum(fraction >= CONTAMINATED_FRACTION for fraction in fractions.values()),
        "fractions": dict(sorted(fractions.items(), key=lambda pair: -pair[1])),
    }


def _split_all(problems: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the id and the words of each problem that has words."""
    for name, text in problems.items():
        if words := _split_words(text):
            yield name, words


def _split_words(text: str) -> list[str]:
    return WORD_PATTERN.findall(text.lower())


def _ngrams(words: list[str], size: int) -> Iterator[NGram]:
    for start in range(len(words) - size + 1):
        yield tuple(words[start : start + size])
