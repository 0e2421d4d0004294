"""What the JSON files of a run directory hold, checked as they are read: receipts, manifests, run.json, update.json.

They are data, and may have been damaged, or written by somebody else. A value is checked and handed on as it is:
nothing is converted, and keys that are not named here are let through.
"""

import json
from functools import cache
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""The name of a file in the folder of what names it."""


def _within(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("leads out of its folder")
    return name


Digests = dict[Annotated[str, AfterValidator(_within)], Digest]
"""SHA-256 by name of the files of a folder, and of those below it."""


class PartRecord(TypedDict):
    """A finished part: its receipt, and an entry of the manifest."""

    name: FileName
    rows: Count
    tokens: Count
    bytes: Count
    sha256: Digest


class PolicyRecord(TypedDict):
    """policy_version.json: how many updates the student has seen that draws a step's responses, where that is settled."""

    policy_version: Count


class StageHeader(TypedDict):
    """in_progress.json: what is being made."""

    schema_version: int
    stage: str
    fingerprint: Digest
    settings: dict[str, Any]
    inputs: dict[str, str]
    logprob_metadata: dict[str, Any]


class Manifest(StageHeader):
    """manifest.json: what was made."""

    parts: list[PartRecord]


class SealedPart(TypedDict):
    """What of a part's entry in the manifest its content is checked by."""

    name: FileName
    sha256: Digest


class Sealed(TypedDict):
    """What of a manifest is read where it does not matter which stage it is of."""

    parts: list[SealedPart]


class ScoresRecord(TypedDict):
    """The metadata of a score part: whose tokens it scores. rollout: the digest of the rollout part."""

    rollout: str
    sample_ids: list[str]


class ModelRecord(TypedDict):
    """A model as the run found it. stamp: size and time of each file, which need not be hashed while both hold."""

    path: str
    digest: Digest
    tokenizer: Digest
    file_stats: dict[str, list[int]]


class PromptsRecord(TypedDict):
    """prompts.parquet. source_sha256: the digest of the file that they came from, if it was one."""

    rows: Count
    dropped: Count
    sha256: Digest
    source_sha256: Digest | None


class RunRecord(TypedDict):
    """run.json: what the run was begun with."""

    schema_version: int
    libraries: dict[str, str]
    models: dict[str, ModelRecord]
    prompts: PromptsRecord


class UpdateRecord(TypedDict):
    """update.json: what an update was made from, and what came of it."""

    schema_version: int
    step: Count
    settings: dict[str, Any]
    inputs: dict[str, str]
    trainer: Digests
    student: Digests
    metrics: dict[str, float]


_adapter = cache(TypeAdapter)


class SummaryRecord(TypedDict):
    """summary.json of an evaluation, as far as others than the evaluation read it."""

    schema_version: int
    bench: str
    model: str
    avg: float


def check(value: Any, kind: Any) -> Any:
    """Return `value`, which is of the form `kind`. Raises ValueError with the first key that is not, and why."""
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{where}: {first['msg']}") from None
    return value


def parse(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises ValueError where there is none."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested without end") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value
