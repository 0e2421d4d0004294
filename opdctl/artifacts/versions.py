"""Versions of the artifacts, one for each kind.

A new column or key has a default, so it changes no version. A version rises when old files would be read wrongly, and
the reader then translates them: every opdctl reads all versions from OLDEST_VERSION on. Imports nothing, so that the
command line starts fast.
"""

OLDEST_VERSION = 5
"""Versions before this one are not read."""
VERSIONS = {
    "run": 5,
    "rollout": 5,
    "score": 5,
    "update": 5,
    "trainer": 5,
    "eval": 5,
    "continuations": 5,
    "file_scores": 5,
    "analysis": 5,
}
"""The version that is written, by kind: run.json, the stages, update.json, the digests of a trainer state, the summary
of an analysis. A stage's summary has the stage's version."""
SCHEMA_VERSION = 5
"""The version of what `--json` prints."""


def versioned(kind: str) -> dict[str, str | int]:
    """Return the keys that name kind and version of a JSON artifact: versioned("run") is {"artifact": "run", "version":
    5}."""
    return {"artifact": kind, "version": VERSIONS[kind]}
