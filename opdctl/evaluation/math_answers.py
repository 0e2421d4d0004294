"""Equality of mathematical answers: math-verify's verdict, and that of typed values where their rules decide.

`judge` returns both. math-verify can hang or crash, so `judge` and `is_parsable` must run in workers that can be
killed.
"""

import logging
import os
import re
import resource
from typing import Any

from opdctl.evaluation.math_values import END, FUNCTIONS, NAMES_PATTERN, MathValue, clean, parse_answer, split_equation

MAX_ANSWER_CHARS = 2000  # gold answers are much shorter; a longer answer counts as unparsable
WORKER_MEMORY_BYTES = 4 * 2**30  # address space
FREE_LETTERS = "abcdfghjklmnopqrstuvwxyz"  # i and e are constants
PRIME = r"(?:'+|\s*\^\s*\{?\s*\\prime\s*\}?)"
COMMAND_OR_NAME_PATTERN = re.compile(rf"\\[a-zA-Z]+|([a-zA-Z](?:\s*_\s*(?:\w|\{{[^{{}}]*\}}))?{PRIME}?)")
CHANGING_WORDS = "or|if|not|than|least|most|when|except|squared|cubed|factorial"
CHANGING_WORDS_PATTERN = re.compile(rf"\d.*\\text.*\d|\\text\s*\{{[^}}]*\b(?:{CHANGING_WORDS})\b")
"""Words that change a number, and several numbers."""
COMPATIBLE_KINDS = ({"list", "set"}, {"list", "()"}, {"list", "union"})
VERDICTS = (False, None, True)
"""Several verdicts are one: the first of these that is among them. None: the rules do not decide."""


class UnparsableError(Exception):
    """Neither math-verify nor the rules of typed values can parse an answer."""


def judge(gold: str, answer: str, has_typed_values: bool) -> tuple[bool, bool]:
    """Return whether two answers are equal, and whether they are by math-verify alone. Runs in a worker.

    has_typed_values: the rules of typed values decide where they can, else math-verify does alone.

    Raises:
        UnparsableError: neither can parse an answer.
    """
    plain, are_equal = _plain_verdict(gold, answer), compare_values(gold, answer) if has_typed_values else None
    if are_equal is None and plain is None:
        raise UnparsableError(answer)
    return bool(plain) if are_equal is None else are_equal, bool(plain)


def is_parsable(gold: str, has_typed_values: bool) -> bool:
    """Whether a gold answer can be compared with answers in a different notation. Runs in a worker."""
    unescaped = re.sub(r"\\[{}]", "", gold)
    if unescaped.count("{") != unescaped.count("}"):
        return False  # math-verify would parse a part of it
    value = parse_answer(clean(gold))
    return (has_typed_values and _match(value, value) is not None) or _plain_verdict(gold, gold) is not None


def _plain_verdict(gold: str, answer: str) -> bool | None:
    """Return the verdict of math-verify on the two texts, with its own settings, or None if it cannot parse one.

    It parses LaTeX only: its other parser evaluates the text as Python.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    extraction = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(f"\\boxed{{{text}}}", extraction, parsing_timeout=None) for text in (gold, answer)]
    are_equal = bool(verify(*parsed, timeout_seconds=None))
    is_readable = all(values and not isinstance(values[0], str) for values in parsed)
    return are_equal if are_equal or is_readable else None


def compare_values(gold: str, answer: str) -> bool | None:
    """Return whether two answers are equal by the rules of typed values, or None where these do not decide."""
    gold, answer = clean(gold), clean(answer)
    if gold and _without_spaces(gold) == _without_spaces(answer):
        return True
    values = parse_answer(gold), parse_answer(answer)
    are_equal = _match(*values)
    if len({isinstance(value.content, tuple) for value in values}) > 1 and not re.search(r",0\d", gold + answer):
        values = parse_answer(gold, is_grouped=False), parse_answer(answer, is_grouped=False)  # 100,200 may be a list
        return are_equal or _match(*values)
    return are_equal


def _without_spaces(text: str) -> str:
    """Remove `\\text` around words, and the spaces that do not separate letters or digits."""
    text = text if re.search(r"\d\s*\\text", text) else re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", text)


def _match(gold: MathValue, answer: MathValue) -> bool | None:
    kinds = {gold.kind, answer.kind}
    if "equation" in kinds:
        return _equations_match(gold, answer)
    if isinstance(gold.content, tuple) or isinstance(answer.content, tuple):
        return _groups_match(gold, answer)
    if kinds & {"label", "words"}:
        texts = [value.latex.casefold() if "words" in kinds else value.latex for value in (gold, answer)]
        return texts[0] == texts[1]
    if gold.name and answer.name and gold.name != answer.name:
        return False
    return gold.content == answer.content if kinds == {"number"} else _expressions_match(gold.latex, answer.latex)


def _equations_match(gold: MathValue, answer: MathValue) -> bool | None:
    """Compare two equations as a whole. A value equals an equation if it equals the last side and all constants."""
    texts = [split_equation(value.latex) if value.kind == "equation" else [] for value in (gold, answer)]
    name, other_name = (sides[0].strip() if sides and NAMES_PATTERN.fullmatch(sides[0]) else "" for sides in texts)
    (*_, expected), (*others, last) = (
        [*map(parse_answer, texts[0])] or [gold],
        [*map(parse_answer, texts[1])] or [answer],
    )
    if all(texts) and not (name and other_name and (name == other_name or _is_constant(expected))):
        return _expressions_match(gold.latex, answer.latex)
    if texts[0] and not name:
        return False
    return min((_match(expected, value) for value in (last, *filter(_is_constant, others))), key=VERDICTS.index)


def _is_constant(value: MathValue) -> bool:
    letters = re.search("[a-zA-Z]", re.sub(rf"\\(?:frac|sqrt|binom|cdot|times|pi|{FUNCTIONS}){END}", "", value.latex))
    return value.kind == "number" or (value.kind == "expression" and not letters)


def _groups_match(gold: MathValue, answer: MathValue) -> bool | None:
    """Compare values at the same position in tuples and intervals, at any position in lists, sets and unions."""
    expected, actual, kinds = gold.content, answer.content, {gold.kind, answer.kind}
    if not (isinstance(expected, tuple) and isinstance(actual, tuple)):
        members, other = (expected, answer) if isinstance(expected, tuple) else (actual, gold)
        assert isinstance(members, tuple)
        return None if "\\begin" in other.latex else _match(members[0], other) if len(members) == 1 else False
    # A list has no names.
    has_other_names = gold.name != answer.name and ((gold.name and answer.name) or "list" in kinds)
    if len(expected) != len(actual) or has_other_names or (len(kinds) > 1 and kinds not in COMPATIBLE_KINDS):
        return False
    if not kinds <= {"list", "set", "union"}:
        return min(map(_match, expected, actual), key=VERDICTS.index)
    unmatched = [*actual]
    for member in expected:
        verdicts = [_match(member, other) for other in unmatched]
        if True not in verdicts:
            return None if None in verdicts else False
        del unmatched[verdicts.index(True)]
    return True


def _expressions_match(gold: str, answer: str) -> bool | None:
    """Compare constants exactly, and other expressions by math-verify, which must see the same variables.

    Returns None for an expression that has words or that math-verify cannot parse.
    """
    from math_verify import verify

    if "\\text" in gold + answer:
        return None if len({bool(CHANGING_WORDS_PATTERN.search(text)) for text in (gold, answer)}) == 1 else False
    expected, actual = map(_parse_latex, _rename_variables(gold, answer))
    if expected is None or actual is None:
        return None
    if expected.free_symbols != actual.free_symbols:
        return False
    is_zero = None
    if not expected.free_symbols and all(getattr(value, "is_finite", False) for value in (expected, actual)):
        is_zero = (expected - actual).doit().equals(0)
    return bool(verify([expected], [actual], timeout_seconds=None)) if is_zero is None else is_zero


def _parse_latex(latex: str) -> Any:
    """Return the sympy expression of an answer, in which i is the imaginary unit and decimals are exact, or None."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
    extraction = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    decimals = re.compile(r"(?<![\d.])(\d*)\.(\d+)", re.ASCII)
    latex = decimals.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{1{'0' * len(m[2])}}}", latex)
    try:
        value = parse(f"\\boxed{{{latex}}}", [extraction], parsing_timeout=None, raise_on_error=True)[0]
        # math-verify gives one variable different assumptions in different places.
        symbols = {symbol: sympy.Symbol(symbol.name, real=True) for symbol in value.free_symbols}
        return value.xreplace({a: sympy.I if a.name == "i" else b for a, b in symbols.items()})
    except (MemoryError, RecursionError):
        raise  # the worker failed; the answer may be well-formed
    except Exception:  # math-verify raises whatever sympy raises
        return None


def _rename_variables(*texts: str) -> list[str]:
    """Replace indexed and upper-case variables by unused letters: math-verify drops some and ignores their case."""
    matches = [match for text in texts for match in COMMAND_OR_NAME_PATTERN.finditer(text) if match[1]]
    names = {re.sub(r"[\s{}]", "", match[1]) for match in matches}
    special = sorted(name for name in names if len(name) > 1 or name.isupper())
    letters = dict(zip(special, [letter for letter in FREE_LETTERS if letter not in names], strict=False))

    def rename(match: re.Match[str]) -> str:
        letter = letters.get(re.sub(r"[\s{}]", "", match[1] or ""))
        return f" {letter} " if letter else match[0]

    return [COMMAND_OR_NAME_PATTERN.sub(rename, text) for text in texts]


def init_worker() -> None:
    """Limit the memory of a worker, and import math-verify before any time limit runs, since that takes a second."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    # With gmpy2, sympy hangs or aborts on towers of powers.
    os.environ["SYMPY_GROUND_TYPES"] = "python"
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its time limits are disabled
