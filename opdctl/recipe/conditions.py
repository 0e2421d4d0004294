"""Conditions on the columns of a row: `prompts.where`."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

Scalar = str | bool | int | float
Condition = Scalar | list[Scalar]
"""A value, one of several values, or a text with a comparison: `">= 6"`."""
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
ORDERINGS = (">=", "<=", ">", "<")
COMPARISON_PATTERN = re.compile(rf"({'|'.join(COMPARISONS)})\s*(.*)", re.DOTALL)


def parse_condition(condition: Condition) -> Callable[[Any], bool]:
    """Return a function of a value of a row: whether it satisfies the condition.

    Numbers are compared as numbers, also those that a CSV file has as text. Null satisfies no condition.

    Raises:
        ValueError: an ordering is followed by no number. The function raises it for a value that it cannot compare.
    """
    if isinstance(condition, list):
        tests = [_parse_comparison("==", value) for value in condition]
        return lambda value: any(test(value) for test in tests)
    match = COMPARISON_PATTERN.fullmatch(condition) if isinstance(condition, str) else None
    return _parse_comparison(match[1], match[2].strip()) if match else _parse_comparison("==", condition)


def _parse_comparison(name: str, wanted: Scalar) -> Callable[[Any], bool]:
    number = _as_number(wanted)
    if name in ORDERINGS and number is None:
        raise ValueError(f"`{name}` must be followed by a number, got {wanted!r}")
    compare = COMPARISONS[name]

    def is_satisfied(value: Any) -> bool:
        if value is None:
            return False
        if not isinstance(value, str | bool | int | float):
            raise ValueError(f"must be text, a number or a boolean, got {value!r:.80}")
        if isinstance(wanted, bool) or isinstance(value, bool):
            return compare(value is wanted, True)
        actual = _as_number(value)
        if number is not None and actual is not None:
            return compare(actual, number)
        if name in ORDERINGS:
            raise ValueError(f"must be a number, got {value!r:.80}")
        return compare(str(value), str(wanted))

    return is_satisfied


def _as_number(value: Scalar) -> float | int | None:
    if isinstance(value, bool):
        return None
    for kind in (int, float):
        try:
            number = value if isinstance(value, int | float) else kind(value)
            return number if math.isfinite(number) else None
        except ValueError:
            continue
    return None
