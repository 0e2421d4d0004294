"""Mathematical answers: normalization of a text, and whether two texts have the same value. Starts no process.

`normalize` removes what does not change the value, such as units, separators of thousands and spacing commands.
`quick_compare` decides many pairs without algebra. `is_equivalent` splits the other answers into single values, ordered
or not, and compares these with math-verify. It compares brackets, the number of values and number bases itself, since
math-verify ignores most differences in them. math-verify can hang or crash, so `is_equivalent` and `is_parsable` must
run in workers that can be killed.

A percent sign counts as a unit: 10 and 10 % are the same answer to "by what percent", and 0.1 is a different one.
"""

import logging
import os
import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

MAX_ANSWER_CHARS = 2000  # gold answers are much shorter; a longer answer counts as unparsable
WORKER_MEMORY_BYTES = 4 * 2**30  # address space
UNICODE_TO_LATEX = str.maketrans(
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
SPACING_PATTERN = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~|\\?\$|\\?%")
FRACTION_COMMAND_PATTERN = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
EMPTY_SET_PATTERN = re.compile(r"\\(?:emptyset|varnothing)(?![a-zA-Z])")
MEMBERSHIP_PATTERN = re.compile(r"\s*[a-zA-Z]\s*\\in(?![a-zA-Z])\s*(?=[(\[\\])")
DEGREE_SIGN_PATTERN = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])")
GROUPED_DIGITS_PATTERN = re.compile(r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
MISSING_BACKSLASH_PATTERN = re.compile(r"(?<![\\a-zA-Z])(?=(?:sqrt|frac)\s*\{)")
FONT_COMMAND_PATTERN = re.compile(r"\\(?:math(?:bf|sf)|bm|boldsymbol|text(?:bf|it))\s*\{([^{}]*)\}")
TEXT_COMMAND_PATTERN = re.compile(r"\\(?:text|textrm|mbox|mathrm|operatorname)\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
CONJUNCTION_PATTERN = re.compile(r"\s*(?:,\s*)?(?:and|or)\s*")
UNIT_PATTERN = re.compile(r"(?<=\d)\s*(?:k?m/[hs]|[cmk]m|kg|ft|mph|lbs?)(?:\s*\^\s*\{?[23]\}?)?$")
TRAILING_WORDS_PATTERN = re.compile(r"(?<=[\d})])\s+(?!(?:and|mod)\b)[a-zA-Z]{3,}(?:[ .]+[a-zA-Z]+)*\.?$")
REPEATING_DECIMAL_PATTERN = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
E_NOTATION_PATTERN = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)", re.ASCII)
POWER_OF_TEN_PATTERN = re.compile(
    r"([+-]?\d{1,400}(?:\.\d{1,400})?)(?:\\cdot|\\times)10\^\{?([+-]?\d{1,3})\}?", re.ASCII
)
DECIMAL_PATTERN = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})", re.ASCII)
RATIO_PATTERN = re.compile(
    r"([+-]?)(?:\\frac\{(\d{1,400})\}\{(\d{1,400})\}|\\frac(\d)(\d)|(\d{1,400})/(\d{1,400}))", re.ASCII
)
LETTER_OR_WORDS_PATTERN = re.compile(r"\(?([a-zA-Z])\)?|([a-zA-Z]{3,}(?: [a-zA-Z]+)*)")
BASE_SUBSCRIPT_PATTERN = re.compile(r"([0-9A-Fa-f]+)\s*_\s*(?:\{\s*(\w+)\s*\}|(\d+))")
BASE_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BASE_BY_NAME = {name: str(base) for base, name in enumerate(BASE_NAMES, 2)}
MATRIX_PATTERN = re.compile(r"\\begin\s*\{([pbvB]?matrix)\}(.*)\\end\s*\{\1\}", re.DOTALL)
LESS_SIGN, GREATER_SIGN = r"(?:<|\\l(?:t|eq?(?:slant)?)(?![a-z]))", r"(?:>|\\g(?:t|eq?(?:slant)?)(?![a-z]))"
TWO_SIDED_INEQUALITY_PATTERN = re.compile(rf"(.+?)({LESS_SIGN})\s*[a-zA-Z]\s*({LESS_SIGN})(.+)")
FLIPPED_SIGN = {"<": ">", ">": "<"} | {
    f"\\{a}{end}": f"\\{b}{end}" for a, b in ("lg", "gl") for end in ("t", "e", "eq", "eqslant")
}
FLIPPED_INEQUALITY_PATTERN = re.compile(rf"([^<>]+?)\s*({LESS_SIGN}|{GREATER_SIGN})\s*([a-zA-Z])")
ONE_SIDED_INEQUALITY_PATTERN = re.compile(rf"[a-zA-Z]\s*({LESS_SIGN}|{GREATER_SIGN})(.+)")


class UnparsableError(Exception):
    """A value that math-verify cannot parse."""


# ── Normalization ────────────────────────────────────────────────────────────────────────────────────────────────────


def normalize(text: str) -> str:
    """Return the answer without spacing, currency, fonts, units and separators of thousands."""
    text = text.translate(UNICODE_TO_LATEX).replace(r"\!", "")
    text = SPACING_PATTERN.sub(" ", text)
    text = EMPTY_SET_PATTERN.sub(r"\\{\\}", text)
    text = FRACTION_COMMAND_PATTERN.sub(r"\\frac", text)
    text = MEMBERSHIP_PATTERN.sub("", text)
    text = MISSING_BACKSLASH_PATTERN.sub(r"\\", text)
    text = DEGREE_SIGN_PATTERN.sub("", text)
    text = FONT_COMMAND_PATTERN.sub(r"\1", text)
    text = GROUPED_DIGITS_PATTERN.sub(lambda match: re.sub(r"[{,}]", "", match[0]), text)
    text = TEXT_COMMAND_PATTERN.sub(_unwrap_text, text).strip()
    text = TRAILING_WORDS_PATTERN.sub("", text)
    text = UNIT_PATTERN.sub("", text)
    text = REPEATING_DECIMAL_PATTERN.sub(_to_fraction, text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(" .")
    power = E_NOTATION_PATTERN.fullmatch(text)
    return rf"{power[1]} \cdot 10^{{{power[2]}}}" if power else text


def _unwrap_text(match: re.Match[str]) -> str:
    """Return a comma for `\\text{and}` or `\\text{or}`, nothing for a unit after a value, else the content."""
    if CONJUNCTION_PATTERN.fullmatch(match[1]):
        return ","
    return "" if re.search(r"[\d})]\s*$", match.string[: match.start()]) else match[1]


def _to_fraction(match: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction: 0.1\\overline{6} is (16 - 1) / 90."""
    integer, prefix, period = match.groups()
    numerator = int(integer + prefix + period) - int((integer + prefix) or 0)
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(prefix)}}}"


# ── Single values ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Values:
    """The single values of an answer, and the brackets around them if their order matters."""

    items: tuple[str, ...]
    opening: str = ""
    closing: str = ""

    @property
    def are_ordered(self) -> bool:
        return bool(self.opening)


def split_values(text: str) -> Values:
    """Split a normalized answer: a tuple, an interval or a column vector is ordered, a list or a set is not."""
    text = text.strip()
    if matrix := MATRIX_PATTERN.fullmatch(text):
        rows = [[cell.strip() for cell in row.split("&")] for row in matrix[2].strip().split(r"\\") if row.strip()]
        if len(rows) == 1 or all(len(row) == 1 for row in rows):
            return Values(tuple(cell for row in rows for cell in row), "(", ")")
    if (interval := _parse_inequality(text)) is not None:
        return interval
    for opening, closing in ((r"\{", r"\}"), ("{", "}"), *((a, b) for a in "([" for b in ")]")):
        inner = text.removeprefix(opening).removesuffix(closing)
        if len(text) - len(inner) == len(opening + closing) and _encloses(text, len(opening), len(closing)):
            parts = _split_list(inner)
            if "{" in opening:
                return Values(tuple(value for part in parts for value in _expand_plus_minus(part)))
            if len(parts) > 1:
                return Values(tuple(parts), opening, closing)
    return Values(tuple(value for part in _split_list(text) for value in _expand_plus_minus(part)))


def _parse_inequality(text: str) -> Values | None:
    """Return the interval that an inequality in one variable describes, or None."""
    if two_sided := TWO_SIDED_INEQUALITY_PATTERN.fullmatch(text):
        low, first, second, high = (part.strip() for part in two_sided.groups())
        return Values((low, high), "[" if "e" in first else "(", "]" if "e" in second else ")")
    if flipped := FLIPPED_INEQUALITY_PATTERN.fullmatch(text):  # 2 < x
        text = f"{flipped[3]} {FLIPPED_SIGN[flipped[2]]} {flipped[1]}"
    if one_sided := ONE_SIDED_INEQUALITY_PATTERN.fullmatch(text):
        sign, bound = one_sided[1], one_sided[2].strip()
        if re.search(f"{LESS_SIGN}|{GREATER_SIGN}|,", bound):
            return None
        if re.fullmatch(LESS_SIGN, sign):
            return Values((r"-\infty", bound), "(", "]" if "e" in sign else ")")
        return Values((bound, r"\infty"), "[" if "e" in sign else "(", ")")
    return None


def _bracket_depths(text: str) -> list[int]:
    """Return the number of open brackets before each character and at the end. `\\{` is a bracket like the others."""
    depths, depth = [0], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        depths.append(depth)
    return depths


def _encloses(text: str, opening: int, closing: int) -> bool:
    """Whether the bracket that opens the text is closed by the one at its end; the arguments are their lengths."""
    depths = _bracket_depths(text)
    return min(depths[opening : len(text) - closing + 1], default=0) >= 1 and depths[-1] == 0


def _split_list(text: str) -> list[str]:
    """Split at the commas and semicolons outside brackets."""
    depths = _bracket_depths(text)
    cuts = [-1, *(i for i, char in enumerate(text) if char in ",;" and depths[i] == 0), len(text)]
    return [text[a + 1 : b].strip() for a, b in pairwise(cuts)]


def _expand_plus_minus(value: str) -> list[str]:
    """Return the two values of `a \\pm b`, or any other value alone."""
    return [value.replace(r"\pm", sign) for sign in "+-"] if value.count(r"\pm") == 1 else [value]


# ── Equality ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def quick_compare(gold: str, answer: str) -> bool | None:
    """Return whether two normalized answers are equal, or None if that requires algebra."""
    if gold and gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    if expected := LETTER_OR_WORDS_PATTERN.fullmatch(gold):
        actual = LETTER_OR_WORDS_PATTERN.fullmatch(answer)
        if actual or expected[2]:  # compare words as text; math-verify reads them as products of letters
            return actual is not None and (expected[1] or expected[2]).casefold() == (actual[1] or actual[2]).casefold()
    gold_number, number = parse_number(gold), parse_number(answer)
    if gold_number is None or number is None:
        return None
    if gold_number == number:
        return True
    return None if "." in gold + answer else False  # math-verify accepts a decimal rounded to six digits


def parse_number(text: str) -> Fraction | None:
    """Return the value of an integer, decimal or ratio of up to 400 digits, or None."""
    text = text.replace(" ", "")
    if DECIMAL_PATTERN.fullmatch(text):
        return Fraction(text)
    if power := POWER_OF_TEN_PATTERN.fullmatch(text):
        return Fraction(power[1]) * Fraction(10) ** int(power[2])
    if ratio := RATIO_PATTERN.fullmatch(text):
        sign, numerator, denominator = (part for part in ratio.groups() if part is not None)
        return Fraction(int(sign + numerator), int(denominator)) if int(denominator) else None
    return None


def is_equivalent(gold: str, answer: str) -> bool:
    """Return whether two normalized answers are equal. Runs in a worker.

    Raises:
        UnparsableError: math-verify cannot parse a value of either answer.
    """
    if (are_equal := quick_compare(gold, answer)) is not None:
        return are_equal
    expected, actual = split_values(gold), split_values(answer)
    if len(expected.items) != len(actual.items):
        return _unions_match(gold, answer)
    if expected.are_ordered and not actual.are_ordered and not answer.startswith(r"\{"):
        actual = Values(actual.items, expected.opening, expected.closing)  # a tuple without its brackets
    if (expected.opening, expected.closing) != (actual.opening, actual.closing):
        return False
    if len(expected.items) == 1:
        if r"\cup" in gold + answer:
            return _unions_match(gold, answer)
        return _single_values_match(expected.items[0], actual.items[0])
    return _items_match(expected.items, actual.items, ordered=expected.are_ordered)


def _unions_match(gold: str, answer: str) -> bool:
    """Compare unions of intervals; several inequalities are one too."""
    expected, actual = _union_members(gold), _union_members(answer)
    return len(expected) == len(actual) > 1 and _items_match(expected, actual, ordered=False)


def _union_members(text: str) -> list[str]:
    return text.split(r"\cup") if r"\cup" in text else _split_list(text)


def _items_match(gold: Sequence[str], answer: Sequence[str], *, ordered: bool) -> bool:
    """Whether each gold value has a separate equal value: at the same position, or at any if they are unordered."""
    if ordered:
        return all(is_equivalent(expected, actual) for expected, actual in zip(gold, answer, strict=True))
    unmatched = list(answer)
    for expected in gold:
        match = next((actual for actual in unmatched if is_equivalent(expected.strip(), actual.strip())), None)
        if match is None:
            return False
        unmatched.remove(match)
    return True


def _single_values_match(gold: str, answer: str) -> bool:
    in_gold, in_answer = BASE_SUBSCRIPT_PATTERN.fullmatch(gold), BASE_SUBSCRIPT_PATTERN.fullmatch(answer)
    if in_gold and in_answer and _number_base(in_gold) != _number_base(in_answer):
        return False
    if in_gold or in_answer:  # an omitted base is the one that the problem asks for
        return (in_gold[1] if in_gold else gold).upper() == (in_answer[1] if in_answer else answer).upper()
    if (are_equal := quick_compare(gold, answer)) is not None:
        return are_equal
    return _math_verify(gold, answer)


def _number_base(match: re.Match[str]) -> str:
    base = match[2] or match[3]
    return BASE_BY_NAME.get(base, base)


def _math_verify(gold: str, answer: str) -> bool:
    from math_verify import verify

    try:
        return bool(verify(_parse_latex(gold), _parse_latex(answer), timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError):
        raise  # the worker failed; the answer may be well-formed
    except Exception as error:  # math-verify raises whatever sympy raises
        raise UnparsableError(str(error)) from error


def _parse_latex(value: str) -> list[object]:
    """Parse a value as LaTeX only: math-verify's other parser evaluates the text as Python.

    Units are already removed, so a letter is a variable.
    """
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
    extraction = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    parsed: list[object] = parse(f"\\boxed{{{value}}}", [extraction], parsing_timeout=None, raise_on_error=True)
    if not parsed or isinstance(parsed[0], str):
        raise UnparsableError(value)
    return parsed


def is_parsable(gold: str) -> bool:
    """Whether a normalized gold answer can be compared with answers in a different notation. Runs in a worker."""
    try:
        for value in (value for member in gold.split(r"\cup") for value in split_values(member).items):
            if not LETTER_OR_WORDS_PATTERN.fullmatch(value) and not BASE_SUBSCRIPT_PATTERN.fullmatch(value):
                _parse_latex(value)
    except Exception:  # math-verify raises whatever sympy raises
        return False
    return True


def init_worker() -> None:
    """Limit the memory of a worker, and import math-verify before any time limit runs, since that takes a second."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    # With gmpy2, sympy hangs or aborts on towers of powers.
    os.environ["SYMPY_GROUND_TYPES"] = "python"
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its time limits are disabled
