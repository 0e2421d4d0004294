"""Range checks for the parameters of token weights and objectives."""

import math
import operator


def check_range(
    name: str,
    value: float,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
) -> None:
    """Check that a parameter is finite and within its bounds, which have the names of pydantic's `Field`.

    Raises:
        ValueError: it is not.
    """
    bounds = [
        (symbol, within, bound)
        for symbol, within, bound in (
            (">", operator.gt, gt),
            (">=", operator.ge, ge),
            ("<", operator.lt, lt),
            ("<=", operator.le, le),
        )
        if bound is not None
    ]
    if not (math.isfinite(value) and all(within(value, bound) for _, within, bound in bounds)):
        required = " and ".join(f"{symbol} {bound:g}" for symbol, _, bound in bounds)
        raise ValueError(f"{name} must be a finite number {required}, got {value}")
