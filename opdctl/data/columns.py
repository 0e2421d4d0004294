"""The columns of the user's data, by the name that a setting gives or by the usual names. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from opdctl import console
from opdctl.data.cells import MEDIA_HINT, read_cell
from opdctl.data.tables import TableRow
from opdctl.errors import OpdctlError, did_you_mean

Names = tuple[str, ...]
"""One name is that of a setting; a dot in it leads to a field. Of several, the first with a value that is not null is
used in each row."""
PROMPT_COLUMNS: Names = ("prompt", "messages", "conversations", "problem", "question", "instruction")
"""The usual names: those of TRL and verl, OpenAI, ShareGPT, data sets with answers, and Alpaca."""
MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
EMPTY_CELLS: tuple[Any, ...] = (None, "", [])


@dataclass(frozen=True)
class Columns:
    """Names that each column may have. If there is no id column, the row number is the id."""

    id: Names = ("id", "problem_idx", "unique_id")
    problem: Names = PROMPT_COLUMNS
    answer: Names = ("answer", "final_answer")


def find_cell(row: TableRow, names: Names, key: str, location: str) -> tuple[Any, str]:
    """Return a cell, and where it is, for errors.

    key: the setting that names the column. location: of the row.

    Raises:
        OpdctlError: the row has no such column, or null in all of several.
    """
    if len(names) == 1:
        return read_cell(row, names[0], key, location), f"{location}: `{names[0]}`"
    name = _find_name(row, names, key, location)
    return row[name], f"{location}: `{name}`"


def find_prompt(row: TableRow, names: Names, key: str, location: str) -> tuple[Any, str]:
    """Return the cell of a prompt as `find_cell` does, and log a usual name that was found once.

    Alpaca's `instruction` has the text of a second column `input`, if there is one, in a paragraph below.

    Raises:
        OpdctlError: as `find_cell` does; or the row has images, audio or video.
    """
    for name in MEDIA_COLUMNS:
        if row.get(name) not in EMPTY_CELLS:
            reason = f"`{name}` is not empty: images, audio and video are not supported yet"
            raise OpdctlError("invalid_data", f"{location}: {reason}", hint=MEDIA_HINT)
    if len(names) == 1:
        return find_cell(row, names, key, location)
    name = _find_name(row, names, key, location)
    cell, more = row[name], row.get("input") if name == "instruction" else None
    console.info_once(f"{key}: {name}{' and input' if more is not None else ''}")
    if isinstance(cell, str) and isinstance(more, str) and more.strip():
        cell = f"{cell}\n\n{more}"
    return cell, f"{location}: `{name}`"


def _find_name(row: TableRow, names: Names, key: str, location: str) -> str:
    present = [name for name in names if name in row]
    for name in present:
        if row[name] is not None:
            return name
    if present:
        raise OpdctlError("invalid_data", f"{location}: `{present[0]}` is null")
    raise OpdctlError(
        "invalid_data",
        f"{location}: no column {' or '.join(f'`{name}`' for name in names)}{did_you_mean(names[0], row)}",
        hint=f"set {key} to one of the columns {', '.join(f'`{name}`' for name in row) or '(none)'}",
    )
