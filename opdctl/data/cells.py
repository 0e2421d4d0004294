"""The values of a user's row: found by the name of a column, and read as text. Imports no torch."""

import math
from decimal import Decimal
from typing import Any

from opdctl.data.tables import TableRow
from opdctl.errors import OpdctlError, did_you_mean

MAX_SHOWN_CHARS = 80  # of a wrong value, in an error message
MEDIA_HINT = "use data without images, audio and video, or remove these rows"


def read_cell(row: TableRow, column: str, key: str, location: str) -> Any:
    """Return the value of a column, or of a field of it: `reward_model.ground_truth`. A column of that very name comes
    first; a field of null is null.

    key: the setting that names the column. location: of the row, for errors.

    Raises:
        OpdctlError: there is no such column, or a value on the path has no fields.
    """
    if column in row:
        return row[column]
    value: Any = row
    prefix = ""
    for name in column.split("."):
        if value is None:
            return None
        fields = value if isinstance(value, dict) else {}
        if name not in fields:
            known = [f"{prefix}{field}" for field in fields]
            raise OpdctlError(
                "invalid_data",
                f"{location}: no column `{column}` ({key}){did_you_mean(f'{prefix}{name}', known)}",
                hint=f"use one of the columns {', '.join(f'`{field}`' for field in known) or '(none)'}",
            )
        value, prefix = fields[name], f"{prefix}{name}."
    return value


def check_unicode(text: str, location: str) -> str:
    """Return the text.

    Raises:
        OpdctlError: it has a lone surrogate, which is possible in JSON and not in UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OpdctlError("invalid_data", f"{location}: invalid Unicode at character {error.start}") from error
    return text


def parse_cell(cell: Any, location: str) -> str:
    """Return an id or a gold answer as text: a text as it is, 27.0 as 27, and a list joined by commas.

    Raises:
        OpdctlError: it is null, empty, not finite, or a value whose text would be that of a programming language.
    """
    if isinstance(cell, str):
        return check_unicode(cell, location)
    if isinstance(cell, list) and cell:
        return ", ".join(parse_cell(item, location) for item in cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, float | Decimal) and math.isfinite(cell):
        return str(int(cell)) if cell == int(cell) else str(cell)
    reason = "is null" if cell is None else f"must be text or a number, got {cell!r:.{MAX_SHOWN_CHARS}}"
    raise OpdctlError("invalid_data", f"{location} {reason}")
