"""Range checks."""

import math

import pytest

from opdctl.losses.checks import check_range


@pytest.mark.parametrize(
    ("bounds", "valid", "invalid", "text"),
    [
        ({"ge": 0}, [0, 1e300], [-1e-300, math.inf, math.nan], ">= 0"),
        ({"gt": 0}, [1e-300], [0, -1, math.inf, math.nan], "> 0"),
        ({"ge": 0, "le": 1}, [0, 0.5, 1], [-0.1, 1.1, math.nan], ">= 0 and <= 1"),
        ({"gt": 0, "lt": 1}, [0.5], [0, 1, math.nan], "> 0 and < 1"),
        ({"gt": 0, "le": 1}, [0.5, 1], [0, 1.1], "> 0 and <= 1"),
    ],
)
def test_check_range(bounds, valid, invalid, text):
    for value in valid:
        check_range("alpha", value, **bounds)
    for value in invalid:
        with pytest.raises(ValueError, match=f"^alpha must be a finite number {text}, got {value}$"):
            check_range("alpha", value, **bounds)
