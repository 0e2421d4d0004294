"""The forms of the JSON files of a run directory: receipts, manifests, run.json, update.json.

They are untrusted data: corrupt, or written by someone else. A value is checked and returned unchanged. Keys that are
not listed here are accepted, and a NotRequired key is one that older versions lack.
"""

from functools import cache
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from opdctl.artifacts import parsing

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""The name of a file in the same directory."""


def _within(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("leads out of its directory")
    return name


Digests = dict[Annotated[str, AfterValidator(_within)], Digest]
"""SHA-256 of the files of a directory and below, by relative name."""


class PartRecord(TypedDict):
    """A finished part: its receipt, and its entry in the manifest. failed: the sample ids of the episodes that failed,
    of which there is no row."""

    name: FileName
    rows: Count
    tokens: Count
    bytes: Count
    sha256: Digest
    failed: NotRequired[list[str]]


class PolicyRecord(TypedDict):
    """policy_version.json: the policy version that samples a step's responses, pinned by the first worker."""

    policy_version: Count


class ImportRecord(TypedDict):
    """import.json: the SHA-256 of each file from which a step's responses were imported, by path."""

    files: dict[str, Digest]


class StageHeader(TypedDict):
    """in_progress.json: the stage that is being made. artifact: the stage's name."""

    artifact: str
    version: int
    fingerprint: Digest
    settings: dict[str, Any]
    inputs: dict[str, str]
    logprob_metadata: dict[str, Any]


class Manifest(StageHeader):
    """manifest.json: the finished stage."""

    parts: list[PartRecord]


class ScoresRecord(TypedDict):
    """The metadata of a score part. rollout: the digest of the rollout part that it scores."""

    rollout: str
    sample_ids: list[str]


class ModelRecord(TypedDict):
    """A model at the start of the run. file_stats: size and modification time of each file, which need no new hash
    while both are the same. parameters: their number, if the weights are in the directory."""

    path: str
    digest: Digest
    tokenizer: Digest
    file_stats: dict[str, list[int]]
    parameters: NotRequired[Count]


PromptOrder = Literal["numpy", "random_sampler"]
"""How the order of the prompts in an epoch is drawn (data/order.py)."""
DEFAULT_PROMPT_ORDER: PromptOrder = "numpy"
"""Of records without an order, which opdctl 0.2.0 wrote."""


class SourceRecord(TypedDict):
    """One source of a mixture with weights: its prompts, and those that it gives to every step. A step takes them from
    the start of the prompts on, source by source in the order of the record."""

    rows: Annotated[int, Field(gt=0, lt=2**63)]
    per_step: Annotated[int, Field(gt=0, lt=2**63)]


class PromptsRecord(TypedDict):
    """prompts.parquet, and held_out.jsonl if prompts are held out.

    source_files: the digests of the local files that the prompts were read from, by path; older runs have only
    source_sha256, of a single one. order: a run keeps the one that it was started with. chat_templates: the texts of
    those that the recipe names, by section.
    """

    rows: Count
    dropped: Count
    sha256: Digest
    source_sha256: NotRequired[Digest | None]
    source_files: NotRequired[dict[str, Digest]]
    order: NotRequired[PromptOrder]
    chat_templates: NotRequired[dict[str, str]]
    sources: NotRequired[dict[str, SourceRecord]]
    held_out: NotRequired[Digest]


class StartRecord(TypedDict):
    """The start of a fork: the step, and the digests of the student and the trainer state that it starts from."""

    run_dir: str
    step: Count
    student: Digests
    trainer: Digests


class RunRecord(TypedDict):
    """run.json: what the run was started with.

    vocab_size: the ids that all models share. environment: the digest of the file of rollout.environment. forked_from:
    the run and the step that a fork starts from. recipe: the text of recipe.toml at the start, from which it can be
    restored; 0.2.0 wrote none.
    """

    artifact: str
    version: int
    libraries: dict[str, str]
    models: dict[str, ModelRecord]
    vocab_size: NotRequired[Count]
    prompts: PromptsRecord
    environment: NotRequired[str]
    forked_from: NotRequired[StartRecord]
    recipe: NotRequired[str]


class ProbeRecord(TypedDict):
    """Token ids, and the trainer's log-probs of all but the first under the student of the update."""

    ids: list[Count]
    logprobs: list[float]


class TrackingRecord(TypedDict):
    """tracking.json: the id of the run in experiment trackers."""

    id: str


class StateRecord(TypedDict):
    """digests.json of a trainer state. student: the digest of the student of the same step."""

    artifact: str
    version: int
    student: Digest
    files: Digests


class UpdateRecord(TypedDict):
    """update.json: the inputs and the results of an update. trainer: only of versions whose trainer states have no
    StateRecord."""

    artifact: str
    version: int
    step: Count
    settings: dict[str, Any]
    inputs: dict[str, str]
    trainer: NotRequired[Digests]
    student: Digests
    probe: NotRequired[ProbeRecord]
    metrics: dict[str, float]


class SummaryRecord(TypedDict):
    """summary.json of an evaluation: the keys that other commands read."""

    artifact: str
    version: int
    bench: str
    model: str
    avg: float


class EstimateRecord(TypedDict):
    """A value with the bounds of its interval, None where there is none."""

    value: float | None
    low: float | None
    high: float | None


class PrefixEstimateRecord(TypedDict):
    """An estimate of the signal in the first 30% of a response. of, responses: see docs/analysis.md."""

    of: Literal["signal", "response"]
    responses: Literal["all", "complete"]
    fraction: EstimateRecord
    p_value: float | None


class ChangePointRecord(TypedDict):
    """The position at which the mean signal changes, as a fraction of the response, and the means in nats per token."""

    position: EstimateRecord
    before: float
    after: float
    p_value: float


BiasDirection = Literal["early", "late", "none found", "mixed", "unknown"]


class BiasRecord(TypedDict):
    """The test of position bias. reason: why the direction is unknown, or ""."""

    direction: BiasDirection
    reason: str
    prefix_fraction: EstimateRecord | None
    p_value: float | None
    change_point: ChangePointRecord | None
    estimates: list[PrefixEstimateRecord]


class TrainingRecord(TypedDict):
    """A training phase. changes: key, old and new value of each setting that differs from the phase before."""

    name: str
    first_step: Count
    weight: str
    objective: str
    extrapolation: float
    changes: list[list[Any]]


class PhaseRecord(TypedDict):
    """A compared phase, with the mean of each quantity and token weight over the tokens as further keys."""

    phase: str
    responses: Count
    truncated: Count
    tokens: Count
    weight: float | None
    prefix_fraction: EstimateRecord
    bias: BiasRecord
    omitted_tokens: float
    omitted_signal: float


class AnalysisRecord(TypedDict):
    """summary.json of analyze-position. docs/analysis.md has the meaning of the keys."""

    artifact: str
    version: int
    run: str
    steps: list[Count]
    skipped: list[Count]
    training: list[TrainingRecord]
    direction: BiasDirection
    bias: BiasRecord
    phases: list[PhaseRecord]
    weights: list[dict[str, Any]]
    continuations: list[dict[str, Any]]
    accuracy: dict[str, Any] | None


class JournalRecord(TypedDict):
    """A line of the journal of a sync: a file that the run directory and a store had in common.

    here, there: the identities of the file and of the object at that time. size: bytes.
    """

    name: str
    sha256: Digest
    size: Count
    here: str
    there: str


class HeartbeatRecord(TypedDict):
    """A file in heartbeats/: what a stage does at the moment."""

    stage: str
    step: Count
    state: str
    host: str
    pid: Count


_adapter = cache(TypeAdapter)


def check_form(value: Any, kind: Any) -> Any:
    """Return `value` if it has the form `kind`. Raises ValueError with the first key that has not, and why."""
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the object"
        raise ValueError(f"{where}: {first['msg']}") from None
    return value


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises ValueError if there is none."""
    value = parsing.parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
