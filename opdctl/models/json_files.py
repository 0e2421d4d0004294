"""The JSON files of a model directory. Imports no torch."""

from pathlib import Path
from typing import Any

from opdctl.artifacts import parsing
from opdctl.errors import OpdctlError


def check_model_files(directory: Path) -> None:
    """Check that a model directory has only files and directories, or links to them: libraries open what they find.

    Raises:
        OpdctlError: an entry is a device, a socket or a FIFO, which a reader would wait for.
    """
    for entry in directory.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise OpdctlError("invalid_model", f"{entry}: is not a regular file", hint="remove it")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model directory. A byte order mark at its start is ignored.

    Raises:
        OpdctlError: the file is unreadable or not UTF-8, is cut or empty, or holds no object.
    """
    hint = "download or copy this file again"
    try:
        value = parsing.parse_json(parsing.read_bytes(path, follow_links=True).decode("utf-8-sig"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or beyond a bound
        raise OpdctlError("invalid_model", f"{path}: not valid JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise OpdctlError("invalid_model", f"{path}: a JSON {type(value).__name__} instead of an object", hint=hint)
    return value
