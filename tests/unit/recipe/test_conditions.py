"""`prompts.where`: what each form of a condition accepts."""

from typing import Any

import pytest

from opdctl.recipe.conditions import Condition, parse_condition


@pytest.mark.parametrize(
    ("condition", "accepted", "rejected"),
    [
        (">= 6", [6, 6.0, 7, "6", "6.5"], [5.9, "5", None, -7]),
        (">6", [6.1, "7"], [6, None]),
        ("<= -1.5", [-1.5, -2], [-1, None]),
        ("< 1e3", [999], [1000]),
        ("== 6", [6, 6.0, "6", "6.0"], [7, "six", None]),
        ("!= 6", [7, "six"], [6, "6", None]),
        (6, [6, 6.0, "6"], [7, True, None]),
        ("math", ["math"], ["Math", "math ", 6, None]),
        ("== >=", [">="], ["=="]),
        ("!= math", ["code", 6], ["math", None]),
        (["math", "code"], ["math", "code"], ["a", None]),
        ([6, 7.5], [6, 7.5, "7.5"], [7, None]),
        (True, [True], [False, 1, "true", None]),
        (False, [False], [True, 0, None]),
        ("", [""], [" ", None]),
        (9007199254740993, [9007199254740993, "9007199254740993"], [9007199254740992]),
    ],
)
def test_condition(condition: Condition, accepted: list[Any], rejected: list[Any]) -> None:
    is_satisfied = parse_condition(condition)
    assert [value for value in accepted if not is_satisfied(value)] == []
    assert [value for value in rejected if is_satisfied(value)] == []


@pytest.mark.parametrize("condition", [">= hard", ">", "< 1 or > 5", ">= nan"])
def test_ordering_needs_a_number(condition: str) -> None:
    with pytest.raises(ValueError, match="must be followed by a number"):
        parse_condition(condition)


@pytest.mark.parametrize(
    ("condition", "value"), [(">= 6", "hard"), (">= 6", float("nan")), ("a", ["a"]), (["a"], {"a": 1}), (6, b"6")]
)
def test_value_that_cannot_be_compared_is_an_error(condition: Condition, value: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_condition(condition)(value)
