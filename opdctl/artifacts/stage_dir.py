"""Stage directories: the parts of one stage at one step, their receipts, and the manifest that finishes the stage.

A part is written under a temporary name, flushed, and renamed. Just before the rename a receipt with its rows, tokens,
bytes and SHA-256 is written beside it. When every part exists, the receipts are gathered into manifest.json, which
marks the stage as finished. So a kill at any moment loses at most the parts in work: one with a matching receipt is
reused, any other is regenerated, and so is a part that was removed from a finished stage.

A stage belongs to a fingerprint: the settings that affect it and the digests of its inputs. It resumes with the same
fingerprint and refuses any other. Workers share a stage by leases on its parts.
"""

import contextlib
import itertools
import os
import re
import shlex
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from opdctl.artifacts import leases
from opdctl.artifacts.claims import PartClaims
from opdctl.artifacts.files import (
    HASH_THREADS,
    atomic_write,
    check_no_symlinks,
    corrupt_artifact,
    digest_of,
    fsync_path,
    make_directory,
    read_json,
    remove_temporary_files,
    sha256_file,
    sha256_files,
    translate_write_errors,
    write_json,
)
from opdctl.artifacts.manifests import Manifest, PartRecord, StageHeader
from opdctl.artifacts.tables import Row, read_rows
from opdctl.artifacts.versions import versioned
from opdctl.errors import OpdctlError

STAGE_MARKERS = ("in_progress.json", "manifest.json")
"""Files of which one exists as soon as a stage was started."""
RECEIPT_SUFFIX = ".receipt.json"
PART_NAME = re.compile(r"part-(\d{5})-of-(\d{5})(\.\w+)(\.receipt\.json)?")
Item = TypeVar("Item")
Changes = list[tuple[str, Any, Any]]
"""(key, old value, new value) of each setting that differs."""


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Return (key, old, new) of every setting that differs; a missing one is None."""
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


@dataclass(frozen=True)
class Fingerprint:
    """What a stage's artifacts depend on: `settings` by dotted key, and `inputs` as digests by name."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        return digest_of({"settings": dict(self.settings), "inputs": dict(self.inputs)})


class FingerprintMismatchError(OpdctlError):
    """A stage directory was made with other settings (`changes`) or from other inputs."""

    def __init__(self, path: Path, changes: Changes, inputs: list[str]):
        self.path, self.changes = path, changes
        lines = [f"{key} {old!r} → {new!r}" for key, old, new in changes] or [f"changed inputs: {', '.join(inputs)}"]
        super().__init__(
            "settings_mismatch",
            "\n".join([f"{path} was made with different settings", *lines]),
            hint=f"restore the previous values, or remove {shlex.quote(str(path))} to regenerate it",
        )


class StageDir:
    """The parts of one stage at one step, and their manifest.

    fingerprint: or a function that waits for one that is not known yet. rerun_command: the command that makes its
    parts. repair_command: the one that moves a corrupt file away, "" for an evaluation that belongs to no run.
    lease_directory: where the leases are, by default beside the directory.

    Raises:
        OpdctlError: the directory was made with another fingerprint, or its manifest is corrupt.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        num_parts: int,
        suffix: str,
        fingerprint: Fingerprint | Callable[[], Fingerprint],
        rerun_command: str,
        repair_command: str = "",
        lease_directory: Path | None = None,
    ):
        self.path, self.stage, self._fingerprint, self.rerun_command = path, stage, fingerprint, rerun_command
        self.repair_command = repair_command
        self._lease_directory = lease_directory or path.parent
        self.names = [f"part-{i:05d}-of-{num_parts:05d}{suffix}" for i in range(num_parts)]
        self._header_path, self.manifest_path = (path / name for name in STAGE_MARKERS)
        self._leases: dict[int, leases.Lease] = {}  # of the parts that this worker makes
        check_no_symlinks(path.parent, path)
        self._check_fingerprint()

    # ── Records ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def fingerprint(self) -> Fingerprint:
        if not isinstance(self._fingerprint, Fingerprint):
            self._fingerprint = self._fingerprint()
        return self._fingerprint

    @property
    def has_fingerprint(self) -> bool:
        """Whether the fingerprint is known."""
        return isinstance(self._fingerprint, Fingerprint)

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while the stage is unfinished."""
        manifest: Manifest | None = self._read(self.manifest_path, Manifest)
        return manifest

    def _header(self) -> StageHeader | None:
        """Return the manifest, or the header of a stage that was started, or None."""
        header: StageHeader | None = self.manifest() or self._read(self._header_path, StageHeader)
        return header

    def _read(self, path: Path, form: Any) -> Any:
        """Return a JSON file, or None if there is none. Another worker may remove it at any moment."""
        try:
            return read_json(path, form, self._hint(path)) if path.exists() else None
        except OpdctlError:
            if path.exists():
                raise
            return None

    def _hint(self, path: Path) -> str:
        """Return what to do if a file is corrupt. Without a manifest or receipt, its parts count as missing."""
        return corrupt_file_hint(path, self.rerun_command, self.repair_command)

    def _check_fingerprint(self) -> None:
        header = self._header()
        if header is None:
            return
        if header["fingerprint"] == self.fingerprint.digest:
            manifest = self.manifest()
            if manifest and [part["name"] for part in manifest["parts"]] != self.names:
                hint = f"remove {shlex.quote(str(self.path))} to regenerate it"
                raise corrupt_artifact(self.manifest_path, "lists other parts", hint)
            return
        changes = changed_settings(header["settings"], self.fingerprint.settings)
        inputs = [name for name, _, _ in changed_settings(header["inputs"], self.fingerprint.inputs)]
        raise FingerprintMismatchError(self.path, changes, inputs)

    def record(self, index: int) -> PartRecord | None:
        """Return the record of part `index` from its receipt or the manifest, or None."""
        receipt: PartRecord | None = self._read(self._receipt_path(index), PartRecord)
        manifest = None if receipt else self.manifest()
        return manifest["parts"][index] if manifest else receipt

    def _receipt_path(self, index: int) -> Path:
        return self.path / f"{self.names[index]}{RECEIPT_SUFFIX}"

    def failed(self) -> list[str]:
        """Return the ids of what failed in the parts that are recorded."""
        records = (self.record(index) for index in range(len(self.names)))
        return [name for record in records if record for name in record.get("failed", [])]

    @property
    def digest(self) -> str:
        """The digest of the finished stage's parts.

        Raises:
            OpdctlError: the stage is unfinished.
        """
        manifest = self.manifest()
        if manifest is None:
            raise OpdctlError("missing_input", f"{self.path} is not finished", hint=f"run `{self.rerun_command}`")
        return digest_of([part["sha256"] for part in manifest["parts"]])

    def sha256(self, index: int) -> str:
        """Return the recorded digest of part `index`, which must have been written."""
        record = self.record(index)
        if record is None:
            raise corrupt_artifact(self.path / self.names[index], "has no record", f"run `{self.rerun_command}`")
        return record["sha256"]

    # ── State ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def is_finished(self) -> bool:
        """Whether the manifest is written and every part exists."""
        return self.manifest() is not None and not self._unmade()

    def count_made(self) -> int:
        """Return the number of parts that exist with a record. None is read."""
        return len(self.names) - len(self._unmade())

    def _unmade(self) -> list[int]:
        """Return the numbers of the parts without a file or, in an unfinished stage, without a receipt.

        It takes one listing: if each worker asked for each part, the load would grow with parts times workers.
        """
        present = self._list()
        absent = [index for index, name in enumerate(self.names) if name not in present]
        if self.manifest():  # after the listing: receipts are removed after the manifest is written
            return [index for index in absent if not (self.path / self.names[index]).exists()]  # a listing may be old
        unrecorded = {index for index, name in enumerate(self.names) if f"{name}{RECEIPT_SUFFIX}" not in present}
        return sorted(unrecorded.union(absent))

    def _list(self) -> set[str]:
        """Return the names in the directory, none before the stage is started."""
        try:
            return set(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def _is_made(self, index: int) -> bool:
        """Whether a part has a file and a record, whose content may differ."""
        if not (self.path / self.names[index]).exists():
            return False
        return self._receipt_path(index).exists() or self.manifest_path.exists()

    def missing(self, *, digests: bool = True) -> list[int]:
        """Return the numbers of the parts that must be made.

        A part without a manifest counts if it agrees with its receipt: in size, and if `digests` in content.
        """
        unmade = self._unmade()
        if self.manifest():
            return unmade
        made = {*range(len(self.names))}.difference(unmade)
        return sorted({*unmade, *self._unusable(self._records(made), digests=digests)})

    def _unusable(self, records: Mapping[int, PartRecord | None], *, digests: bool = True) -> list[int]:
        """Return the numbers of the parts that differ from their receipts. digests: as of `missing`."""
        paths = {index: self.path / self.names[index] for index in records}
        fitting = {
            path: record["sha256"]
            for index, path in paths.items()
            if (record := records[index]) and _size(path) == record["bytes"]
        }
        found = sha256_files([*fitting]) if digests else fitting
        return [index for index, path in paths.items() if path not in found or found[path] != fitting[path]]

    def _records(self, indices: Iterable[int]) -> dict[int, PartRecord | None]:
        """Return the records of parts, by number. Of the receipts only those that one listing has are read."""
        present, manifest = self._list(), self.manifest()
        records: dict[int, PartRecord | None] = {}
        for index in sorted(indices):
            path = self._receipt_path(index)
            receipt = self._read(path, PartRecord) if path.name in present else None
            records[index] = receipt or (manifest["parts"][index] if manifest else self.record(index))
        return records

    def finished_but_missing(self) -> list[Path]:
        """Return the parts that the manifest lists and that do not exist."""
        return [self.path / self.names[index] for index in self._unmade()] if self.manifest() else []

    def verify(self, index: int, *, digests: bool = True) -> Path:
        """Return the path of a finished part.

        Raises:
            OpdctlError: the part is missing or differs from its record: in size or, if `digests`, in content.
        """
        return self._verify(index, self.record(index), digests=digests)

    def _verify(self, index: int, record: PartRecord | None, *, digests: bool) -> Path:
        path = self.path / self.names[index]
        try:
            state = path.lstat()
        except FileNotFoundError:
            state = None
        if state and not stat.S_ISREG(state.st_mode):
            check_no_symlinks(path)
        if record is None or state is None:
            raise corrupt_artifact(path, "is missing", f"run `{self.rerun_command}`")
        hint = self._hint(path)
        if state.st_size != record["bytes"]:
            raise corrupt_artifact(path, f"has {state.st_size} bytes, expected {record['bytes']}", hint)
        if digests and (digest := sha256_file(path)) != record["sha256"]:
            why = f"{path}: SHA-256 {digest[:12]}…, expected {record['sha256'][:12]}…"
            raise OpdctlError("checksum_mismatch", why, hint=hint)
        return path

    def corrupted_parts(self, *, digests: bool = True) -> dict[int, str]:
        """Return why each part that the manifest lists is corrupt, by number."""
        if not self.manifest():
            return {}
        records = self._records(range(len(self.names)))

        def find_reason(index: int) -> str | None:
            try:
                self._verify(index, records[index], digests=digests)
            except OpdctlError as error:
                return error.message
            return None

        with ThreadPoolExecutor(HASH_THREADS) as threads:
            reasons = [*(threads.map if digests else map)(find_reason, records)]
        return {index: reason for index, reason in enumerate(reasons) if reason}

    def read_all(self, record: type[Row]) -> list[Row]:
        """Return the rows of all parts. Raises OpdctlError if one is corrupt."""
        return [row for index in range(len(self.names)) for row in self.read_part(index, record)]

    def read_part(self, index: int, record: type[Row]) -> list[Row]:
        """Return the rows of a finished part. Raises OpdctlError if it is missing or corrupt."""
        recorded = self.record(index)
        return read_rows(self.verify(index), record, recorded["rows"] if recorded else None)

    # ── Work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def items_of_part(self, items: list[Item], index: int) -> list[Item]:
        """Return the items of part `index`."""
        span = self.span_of_part(len(items), index)
        return items[span.start : span.stop]

    def span_of_part(self, count: int, index: int) -> range:
        """Return the numbers of the items of part `index`, of `count` in all. The parts are even slices, in order."""
        parts = len(self.names)
        return range(index * count // parts, (index + 1) * count // parts)

    def wait_until_finished(self) -> None:
        """Wait until other workers have made all parts."""
        pause = leases.backoff()
        while not self.is_finished():
            time.sleep(next(pause))

    @contextlib.contextmanager
    def claim_parts(self, *, wait: bool = False) -> Iterator[Iterator[int] | None]:
        """Yield an iterator over the missing parts, or None if there are none; then finish the stage if all exist.

        The caller holds the lease of a part until it has written it. Parts that a live worker has leased are left to
        it; stale leases are acquired. wait: until every part exists, whoever makes it.
        """
        with self.claim_available_parts(wait=wait) as parts:
            yield None if parts is None else (index for index in parts if index is not None)

    @contextlib.contextmanager
    def claim_available_parts(self, *, wait: bool = False) -> Iterator[Iterator[int | None] | None]:
        """Like `claim_parts`, with None in the iteration where the caller may work on the parts that it has: other
        workers have leased all others, and the iterator is about to wait; or all are leased, and it is about to read
        the records of all parts."""
        if self.is_finished() and not self._header_path.exists():
            yield None
        else:
            try:
                parts = self._lease_all(wait=wait)
                first = next((index for index in parts if index is not None), None)
                yield None if first is None else itertools.chain([first], parts)
            finally:
                while self._leases:
                    self._leases.popitem()[1].release()
            if self._unmade():  # other workers make them
                return
            self._finish()
        leases.remove_stale_leases(self._lease_directory, self.path.name)

    def _finish(self) -> list[int]:
        """Write the manifest, unless another worker has; return the parts that must be made first."""
        if self.manifest() and not self._header_path.exists():
            return self._unmade()
        with self.hold():  # several workers may finish at the same time
            return self._finalize()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lease of the stage for the block, which may write files beside and below its directory.

        Raises:
            OpdctlError: meanwhile the stage was started anew with another fingerprint.
        """
        with leases.hold_lease(self._lease_directory, self.path.name, wait=True):
            self._check_fingerprint()
            yield

    def _lease_all(self, *, wait: bool) -> Iterator[int | None]:
        """Yield each part that must be made as soon as this worker holds its lease, and None before each pause.

        The parts that exist are read as soon as all do, by the worker that finishes the stage: if each worker read them
        before it starts, the load would grow with parts times workers. Those that differ from their receipts follow.
        """
        yield from self._claims(self._unmade, self._is_made).lease_each(wait=wait)
        yield None
        if not self._unmade() and (unusable := self._finish()):

            def is_usable(index: int) -> bool:
                return self._is_made(index) and not self._unusable({index: self.record(index)})

            remaining = self._claims(lambda: [*itertools.filterfalse(is_usable, unusable)], is_usable)
            yield from remaining.lease_each(wait=wait)

    def _claims(self, list_unmade: Callable[[], list[int]], is_made: Callable[[int], bool]) -> PartClaims:
        return PartClaims(self._lease_directory, self.path.name, list_unmade, is_made, self._leases)

    def unmade_parts(self, lease_names: Iterable[str]) -> list[int]:
        """Return the numbers of the parts that are not made, among those with leases of these names."""
        prefix = f"{self.path.name}-part-"
        numbers = {name.removeprefix(prefix) for name in lease_names if name.startswith(prefix)}
        return sorted({int(number) for number in numbers if number.isdecimal()}.intersection(self._unmade()))

    def _release(self, index: int) -> None:
        if lease := self._leases.pop(index, None):
            lease.release()

    def start(self, logprob_metadata: Mapping[str, Any]) -> None:
        """Record, before the first part, the fingerprint and what the values of the parts mean."""
        fingerprint = self.fingerprint  # nothing is written before it is known
        with translate_write_errors(self.path):
            make_directory(self.path)
        remove_temporary_files(self.path)
        header = versioned(self.stage) | {"fingerprint": fingerprint.digest, "logprob_metadata": dict(logprob_metadata)}
        header |= {"settings": dict(fingerprint.settings), "inputs": dict(fingerprint.inputs)}
        with contextlib.suppress(leases.LeaseLost):  # of every part: other workers have started the stage
            write_json(self._header_path, header, self._check_any_lease)

    def write(
        self, index: int, save: Callable[[Path], None], *, rows: int, tokens: int, failed: Sequence[str] = ()
    ) -> bool:
        """Write part `index` by `save(temporary path)`, release its lease, and return whether the part counts.

        failed: the ids of what the part lacks.

        It is dropped if the lease was lost, or if another fingerprint was started in the same directory meanwhile.
        """
        name, check = self.names[index], partial(self._check_lease, index)
        try:
            with atomic_write(self.path / name, check) as temporary:
                save(temporary)
                size, digest = temporary.stat().st_size, sha256_file(temporary)
                fsync_path(temporary)  # slow, so before the receipt
                receipt = PartRecord(name=name, rows=rows, tokens=tokens, bytes=size, sha256=digest)
                if failed:
                    receipt["failed"] = [*failed]
                write_json(self._receipt_path(index), receipt, check)
        except leases.LeaseLost:
            return False
        self._release(index)
        return True

    def _check_lease(self, index: int) -> None:
        lease = self._leases.get(index)
        if lease is None:
            return
        header = self._header()
        if header is None or header["fingerprint"] != self.fingerprint.digest or not lease.is_held():
            raise leases.LeaseLost

    def _check_any_lease(self) -> None:
        if self._leases and not any(lease.is_held() for lease in self._leases.values()):
            raise leases.LeaseLost

    def finalize(self) -> bool:
        """Write the manifest if every part exists and it is not written yet. Return whether the stage is finished."""
        return not self._finalize()

    def _finalize(self) -> list[int]:
        """Write the manifest, unless parts must be made first; return their numbers."""
        if unmade := self._unmade():
            return unmade
        # A part that was removed from a finished stage has a receipt that is newer than the manifest.
        records = self._records(range(len(self.names)))
        if not self.manifest() and (unusable := self._unusable(records)):
            return unusable
        receipts = self._list().intersection(f"{name}{RECEIPT_SUFFIX}" for name in self.names)
        header = self._read(self._header_path, StageHeader)
        if header or receipts:
            header = header or self._read(self.manifest_path, Manifest)
            write_json(self.manifest_path, {**header, "parts": [*records.values()]})
            leases.check_held(self.manifest_path)
            for name in receipts:
                (self.path / name).unlink(missing_ok=True)
            remove_temporary_files(self.path)
            self._header_path.unlink(missing_ok=True)  # last: while it exists, a worker finalizes again
        return []


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if another process has removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class PartMakers:
    """Which processes make the parts of a stage.

    is_here: whether this process makes some. remotely: instead lets the workers of a cluster make all that are missing,
    and returns how many: (stage, function that is called with the number of items that were processed) → parts made.
    """

    is_here: bool = True
    remotely: Callable[[StageDir, Callable[[int], None]], int] | None = None


def write_summary(path: Path, stages: Iterable[StageDir], summarize: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Write what finished stages come to into a JSON file beside or below them, unless it holds it already; return it.

    The parts are read, and the file is written, under the leases of the stages: a worker that was suspended for longer
    writes nothing.
    """
    summary = summarize()
    if not path.exists() or read_json(path) != summary:
        with contextlib.ExitStack() as stack:
            for stage in stages:
                stack.enter_context(stage.hold())
            summary = summarize()
            write_json(path, summary)
    return summary


def corrupt_file_hint(path: Path, rerun_command: str, repair_command: str = "") -> str:
    """Return what to do if a file of a stage is corrupt."""
    first = f"run `{repair_command}`, then" if repair_command else f"remove {shlex.quote(str(path))}, run"
    return f"{first} `{rerun_command}`"


def recorded_stage(path: Path, rerun_command: str, repair_command: str = "") -> StageDir | None:
    """Return the stage in a directory as it is recorded, or None before its first part was started.

    Raises:
        OpdctlError: the record is corrupt.
    """
    header = recorded_header(path, rerun_command, repair_command)
    if header is None:
        return None
    recorded = [part["name"] for part in header.get("parts", ())]
    first = recorded[0] if recorded else min((each.name for each in path.glob("part-*")), default=None)
    if first is None:
        return None
    name = PART_NAME.fullmatch(first)
    if name is None:
        hint = f"remove {shlex.quote(str(path))} and run `{rerun_command}`"
        raise corrupt_artifact(path, f"has a part named {first}", hint)
    return StageDir(
        path,
        stage=header["artifact"],
        num_parts=len(recorded) or int(name[2]),
        suffix=name[3],
        fingerprint=Fingerprint(header["settings"], header["inputs"]),
        rerun_command=rerun_command,
        repair_command=repair_command,
    )


def recorded_header(path: Path, *commands: str) -> Any:
    """Return the manifest of a stage, or its header, or None. A worker may finish the stage in the meantime.

    commands: as of `corrupt_file_hint`.
    """
    for name, form in ((STAGE_MARKERS[1], Manifest), (STAGE_MARKERS[0], StageHeader), (STAGE_MARKERS[1], Manifest)):
        try:
            if (path / name).exists():
                return read_json(path / name, form, corrupt_file_hint(path / name, *commands))
        except OpdctlError:
            if (path / name).exists():
                raise
    return None
