"""Contamination: how much of a benchmark's problem occurs in one of the training prompts. Imports no torch.

The rule is that of Tülu 3 (arXiv 2411.15124, decontamination/search.py of its repository): a problem's overlap with a
prompt is the fraction of its words that lie in word 8-grams which the two share, and a problem is contaminated if its
greatest overlap with a single prompt exceeds one half. One shared 8-gram is often only a common phrase. Its words are
spaCy's tokens; here, words are found by a regular expression and punctuation does not count. A problem with fewer than
8 words, which that rule never finds, is one n-gram.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NGRAM_WORDS = 8
CONTAMINATED_FRACTION = 0.5
"""A problem with a greater overlap is contaminated."""
CJK_CHARS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD_PATTERN = re.compile(f"[{CJK_CHARS}]|[^\\W_{CJK_CHARS}]+")  # in scripts without spaces, each character is a word
NGram = tuple[str, ...]


def ngram_overlap(problems: Mapping[str, str], prompts: Iterable[str]) -> dict[str, float]:
    """Return each problem's greatest overlap with a single prompt, by problem id.

    A problem without words is left out.
    """
    lengths = {name: len(words) for name, text in problems.items() if (words := _split_words(text))}
    places: dict[NGram, list[tuple[str, int]]] = {}
    for name in lengths:
        words = _split_words(problems[name])
        size = min(NGRAM_WORDS, len(words))
        for start, ngram in enumerate(_ngrams(words, size)):
            # The bits of the n-gram's words, so that the words of all shared n-grams are a bitwise or.
            places.setdefault(ngram, []).append((name, ((1 << size) - 1) << start))
    sizes = {len(ngram) for ngram in places}
    most_shared = dict.fromkeys(lengths, 0)
    for prompt in prompts:
        words = _split_words(prompt)
        shared: dict[str, int] = {}
        for ngram in places.keys() & {ngram for size in sizes for ngram in _ngrams(words, size)}:
            for name, bits in places[ngram]:
                shared[name] = shared.get(name, 0) | bits
        for name, bits in shared.items():
            most_shared[name] = max(most_shared[name], bits.bit_count())
    return {name: most_shared[name] / length for name, length in lengths.items()}


def measure_contamination(problems: Mapping[str, str], prompts: list[str]) -> dict[str, Any]:
    """Return the overlap for an evaluation's summary. fractions: of the problems with any overlap, largest first."""
    fractions = {name: fraction for name, fraction in ngram_overlap(problems, prompts).items() if fraction}
    return {
        "ngram": NGRAM_WORDS,
        "prompts": len(prompts),
        "problems": len(problems),
        "overlapping": len(fractions),
        "contaminated": sum(fraction > CONTAMINATED_FRACTION for fraction in fractions.values()),
        "fractions": dict(sorted(fractions.items(), key=lambda pair: -pair[1])),
    }


def _split_words(text: str) -> list[str]:
    return WORD_PATTERN.findall(text.lower())


def _ngrams(words: list[str], size: int) -> Iterator[NGram]:
    for start in range(len(words) - size + 1):
        yield tuple(words[start : start + size])
