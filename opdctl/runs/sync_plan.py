"""What a sync of a run transfers: which files belong to a run, in which order, and which side's version holds.

Nothing here reads or writes a file.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opdctl.artifacts.directories import CARD_FILE, DIGESTS_FILE
from opdctl.artifacts.manifests import Manifest, PartRecord, RunRecord, StateRecord, UpdateRecord
from opdctl.artifacts.object_store import StoredFile
from opdctl.artifacts.stage_dir import PART_NAME, STAGE_MARKERS
from opdctl.runs.layout import HELD_OUT_FILE, IMPORT_FILE, PROMPTS_FILE, parse_step, step_name

Direction = Literal["send", "receive", "both"]
Decision = Literal["same", "send", "receive", "leave", "conflict"]
IN_PROGRESS_FILE, MANIFEST_FILE = STAGE_MARKERS
MAX_NAME_BYTES = 150
"""Of a file or directory. Temporary names are longer, and file systems allow 255."""
_NAME = r"\w[\w.+@=,-]*"
_STEP = r"step-\d{5,9}"
_STAGE = rf"({PART_NAME.pattern}|manifest\.json|in_progress\.json|policy_version\.json|{re.escape(IMPORT_FILE)})"
_LAYOUT = re.compile(
    "|".join(
        (
            r"(recipe\.toml|run\.json|prompts\.parquet|held_out\.jsonl|metrics\.jsonl|tracking\.json)",
            rf"{_STEP}/update\.json",
            rf"{_STEP}/(rollout|reference|teacher(-{_NAME})?)/{_STAGE}",
            rf"(student|trainer)/{_STEP}/({_NAME}/)*{_NAME}",
            rf"eval/{_NAME}/benchmark\.json",
            rf"eval/{_NAME}/{_NAME}/((prompts/)?{_STAGE}|summary\.json)",
            rf"continuations/{_STEP}/({_NAME}/{_STAGE}|summary\.json)",
            rf"analysis/({_NAME}/)*{_NAME}",
        )
    )
)
_RANKS = {"run.json": 1, MANIFEST_FILE: 1, DIGESTS_FILE: 1, "summary.json": 2, "update.json": 3}
"""Of files that refer to others of their step, which come first."""
_REPLACEABLE = re.compile(
    rf"recipe\.toml|run\.json|metrics\.jsonl|tracking\.json|.*/({re.escape(CARD_FILE)}|summary\.json|benchmark\.json)"
    rf"|.*/{re.escape(IN_PROGRESS_FILE)}|.*\.receipt\.json|analysis/.*"
)
"""Files that change in a run, or that are derived from others."""
_FIRST, _LAST = -1, 2**31


def belongs_to_run(name: str) -> bool:
    """Whether a relative path is that of a file of a run that is synced. No other name is read or written."""
    return _LAYOUT.fullmatch(name) is not None and all(len(part.encode()) <= MAX_NAME_BYTES for part in name.split("/"))


def transfer_order(name: str) -> tuple[int, int, str]:
    """Return the key that sorts files so that each follows those that it refers to: by step, within it by rank."""
    directory, _, base = name.rpartition("/")
    steps = [step for part in directory.split("/") if (step := parse_step(part)) is not None]
    if not directory:
        is_start = base in ("recipe.toml", "run.json", PROMPTS_FILE, HELD_OUT_FILE)
        place = _FIRST if is_start else _LAST
    elif not steps:
        place = _LAST
    else:  # the update of step k makes the student of step k + 1
        place = steps[0] - directory.startswith(("student/", "trainer/", "eval/"))
    return place, _RANKS.get(base, 0), name


def refers_to_others(name: str) -> bool:
    """Whether a file is transferred only after all files that come before it."""
    return transfer_order(name)[1] > 0


def is_replaceable(name: str) -> bool:
    """Whether a file may have a new version. All others are finished artifacts."""
    return _REPLACEABLE.fullmatch(name) is not None


# ── Records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class RecordedFile:
    """What a record contains about a file. size: bytes, None if the record has the digest alone."""

    sha256: str
    size: int | None = None


def record_form(name: str) -> Any:
    """Return the form of a JSON file that contains digests of other files, None of any other file."""
    directory, _, base = name.rpartition("/")
    if name == "run.json":
        return RunRecord
    if base.endswith(".receipt.json"):
        return PartRecord
    if base == DIGESTS_FILE and directory.startswith("trainer/"):
        return StateRecord
    if directory.startswith(("student/", "trainer/", "analysis/")):
        return None
    return {MANIFEST_FILE: Manifest, "update.json": UpdateRecord}.get(base)


def recorded_files(name: str, record: Mapping[str, Any]) -> dict[str, RecordedFile]:
    """Return what a record contains about other files, by their names."""
    directory, _, base = name.rpartition("/")
    if name == "run.json":
        prompts = record["prompts"]
        found = {PROMPTS_FILE: RecordedFile(prompts["sha256"])}
        if held_out := prompts.get("held_out"):
            found[HELD_OUT_FILE] = RecordedFile(held_out)
        if start := record.get("forked_from"):
            step = step_name(start["step"])
            found |= _below(f"student/{step}", start["student"]) | _below(f"trainer/{step}", start["trainer"])
        return found
    if base == DIGESTS_FILE:
        return _below(directory, record["files"])
    if base == "update.json":
        step = step_name(record["step"] + 1)
        return _below(f"student/{step}", record["student"]) | _below(f"trainer/{step}", record.get("trainer", {}))
    parts = record["parts"] if base == MANIFEST_FILE else [record]
    return {f"{directory}/{part['name']}": RecordedFile(part["sha256"], part["bytes"]) for part in parts}


def _below(directory: str, digests: Mapping[str, str]) -> dict[str, RecordedFile]:
    return {f"{directory}/{name}": RecordedFile(sha256) for name, sha256 in digests.items()}


def identify_run(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two run.json of the same run share, on whichever machines they were written."""
    models = {name: model["digest"] for name, model in record["models"].items()}
    start = record.get("forked_from") or {}
    return models, record["prompts"]["sha256"], start.get("step"), start.get("student")


# ── One side ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def complete_files(
    stored: Mapping[str, StoredFile], recorded: Mapping[str, RecordedFile], finished: Collection[str]
) -> dict[str, StoredFile]:
    """Return the files that are ready to be transferred: those of artifacts need a record.

    finished: the directories of stages that are finished on either side. The receipts there are of no use.
    """
    updates = [
        step for name in stored if name.endswith("/update.json") if (step := parse_step(name.split("/")[0])) is not None
    ]
    newest = f"student/{step_name(max(updates) + 1)}/" if updates else None
    is_listed = newest is None or all(name in stored for name in recorded if name.startswith(newest))
    # The files were listed while they were written: the student may be newer than the list of its directory.
    early = "" if is_listed else f"{step_name(max(updates))}/update.json"
    return {name: file for name, file in stored.items() if name != early and _is_ready(name, recorded, finished)}


def _is_ready(name: str, recorded: Collection[str], finished: Collection[str]) -> bool:
    directory, _, base = name.rpartition("/")
    if base == IN_PROGRESS_FILE or base.endswith(".receipt.json"):
        return directory not in finished
    if directory.startswith("student/") and base == CARD_FILE:
        return f"{directory}/config.json" in recorded
    is_artifact = PART_NAME.fullmatch(base) or directory.startswith(("student/", "trainer/"))
    return not is_artifact or base == DIGESTS_FILE or name in recorded


def stage_directories(names: Collection[str]) -> set[str]:
    """Return the directories of the finished stages among the files of a run."""
    return {name.rpartition("/")[0] for name in names if name.endswith(f"/{MANIFEST_FILE}")}


def needed_to_follow(names: Collection[str]) -> set[str]:
    """Return the files that a stage elsewhere waits for: not trainer states, analyses and unfinished stages, and of the
    students the newest."""
    finished = stage_directories(names)
    updates = [parse_step(name.split("/")[0]) for name in names if name.endswith("/update.json")]
    newest = max((step + 1 for step in updates if step is not None), default=0)

    def is_needed(name: str) -> bool:
        top, *rest = name.split("/")
        if top == "student":
            return (parse_step(rest[0]) or 0) >= newest
        is_of_stage = PART_NAME.fullmatch(name.rpartition("/")[2]) or name.endswith(f"/{IN_PROGRESS_FILE}")
        return top not in ("trainer", "analysis") and (not is_of_stage or name.rpartition("/")[0] in finished)

    return {name for name in names if is_needed(name)}


# ── Both sides ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SyncPlan:
    """What a sync transfers, by name. here, there: the files of the run directory and of the store.

    kept: replaceable files that both sides have changed, and that stay as they are. confirmed: the SHA-256 of files
    that are equal and not in the journal yet. recorded_here, recorded_there: what the records of the sides contain.
    """

    here: Mapping[str, StoredFile]
    there: Mapping[str, StoredFile]
    recorded_here: Mapping[str, RecordedFile]
    recorded_there: Mapping[str, RecordedFile]
    sent: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    confirmed: dict[str, str] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int:
        return sum(self.here[name].size for name in self.sent)

    @property
    def received_bytes(self) -> int:
        return sum(self.there[name].size for name in self.received)

    @property
    def unchanged_bytes(self) -> int:
        return sum(self.here[name].size for name in self.unchanged)


def decide(here: str | None, there: str | None, last: str | None, direction: Direction) -> Decision:
    """Return what to do with a file, by its digest in the run directory and in the store, None where it is missing.

    last: the digest when both sides were equal the last time, None if they never were. What was removed from the run
    directory since, as by `opdctl run prune`, is fetched again only on request.
    """
    if here == there:
        return "same"
    if there is None:
        return "leave" if direction == "receive" else "send"
    if here is None:
        was_removed = direction == "both" and there == last
        return "leave" if direction == "send" or was_removed else "receive"
    if there == last:
        return "leave" if direction == "receive" else "send"
    if here == last:
        return "leave" if direction == "send" else "receive"
    return "conflict"
