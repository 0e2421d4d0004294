"""The cells of a row with one value a token: ids, masks, log-probs, checked and read as arrays. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from opdctl.artifacts.records import Ids, Logprobs, LossMask
from opdctl.data.cells import MAX_SHOWN_CHARS
from opdctl.data.tables import TableRow
from opdctl.errors import OpdctlError


@dataclass(frozen=True)
class TokenCells:
    """A row whose cells have one value a token. A cell of null is like a column that the row lacks.

    location: of the row, for errors.
    """

    row: TableRow
    location: str

    def find(self, names: Sequence[str]) -> str | None:
        """Return the first of these columns that the row has."""
        return next((name for name in names if self.row.get(name) is not None), None)

    def has(self, *names: str) -> bool:
        """Whether the row has all of these columns."""
        return all(self.row.get(name) is not None for name in names)

    def has_ids(self, name: str) -> bool:
        """Whether a column is a list of integers or empty."""
        value = self.row.get(name)
        return isinstance(value, list | np.ndarray) and (not len(value) or _is_integer(value[0]))

    def ids(self, name: str) -> Ids:
        """Return token ids.

        Raises:
            OpdctlError: the cell is no list of integers, or one is negative or too large for 32 bits.
        """
        array = self._array(name)
        if array.dtype.kind not in "iu":
            raise self.error(name, f"must be a list of token ids, got {self._show(name)}")
        if len(array) and not 0 <= array.min() <= array.max() < 2**31:
            wrong = array[(array < 0) | (array >= 2**31)][0]
            raise self.error(name, f"{wrong} is no token id")
        return array.astype(np.int32)

    def mask(self, name: str, length: int, other: str) -> LossMask:
        """Return a mask of booleans, or of 0 and 1, with as many values as the column `other`.

        Raises:
            OpdctlError: the cell is another list.
        """
        array = self._array(name, length, other)
        if not ((array == 0) | (array == 1)).all():
            raise self.error(name, f"must be a list of true and false, or of 1 and 0, got {self._show(name)}")
        return array.astype(bool)

    def labels(self, name: str, length: int, other: str) -> npt.NDArray[np.int64]:
        """Return the labels of a loss, as many as the column `other` has values.

        Raises:
            OpdctlError: the cell is another list.
        """
        array = self._array(name, length, other)
        if array.dtype.kind not in "iu":
            raise self.error(name, f"must be a list of labels, got {self._show(name)}")
        return array.astype(np.int64)

    def logprobs(self, name: str, length: int, other: str) -> Logprobs:
        """Return log-probs in nats, as many as the column `other` has values; NaN where one is unknown.

        Raises:
            OpdctlError: the cell is another list.
        """
        array = self._array(name, length, other)
        if array.dtype.kind not in "iuf":
            raise self.error(name, f"must be a list of log-probs, got {self._show(name)}")
        return array.astype(np.float32)

    def error(self, name: str, reason: str, hint: str | None = None) -> OpdctlError:
        """Return the error of a cell."""
        return OpdctlError("invalid_data", f"{self.location}: `{name}` {reason}", hint=hint)

    def _array(self, name: str, length: int | None = None, other: str = "") -> npt.NDArray[Any]:
        """Return a list of numbers as an array, NaN where one is null; an empty one has integers."""
        value = self.row[name]
        try:
            if not isinstance(value, list | np.ndarray):
                raise ValueError("no list")
            array = np.asarray(value)
            if array.dtype == object and any(item is None for item in value):
                array = np.asarray(value, np.float64)
        except (ValueError, TypeError, OverflowError):
            raise self.error(name, f"must be a list with one number a token, got {self._show(name)}") from None
        if array.ndim != 1 or array.dtype.kind not in "biuf":
            raise self.error(name, f"must be a list with one number a token, got {self._show(name)}")
        if length is not None and len(array) != length:
            raise self.error(name, f"must have {length} values, by `{other}`, has {len(array)}")
        return array if len(array) else np.zeros(0, np.int64)

    def _show(self, name: str) -> str:
        value = self.row[name]
        shown = value[:8].tolist() if isinstance(value, np.ndarray) else value[:8] if isinstance(value, list) else value
        return f"{shown!r:.{MAX_SHOWN_CHARS}}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
