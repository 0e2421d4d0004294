"""The exchange format: responses with their scores, as Parquet files for other programs. docs/artifacts.md defines it.

`opdctl run export` and `opdctl score-teacher --input` write it, one row of `ExportedResponse` a response.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FORMAT_VERSION = 1
"""It changes if a column changes its name or meaning. New columns may be added without."""


def describe_file(scorers: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the metadata of a file: format, units, and how each scorer, by name, computed its log-probs."""
    return {
        "opdctl.format": f"responses {FORMAT_VERSION}",
        "opdctl.version": importlib.metadata.version("opdctl"),
        "opdctl.logprobs": "natural logarithms, temperature 1",
        "opdctl.scorers": json.dumps(scorers, sort_keys=True),
    }


def read_scorers(path: Path) -> dict[str, dict[str, Any]]:
    """Return how each scorer, by name, computed its log-probs; nothing of a file that does not have the format."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        scorers = json.loads(metadata.get(b"opdctl.scorers", b"{}"))
    except (OSError, ValueError, pa.ArrowException):  # such as a text file
        return {}
    return scorers if isinstance(scorers, dict) else {}
