"""Values that model-generated code returned, decoded and compared with the expected ones.

The code ran in another process (code_sandbox.py), from which only text came. Decoded values have types of Python and
NumPy alone, so no method of the code's own classes takes part in a comparison.
"""

import collections
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

NUMPY_KINDS = "biufc"
FLOAT_TOLERANCE = 1e-6
"""Absolute tolerance of floats where a task has none. Source: `evalplus.eval.unsafe_execute`."""
RELATIVE_TOLERANCE = 1e-7
"""Source: as above."""


class MalformedValueError(Exception):
    """The text does not encode a value."""


class _Object:
    """A value of an unknown type. It equals nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


# Subclasses keep their type: EvalPlus applies a tolerance only if both values have the same type.
_SUBCLASSES: dict[type, type] = {
    base: type(f"{base.__name__.capitalize()}Subclass", (base,), {})
    for base in (int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
}
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
_MAPPINGS = {"dict": dict, "OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
_TEXTS = {"Fraction": Fraction, "Decimal": Decimal}


def decode(encoded: Any) -> Any:
    """Return the value that `code_sandbox.encode` wrote.

    Raises:
        MalformedValueError: it did not write this.
    """
    try:
        return _decode(encoded)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError, MemoryError) as error:
        raise MalformedValueError(str(error)) from None


def _decode(encoded: Any) -> Any:
    if not isinstance(encoded, list):
        if isinstance(encoded, dict):
            raise MalformedValueError("a JSON object")
        return encoded
    kind, *contents = encoded
    if kind == "object":
        return _Object()
    if kind == "numpy":
        return _decode_numpy(*contents)
    if kind == "range":
        return range(*contents)
    if kind == "complex":
        return complex(*contents)
    (content,) = contents
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind in _TEXTS:
        return _TEXTS[kind](content)
    if kind == "subclass":
        value = _decode(content)
        return _SUBCLASSES[type(value)](value)
    if kind == "dict_keys":
        return dict.fromkeys(map(_decode, content)).keys()
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](map(_decode, content))
    pairs = {_decode(key): _decode(value) for key, value in content}
    return pairs.items() if kind == "dict_items" else _MAPPINGS[kind](pairs)


def _decode_numpy(dtype_name: str, shape: list[int] | None, items: list[Any]) -> Any:
    import numpy as np

    if dtype_name in ("U", "O"):  # an array of texts takes the space of the longest for each
        array = np.empty(len(items), object)
        for number, item in enumerate(items):
            array[number] = _decode(item)  # at once, lists would become dimensions
    else:
        dtype = np.dtype(dtype_name)
        if dtype.kind not in NUMPY_KINDS:
            raise MalformedValueError(f"an array of {dtype}")
        array = np.array([_decode(item) for item in items], dtype)
    return array.reshape(shape) if shape is not None else array.reshape(())[()]


@dataclass
class OutputComparison:
    """Compares the values of one set of inputs, in their order, as `evalplus.eval.unsafe_execute` does."""

    dataset: str
    entry_point: str
    tolerance: float

    def accepts(self, found: Any, arguments: list[Any], expected: Any) -> bool:
        """Return whether the value `found` of the call with `arguments` is correct."""
        import numpy as np

        try:
            with np.errstate(all="ignore"):
                return self._accepts(found, arguments, expected)
        except Exception:  # as there, a comparison that fails is a difference: of other types, shapes, sizes
            return False

    def _accepts(self, found: Any, arguments: list[Any], expected: Any) -> bool:
        import numpy as np
        from evalplus.eval import is_floats
        from evalplus.eval._special_oracle import _poly

        if self.dataset == "humaneval" and self.entry_point == "find_zero":
            return bool(abs(_poly(*arguments, found)) <= self.tolerance)
        is_equal = self._is_equal(found, arguments, expected)
        if self.tolerance == 0 and is_floats(expected):
            self.tolerance = FLOAT_TOLERANCE  # for all later inputs, too
        if is_equal or self.tolerance == 0:
            return bool(is_equal)
        if type(found) is not type(expected) or (isinstance(expected, list | tuple) and len(found) != len(expected)):
            return False
        return bool(np.allclose(found, expected, rtol=RELATIVE_TOLERANCE, atol=self.tolerance))

    def _is_equal(self, found: Any, arguments: list[Any], expected: Any) -> Any:
        """Return whether the value is the expected one, or passes the task's special test."""
        from evalplus.eval import _special_oracle as oracles

        is_equal = found == expected
        if self.dataset != "mbpp":
            return is_equal
        if self.entry_point in oracles.MBPP_OUTPUT_SET_EQ_TASKS:
            return set(found) == set(expected)
        if self.entry_point in oracles.MBPP_OUTPUT_NOT_NONE_TASKS:  # expected: whether the value is something
            return is_equal if isinstance(found, bool) else expected == (found is not None)
        if is_equal:
            return True
        if self.entry_point == "surface_Area":
            return abs(found - oracles._surface_Area(*arguments)) <= self.tolerance
        if self.entry_point == "digit_distance_nums":
            return found == oracles._digit_distance_nums(*arguments)
        return self.entry_point == "are_equivalent" or (self.entry_point == "sum_div" and found == 0)
