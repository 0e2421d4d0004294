"""Equality of mathematical answers: math-verify's verdict, and that of typed values where their rules decide.

`judge` returns both. math-verify can hang or crash, so `judge` and `is_parsable` must run in workers that can be
killed.
"""

import logging
import os
import re
import resource
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from opdctl.evaluation.math_values import FUNCTIONS, Group, MathValue, Quantity, Relation, Words, clean, parse_answer

MAX_ANSWER_CHARS = 2000  # gold answers are much shorter; a longer answer counts as unparsable
WORKER_MEMORY_BYTES = 4 * 2**30  # address space
COMPARED_DIGITS = 40  # of irrational constants
FREE_LETTERS = "abcdfghjklmnopqrstuvwxyz"  # i and e are constants
PRIME = r"(?:'+|\s*\^\s*\{?\s*\\prime\s*\}?)"
COMMAND_OR_NAME_PATTERN = re.compile(rf"\\[a-zA-Z]+|([a-zA-Z](?:\s*_\s*(?:\w|\{{[^{{}}]*\}}))?{PRIME}?)")
CONSTANTS_PATTERN = re.compile(
    rf"\\(?:frac|sqrt|binom|cdot|times|pi|infty|{FUNCTIONS})(?![a-z])|(?<![a-zA-Z])[ie](?![a-zA-Z])"
)
CHANGING_WORDS_PATTERN = re.compile(r"\d.*\\text.*\d|\\text\{[^}]*\b(?:or|if|not|than|least|most|when|except)\b")
"""Words that change a number: several numbers, and conditions."""
COMPATIBLE_KINDS = ({"", "{}"}, {"", "()"}, {"", "union"})  # of groups


class UnparsableError(Exception):
    """Neither math-verify nor the rules of typed values can read an answer."""


def judge(gold: str, answer: str, has_typed_values: bool) -> tuple[bool, bool]:
    """Return whether two answers are equal, and whether they are by math-verify alone. Runs in a worker.

    has_typed_values: the rules of typed values decide where they can, else math-verify does alone.

    Raises:
        UnparsableError: neither can read an answer.
    """
    plain, are_equal = _plain_verdict(gold, answer), compare_values(gold, answer) if has_typed_values else None
    if are_equal is None and plain is None:
        raise UnparsableError(answer)
    return bool(plain) if are_equal is None else are_equal, bool(plain)


# ── math-verify ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _plain_verdict(gold: str, answer: str) -> bool | None:
    """Return the verdict of math-verify on the two texts, with its own settings, or None if it cannot parse one.

    It reads LaTeX only: its other parser evaluates the text as Python.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    extraction = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [parse(f"\\boxed{{{text}}}", extraction, parsing_timeout=None) for text in (gold, answer)]
    are_equal = bool(verify(*parsed, timeout_seconds=None))
    is_readable = all(values and not isinstance(values[0], str) for values in parsed)
    return are_equal if are_equal or is_readable else None


def _parse_latex(latex: str) -> Any:
    """Return the sympy expression of an answer without units, in which i is the imaginary unit and decimals are exact.

    Raises:
        UnparsableError: math-verify cannot parse it.
    """
    import sympy
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normalization = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
    extraction = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    try:
        parsed = parse(f"\\boxed{{{latex}}}", [extraction], parsing_timeout=None, raise_on_error=True)
        if not parsed or isinstance(parsed[0], str):
            raise UnparsableError(latex)
        value = parsed[0]
        if not {match[1] for match in COMMAND_OR_NAME_PATTERN.finditer(latex) if match[1]} <= {*str(value), "i", "e"}:
            raise UnparsableError(latex)  # math-verify dropped a variable
        # math-verify gives one variable different assumptions in different places.
        symbols = {symbol: sympy.Symbol(symbol.name, real=True) for symbol in value.free_symbols}
        return value.xreplace({a: sympy.I if a.name == "i" else b for a, b in symbols.items()})
    except (MemoryError, RecursionError):
        raise  # the worker failed; the answer may be well-formed
    except Exception as error:  # math-verify raises whatever sympy raises
        raise UnparsableError(latex) from error


def _expressions_match(gold: str, answer: str) -> bool | None:
    """Compare two expressions: constants to 40 digits, others by math-verify, which must see the same variables.

    Returns None for one that has words or that math-verify cannot parse.
    """
    from math_verify import verify

    if "\\text" in gold + answer:
        return None if len({bool(CHANGING_WORDS_PATTERN.search(text)) for text in (gold, answer)}) == 1 else False
    try:
        expected, actual = (_parse_latex(_with_exact_decimals(text)) for text in _rename_variables(gold, answer))
    except UnparsableError:
        return None
    if (are_equal := _constants_match(expected, actual)) is not None:
        return are_equal
    if {symbol.name for symbol in expected.free_symbols} != {symbol.name for symbol in actual.free_symbols}:
        return False
    return bool(verify([expected], [actual], timeout_seconds=None))


def _rename_variables(*texts: str) -> list[str]:
    """Replace indexed and upper-case variables by unused letters: math-verify drops some and ignores their case."""
    names = sorted({match[1] for text in texts for match in COMMAND_OR_NAME_PATTERN.finditer(text) if match[1]})
    keys = {name: re.sub(r"[\s{}]", "", name) for name in names}
    special = sorted({key for key in keys.values() if len(key) > 1 or key.isupper()})
    unused = [letter for letter in FREE_LETTERS if letter not in keys.values()]
    letters = dict(zip(special, unused, strict=False)) if len(special) <= len(unused) else {}

    def rename(match: re.Match[str]) -> str:
        return f" {letters[keys[match[1]]]} " if match[1] and keys[match[1]] in letters else match[0]

    return [COMMAND_OR_NAME_PATTERN.sub(rename, text) for text in texts]


def _with_exact_decimals(text: str) -> str:
    """Write each decimal as a fraction."""
    return re.sub(
        r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{1{'0' * len(m[2])}}}", text, flags=re.ASCII
    )


def _constants_match(gold: Any, answer: Any) -> bool | None:
    """Compare rational numbers exactly, other constants to 40 digits. None if one is not a finite constant."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (gold, answer)):
        return None
    gold, answer = gold.doit(), answer.doit()
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    if gold.is_infinite or answer.is_infinite:
        return None
    difference, size = ((abs(x)).evalf(COMPARED_DIGITS) for x in (gold - answer, abs(gold) + abs(answer)))
    if not (difference.is_Float or difference.is_zero) or not size.is_Float:
        return None
    return bool(difference <= size * sympy.Float(10) ** (10 - COMPARED_DIGITS))


def is_parsable(gold: str, has_typed_values: bool) -> bool:
    """Whether a gold answer can be compared with answers in a different notation. Runs in a worker."""
    unescaped = re.sub(r"\\[{}]", "", gold)
    if unescaped.count("{") != unescaped.count("}"):
        return False  # math-verify would read a part of it
    value = parse_answer(clean(gold))
    return (has_typed_values and _values_match(value, value) is not None) or _plain_verdict(gold, gold) is not None


# ── Typed values ─────────────────────────────────────────────────────────────────────────────────────────────────────


def compare_values(gold: str, answer: str) -> bool | None:
    """Return whether two answers are equal by the rules of typed values, or None where these do not decide."""
    gold, answer = clean(gold), clean(answer)
    if gold and _without_spaces(gold) == _without_spaces(answer):
        return True
    values = parse_answer(gold), parse_answer(answer)
    are_equal = _values_match(*values)
    if len({isinstance(value, Group) for value in values}) > 1 and not re.search(r",0\d", gold + answer):
        values = parse_answer(gold, grouped=False), parse_answer(answer, grouped=False)  # 100,200 may be a list
        return are_equal or _values_match(*values)
    return are_equal


def _without_spaces(text: str) -> str:
    """Remove `\\text` around words, and the spaces that do not separate letters or digits."""
    text = text if re.search(r"\d\s*\\text", text) else re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", text)


def _values_match(gold: MathValue, answer: MathValue) -> bool | None:
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations_match(gold, answer)
    if isinstance(gold, Group) or isinstance(answer, Group):
        return _groups_match(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _words_match(gold, answer)
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if isinstance(gold.value, Fraction) and isinstance(answer.value, Fraction):
        return gold.value == answer.value
    return _expressions_match(gold.latex, answer.latex)


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _relations_match(gold: MathValue, answer: MathValue) -> bool | None:
    """Compare two equations as a whole. A relation equals a value if it ends in it and its other constants equal it."""
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if gold.name and answer.name and (gold.name == answer.name or _is_constant(gold.sides[-1])):
            return _values_match(gold.sides[-1], answer)
        return _expressions_match(gold.latex, answer.latex)
    if isinstance(gold, Relation):
        return _values_match(gold.sides[-1], answer) if gold.name else False
    *others, last = answer.sides if isinstance(answer, Relation) else (answer,)
    return _all([_values_match(gold, side) for side in (last, *filter(_is_constant, others))])


def _is_constant(value: MathValue) -> bool:
    if isinstance(value, Group):
        return all(map(_is_constant, value.items))
    return isinstance(value, Quantity) and not re.search("[a-zA-Z]", CONSTANTS_PATTERN.sub("", value.latex))


def _groups_match(gold: MathValue, answer: MathValue) -> bool | None:
    """Compare values at the same position in tuples and intervals, at any position in lists, sets and unions."""
    if not (isinstance(gold, Group) and isinstance(answer, Group)):
        items, other = (gold.items, answer) if isinstance(gold, Group) else (getattr(answer, "items", ()), gold)
        if isinstance(other, Quantity) and "\\begin" in other.latex:
            return None
        return _values_match(items[0], other) if len(items) == 1 else False
    kinds = {gold.kind, answer.kind}
    are_named = bool(gold.name) + bool(answer.name)
    if (are_named == 2 and gold.name != answer.name) or (are_named and "" in kinds):  # a list has no variables
        return False
    if len(gold.items) != len(answer.items) or (len(kinds) > 1 and kinds not in COMPATIBLE_KINDS):
        return False
    if not kinds <= {"", "{}", "union"}:
        return _all([_values_match(*pair) for pair in zip(gold.items, answer.items, strict=True)])
    unmatched, is_unknown = list(answer.items), False
    for expected in gold.items:
        verdicts = [_values_match(expected, actual) for actual in unmatched]
        if True in verdicts:
            del unmatched[verdicts.index(True)]
        elif None not in verdicts:
            return False
        else:
            is_unknown = True
    return None if is_unknown else True


def _words_match(gold: MathValue, answer: MathValue) -> bool | None:
    """Words ignore their case, a choice letter does not. Letters that may be a product of variables are one here."""
    texts = [value.text if isinstance(value, Words) else "" for value in (gold, answer)]
    is_certain = any(isinstance(value, Words) and value.is_certain for value in (gold, answer))
    if min(map(len, texts)) > 2:  # the case of all but the first letter counts in a product
        texts = [text.casefold() if is_certain else text[0].casefold() + text[1:] for text in texts]
    if is_certain or texts[0] == texts[1]:
        return texts[0] == texts[1]
    return _values_match(*(Quantity(value.text) if isinstance(value, Words) else value for value in (gold, answer)))


# ── Workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def init_worker() -> None:
    """Limit the memory of a worker, and import math-verify before any time limit runs, since that takes a second."""
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    # With gmpy2, sympy hangs or aborts on towers of powers.
    os.environ["SYMPY_GROUND_TYPES"] = "python"
    import math_verify

    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns that its time limits are disabled
