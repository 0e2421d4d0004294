"""The JSON files of a model directory. Imports no torch."""

from pathlib import Path
from typing import Any

from opdctl.artifacts import parsing
from opdctl.errors import OpdctlError

DOWNLOAD_AGAIN = "download or copy this file again"


def check_model_files(directory: Path) -> None:
    """Check that a model directory has only files and directories, or links to them: libraries open what they find.

    Raises:
        OpdctlError: an entry is a device, a socket or a FIFO, which a reader would wait for, or a link to nothing.
    """
    for entry in directory.iterdir() if directory.is_dir() else ():
        if not entry.exists() and entry.is_symlink():
            raise OpdctlError("invalid_model", f"{entry}: is a link to a missing file", hint=DOWNLOAD_AGAIN)
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise OpdctlError("invalid_model", f"{entry}: is not a regular file", hint="remove it")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model directory. A byte order mark at its start is ignored.

    Raises:
        OpdctlError: the file is unreadable or not UTF-8, is cut or empty, or holds no object.
    """
    try:
        value = parsing.parse_json(read_model_file(path).decode("utf-8-sig"))
    except ValueError as error:  # not UTF-8, not JSON, or beyond a bound
        raise OpdctlError("invalid_model", f"{path}: not valid JSON: {error}", hint=DOWNLOAD_AGAIN) from None
    if not isinstance(value, dict):
        detail = f"{path}: a JSON {type(value).__name__} instead of an object"
        raise OpdctlError("invalid_model", detail, hint=DOWNLOAD_AGAIN)
    return value


def read_model_file(path: Path) -> bytes:
    """Return the content of a file of a model directory.

    Raises:
        OpdctlError: it is missing or unreadable, not a regular file, or too large for a file without weights.
    """
    try:
        return parsing.read_bytes(path, follow_links=True)
    except (OSError, ValueError) as error:
        raise OpdctlError("invalid_model", f"{path}: {error}", hint=DOWNLOAD_AGAIN) from None
