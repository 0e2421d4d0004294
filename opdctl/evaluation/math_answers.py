"""Mathematical answers: what a text says, and whether two texts say the same. Knows no process.

A text is first made tidy: what surrounds a value without being one goes, such as units, separators of thousands and
spacing commands. Many pairs are then decided by sight. The rest is taken apart into single values, in order or not, and
math-verify compares these: it is told nothing of brackets, number of values and bases, which it takes for equal too
easily. It may hang or die on an answer, so all but `by_sight` is for workers that can be killed.

A percent sign is a unit like any other: 10 and 10 % are the same answer to "by what percent", and 0.1 is another.
"""

import logging
import os
import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

LONGEST = 2000  # characters; no gold answer comes near, and what is longer is no answer
MEMORY = 4 * 2**30  # bytes of address space for a worker
SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "°": "",
    }
)
SPACING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~|\\?\$|\\?%")
FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
EMPTY = re.compile(r"\\(?:emptyset|varnothing)(?![a-zA-Z])")
MEMBER = re.compile(r"\s*[a-zA-Z]\s*\\in(?![a-zA-Z])\s*(?=[(\[\\])")
DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])")
THOUSANDS = re.compile(r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
BARE_COMMAND = re.compile(r"(?<![\\a-zA-Z])(?=(?:sqrt|frac)\s*\{)")
FONT = re.compile(r"\\(?:math(?:bf|sf)|bm|boldsymbol|text(?:bf|it))\s*\{([^{}]*)\}")
TEXT = re.compile(r"\\(?:text|textrm|mbox|mathrm|operatorname)\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
CONNECTIVE = re.compile(r"\s*(?:,\s*)?(?:and|or)\s*")
UNITS = re.compile(r"(?<=\d)\s*(?:k?m/[hs]|[cmk]m|kg|ft|mph|lbs?)(?:\s*\^\s*\{?[23]\}?)?$")
WORDS = re.compile(r"(?<=[\d})])\s+(?!(?:and|mod)\b)[a-zA-Z]{3,}(?:[ .]+[a-zA-Z]+)*\.?$")
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)", re.ASCII)
POWER = re.compile(r"([+-]?\d{1,400}(?:\.\d{1,400})?)(?:\\cdot|\\times)10\^\{?([+-]?\d{1,3})\}?", re.ASCII)
NUMBER = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})", re.ASCII)
RATIO = re.compile(r"([+-]?)(?:\\frac\{(\d{1,400})\}\{(\d{1,400})\}|\\frac(\d)(\d)|(\d{1,400})/(\d{1,400}))", re.ASCII)
NAME = re.compile(r"\(?([a-zA-Z])\)?|([a-zA-Z]{3,}(?: [a-zA-Z]+)*)")
BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*(?:\{\s*(\w+)\s*\}|(\d+))")
DIGITS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BASES = {name: str(base) for base, name in enumerate(DIGITS, 2)}
MATRIX = re.compile(r"\\begin\s*\{([pbvB]?matrix)\}(.*)\\end\s*\{\1\}", re.DOTALL)
BELOW, ABOVE = r"(?:<|\\l(?:t|eq?(?:slant)?)(?![a-z]))", r"(?:>|\\g(?:t|eq?(?:slant)?)(?![a-z]))"
BETWEEN = re.compile(rf"(.+?)({BELOW})\s*[a-zA-Z]\s*({BELOW})(.+)")
TURN = {"<": ">", ">": "<"} | {
    f"\\{a}{end}": f"\\{b}{end}" for a, b in ("lg", "gl") for end in ("t", "e", "eq", "eqslant")
}
TURNED = re.compile(rf"([^<>]+?)\s*({BELOW}|{ABOVE})\s*([a-zA-Z])")
ONE_SIDED = re.compile(rf"[a-zA-Z]\s*({BELOW}|{ABOVE})(.+)")


class UnreadableError(Exception):
    """A value that is no mathematics, as far as math-verify can read."""


# ── What a text says ─────────────────────────────────────────────────────────────────────────────────────────────────


def normalize(text: str) -> str:
    """Return the answer without what surrounds it: spacing, currency, fonts, units, separators of thousands."""
    text = EMPTY.sub(r"\\{\\}", SPACING.sub(" ", text.translate(SYMBOLS).replace(r"\!", "")))
    text = MEMBER.sub("", FRACTION.sub(r"\\frac", text))
    text = FONT.sub(r"\1", DEGREES.sub("", BARE_COMMAND.sub(r"\\", text)))
    text = THOUSANDS.sub(lambda found: re.sub(r"[{,}]", "", found[0]), text)
    text = UNITS.sub("", WORDS.sub("", TEXT.sub(_taken_off, text).strip()))
    text = REPEATING.sub(_as_ratio, text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(" .")
    power = SCIENTIFIC.fullmatch(text)
    return rf"{power[1]} \cdot 10^{{{power[2]}}}" if power else text


def _taken_off(text: re.Match[str]) -> str:
    """Take `\\text{…}` off: between values it joins them, behind a value it is a unit, alone it is the answer."""
    if CONNECTIVE.fullmatch(text[1]):
        return ","
    return "" if re.search(r"[\d})]\s*$", text.string[: text.start()]) else text[1]


def _as_ratio(found: re.Match[str]) -> str:
    """0.1\\overline{6} is (16 - 1) / 90."""
    whole, once, again = found.groups()
    numerator = int(whole + once + again) - int((whole + once) or 0)
    return rf"\frac{{{numerator}}}{{{'9' * len(again)}{'0' * len(once)}}}"


@dataclass(frozen=True)
class Values:
    """The values that an answer is made of, and what stands around them: brackets where their order matters."""

    each: tuple[str, ...]
    opening: str = ""
    closing: str = ""

    @property
    def ordered(self) -> bool:
        return bool(self.opening)


def values(text: str) -> Values:
    """Take a tidy answer apart: a tuple or interval, a column of numbers, or a list or set, whose order is nothing."""
    text = text.strip()
    if matrix := MATRIX.fullmatch(text):
        rows = [[cell.strip() for cell in row.split("&")] for row in matrix[2].strip().split(r"\\") if row.strip()]
        if len(rows) == 1 or all(len(row) == 1 for row in rows):
            return Values(tuple(cell for row in rows for cell in row), "(", ")")
    if (interval := _interval(text)) is not None:
        return interval
    for opening, closing in ((r"\{", r"\}"), ("{", "}"), *((a, b) for a in "([" for b in ")]")):
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(text) - len(inner) == len(opening + closing) and _encloses(text, len(opening), len(closing)):
            parts = _split(inner)
            if "{" in opening:
                return Values(tuple(sign for part in parts for sign in _signs(part)))
            if len(parts) > 1:
                return Values(tuple(parts), opening, closing)
    return Values(tuple(sign for part in _split(text) for sign in _signs(part)))


def _interval(text: str) -> Values | None:
    """Return what an inequality in one variable says as an interval, or None."""
    if between := BETWEEN.fullmatch(text):
        low, first, second, high = (part.strip() for part in between.groups())
        return Values((low, high), "[" if "e" in first else "(", "]" if "e" in second else ")")
    if turned := TURNED.fullmatch(text):  # 2 < x
        text = f"{turned[3]} {TURN[turned[2]]} {turned[1]}"
    if one := ONE_SIDED.fullmatch(text):
        sign, bound = one[1], one[2].strip()
        if re.search(f"{BELOW}|{ABOVE}|,", bound):
            return None
        if re.fullmatch(BELOW, sign):
            return Values((r"-\infty", bound), "(", "]" if "e" in sign else ")")
        return Values((bound, r"\infty"), "[" if "e" in sign else "(", ")")
    return None


def _depths(text: str) -> list[int]:
    """Return how many brackets are open before each character, and at the end. `\\{` is a bracket like the others."""
    depths, depth = [0], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        depths.append(depth)
    return depths


def _encloses(text: str, opening: int, closing: int) -> bool:
    """Whether the bracket that begins the text is the one that ends it."""
    return min(_depths(text)[opening : len(text) - closing + 1], default=0) >= 1 and _depths(text)[-1] == 0


def _split(text: str, separators: str = ",;") -> list[str]:
    """Split at the commas that stand in no bracket."""
    depths = _depths(text)
    cuts = [-1, *(i for i, char in enumerate(text) if char in separators and depths[i] == 0), len(text)]
    return [text[a + 1 : b].strip() for a, b in pairwise(cuts)]


def _signs(value: str) -> list[str]:
    """`a \\pm b` are two values."""
    return [value.replace(r"\pm", sign) for sign in "+-"] if value.count(r"\pm") == 1 else [value]


# ── Whether two say the same ─────────────────────────────────────────────────────────────────────────────────────────


def quick_compare(gold: str, answer: str) -> bool | None:
    """Return whether two tidy answers are the same where that needs no algebra, else None."""
    if gold and gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    if name := NAME.fullmatch(gold):
        other = NAME.fullmatch(answer)
        if other or name[2]:  # words are compared by their letters; math-verify takes them for products
            return other is not None and (name[1] or name[2]).casefold() == (other[1] or other[2]).casefold()
    one, other_number = number(gold), number(answer)
    if one is None or other_number is None:
        return None
    if one == other_number:
        return True
    return None if "." in gold + answer else False  # a rounded decimal may still do


def number(text: str) -> Fraction | None:
    """Return the value of an integer, decimal or ratio of moderate length, else None."""
    text = text.replace(" ", "")
    if NUMBER.fullmatch(text):
        return Fraction(text)
    if power := POWER.fullmatch(text):
        return Fraction(power[1]) * Fraction(10) ** int(power[2])
    if ratio := RATIO.fullmatch(text):
        sign, *parts = (part for part in ratio.groups() if part is not None)
        return Fraction(int(sign + parts[0]), int(parts[1])) if int(parts[1]) else None
    return None


def is_equivalent(gold: str, answer: str) -> bool:
    """Return whether two tidy answers say the same; gold first. For a worker.

    Raises UnreadableError where a value of either is no mathematics.
    """
    if (seen := quick_compare(gold, answer)) is not None:
        return seen
    one, other = values(gold), values(answer)
    if len(one.each) != len(other.each):
        return _same_union(gold, answer)
    if one.ordered and not other.ordered and not answer.startswith(r"\{"):
        other = Values(other.each, one.opening, one.closing)  # a tuple without its brackets
    if (one.opening, one.closing) != (other.opening, other.closing):
        return False
    if len(one.each) == 1:
        return _same_union(gold, answer) if r"\cup" in gold + answer else _same_value(one.each[0], other.each[0])
    return _matched(one.each, other.each, ordered=one.ordered)


def _same_union(gold: str, answer: str) -> bool:
    """Compare unions of intervals; several inequalities are one too."""
    one, other = (_pieces(text) for text in (gold, answer))
    return len(one) == len(other) > 1 and _matched(one, other, ordered=False)


def _pieces(text: str) -> list[str]:
    return text.split(r"\cup") if r"\cup" in text else _split(text)


def _matched(gold: Sequence[str], answer: Sequence[str], *, ordered: bool) -> bool:
    """Whether each value has its own match: in order, or any that is left."""
    if ordered:
        return all(is_equivalent(one, other) for one, other in zip(gold, answer, strict=True))
    left = list(answer)
    for one in gold:
        found = next((other for other in left if is_equivalent(one.strip(), other.strip())), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_value(gold: str, answer: str) -> bool:
    one, other = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if one and other and _base(one) != _base(other):
        return False
    if one or other:  # one that is left out is the one that was asked for
        return (one[1] if one else gold).upper() == (other[1] if other else answer).upper()
    if (seen := quick_compare(gold, answer)) is not None:
        return seen
    return _verified(gold, answer)


def _base(found: re.Match[str]) -> str:
    return BASES.get(found[2] or found[3], found[2] or found[3])


def _verified(gold: str, answer: str) -> bool:
    from math_verify import verify

    try:
        return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError):
        raise  # the worker's end, not the answer's form
    except Exception as error:  # math-verify passes on whatever sympy raises
        raise UnreadableError(str(error)) from error


def _parsed(value: str) -> list[object]:
    """Parse as LaTeX alone: math-verify's other way evaluates the text as Python. Units are gone already: a letter is a
    variable."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    tidying = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
    way = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=tidying)]
    found: list[object] = parse(f"\\boxed{{{value}}}", way, parsing_timeout=None, raise_on_error=True)
    if not found or isinstance(found[0], str):
        raise UnreadableError(value)
    return found


def is_parsable(gold: str) -> bool:
    """Whether answers in another spelling can be compared with this tidy gold answer. For a worker."""
    try:
        for value in (value for piece in gold.split(r"\cup") for value in values(piece).each):
            if not NAME.fullmatch(value) and not BASE.fullmatch(value):
                _parsed(value)
    except Exception:  # math-verify passes on whatever sympy raises
        return False
    return True


def init_worker() -> None:
    """Make ready a worker: bound its memory, and import what takes a second, before any time limit runs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # gmpy2, where sympy finds it, hangs for ever or aborts on towers of powers.
    os.environ["SYMPY_GROUND_TYPES"] = "python"
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # that its own time limits are off is known
