"""The JSON files of a model directory. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from opdctl.errors import OpdctlError


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model directory. A byte order mark at its start is ignored.

    Raises:
        OpdctlError: the file is unreadable or not UTF-8, is cut or empty, or holds no object.
    """
    hint = "download or copy this file again"
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a too long integer
        raise OpdctlError("invalid_model", f"{path}: not valid JSON: {error}", hint=hint) from None
    if not isinstance(value, dict):
        raise OpdctlError("invalid_model", f"{path}: a JSON {type(value).__name__} instead of an object", hint=hint)
    return value
