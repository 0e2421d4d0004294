"""The only file that opens artifacts: parts, manifests, digests, model directories. Imports no torch.

A part is written under a temporary name in its own folder, flushed to disk, and renamed; just before the rename a
receipt with its rows, tokens, bytes and SHA-256 is written beside it. Once every part is there, the receipts are
gathered into manifest.json, the mark of a finished stage. So a kill at any moment loses at most the part in work: a
part with a matching receipt is taken over, anything else is made again.

Nothing is read that is not what was written: parts and model directories are checked against the digests recorded of
them, every JSON file against one of its own and against its form, before anything in them counts. No name leads out of
its folder, and no symbolic link is followed.

What a stage made is tied to a fingerprint: the settings that shape it and the digests of its inputs. The same
fingerprint goes on; another is refused.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from opdctl.artifacts import leases
from opdctl.artifacts.files import (
    atomic_write,
    check_no_symlinks,
    corrupt_artifact,
    digest_of,
    fsync_path,
    make_directory,
    read_json,
    remove_temporary_files,
    sha256_file,
    translate_write_errors,
    write_json,
)
from opdctl.artifacts.manifests import Manifest, PartRecord, Sealed, StageHeader
from opdctl.artifacts.records import SCHEMA_VERSION
from opdctl.artifacts.tables import Row, read_rows
from opdctl.errors import ExitCode, OpdctlError


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) of every setting that differs; a missing one is None."""
    return [(k, old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


STAGE_MARKERS = ("in_progress.json", "manifest.json")  # a stage whose folder holds one of them was begun
T = TypeVar("T")


# ── Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fingerprint:
    """What shapes a stage's artifacts: `settings` by dotted key, `inputs` as digests by name."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest_of(asdict(self))


@dataclass(frozen=True)
class WorkerShard:
    """Worker `index` of `count`: its parts are those whose number leaves that remainder."""

    index: int = 0
    count: int = 1

    def own(self, parts: int) -> list[int]:
        return list(range(self.index, parts, self.count))

    def among(self, parts: Iterable[int]) -> list[int]:
        return [part for part in parts if part % self.count == self.index]


ALL_PARTS = WorkerShard()


@dataclass(frozen=True)
class Part:
    """A finished part, as its receipt and the manifest record it."""

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


class FingerprintMismatchError(OpdctlError):
    """A stage directory was made from other settings (`changes`: key, old, new) or from other inputs."""

    def __init__(self, path: Path, changes: list[tuple[str, Any, Any]], inputs: list[str]):
        self.path, self.changes = path, changes
        lines = [f"{key} {old!r} → {new!r}" for key, old, new in changes]
        super().__init__(
            "\n".join(
                [f"{path}: was made under other settings", *(lines or [f"its inputs changed: {', '.join(inputs)}"])]
            ),
            hint=f"put the old value back; or use another --output; or remove {path} to make it again",
            code=ExitCode.RECIPE_MISMATCH,
        )


class StageDir:
    """The parts of one stage at one step, and their manifest.

    `rerun_command` is the command that makes a part again, for error messages.
    """

    def __init__(
        self, path: Path, *, stage: str, parts: int, suffix: str, fingerprint: Fingerprint, rerun_command: str
    ):
        self.path, self.stage, self.fingerprint, self.rerun_command = path, stage, fingerprint, rerun_command
        self.names = [f"part-{i:05d}-of-{parts:05d}{suffix}" for i in range(parts)]
        self._header_path, self.manifest_path = (path / name for name in STAGE_MARKERS)
        self._lease: leases.Lease | None = None
        check_no_symlinks(path.parent, path)
        self._check_fingerprint()

    def _read_header(self) -> dict[str, Any] | None:
        """Return what is recorded of the stage, finished or begun, or None."""
        found: Any = self.manifest() or self._read(self._header_path, StageHeader)
        return found

    def _check_fingerprint(self) -> None:
        recorded = self._read_header()
        if recorded is None:
            return
        if recorded["fingerprint"] == self.fingerprint.digest:
            if "parts" in recorded and [part["name"] for part in recorded["parts"]] != self.names:
                raise corrupt_artifact(self.manifest_path, "lists other parts", f"remove {self.path} to make it again")
            return
        changes = changed_settings(recorded["settings"], self.fingerprint.settings)
        inputs = [name for name, _, _ in changed_settings(recorded["inputs"], self.fingerprint.inputs)]
        raise FingerprintMismatchError(self.path, changes, inputs)

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while the stage is unfinished."""
        found: Manifest | None = self._read(self.manifest_path, Manifest)
        return found

    def _read(self, path: Path, kind: Any) -> Any:
        """Return what a JSON file says, or None where there is none, or none any more: another may be sealing."""
        try:
            hint = f"remove {path} and run `{self.rerun_command}`: what it tells of is made again"
            return read_json(path, kind, hint) if path.exists() else None
        except OpdctlError:
            if path.exists():
                raise
            return None

    def record(self, index: int) -> Part | None:
        """Return what was recorded of part `index`, by its receipt or by the manifest."""
        if receipt := self._read(self._receipt(index), PartRecord):
            return Part(**receipt)
        return self._manifest_entry(index) if self.manifest() else None

    def _manifest_entry(self, index: int) -> Part:
        manifest = self.manifest()
        for part in manifest["parts"] if manifest else ():
            if part["name"] == self.names[index]:
                return Part(**part)
        raise corrupt_artifact(
            self.manifest_path, f"does not list {self.names[index]}", f"remove {self.path} to make it again"
        )

    def _receipt(self, index: int) -> Path:
        return self.path / f"{self.names[index]}.receipt.json"

    def missing(self, *, digests: bool = True) -> list[int]:
        """Return the numbers of the parts that are still to be made.

        A part without a manifest counts if its receipt agrees: in size, and with `digests` in content.
        """
        return [index for index in range(len(self.names)) if self._is_missing(index, digests=digests)]

    def _is_missing(self, index: int, *, digests: bool = True) -> bool:
        if not (self.path / self.names[index]).exists():
            return True
        return self.manifest() is None and not self._is_reusable(index, digests=digests)

    def _is_reusable(self, index: int, *, digests: bool) -> bool:
        record, path = self.record(index), self.path / self.names[index]
        if record is None or record.bytes != path.stat().st_size:
            return False
        return not digests or record.sha256 == sha256_file(path)

    def items_of_part(self, items: list[T], index: int) -> list[T]:
        """Return the items of part `index`: the parts are even cuts of the whole, in order."""
        count = len(self.names)
        return items[index * len(items) // count : (index + 1) * len(items) // count]

    def parts_to_make(self, *, repair: bool = False) -> list[int]:
        """Return the numbers of the parts to make: the missing ones, and with `repair` the damaged ones too."""
        return sorted({*self.missing(), *(self.corrupted_parts() if repair else ())})

    @contextlib.contextmanager
    def claim_parts(
        self, *, repair: bool = False, shard: WorkerShard = ALL_PARTS, wait: bool = False
    ) -> Iterator[Iterator[int] | None]:
        """Yield the shard's parts to make, each claimed for as long as the caller is at it, or None where there is
        none to make; then seal the stage if all parts are there.

        A damaged part stays where it is until the new one takes its place. Parts that others have claimed are left to
        them as soon as they show life, and taken over if they do not; with `wait` the shard's parts are all there at
        the end, whoever made them.
        """
        folder, name = self.path.parent, self.path.name
        if self.is_finished() and not repair and not self._header_path.exists():
            yield None
        else:
            wanted = shard.among(self.parts_to_make(repair=repair))
            with contextlib.closing(self._lease_each(wanted, repair=repair, wait=wait)) as parts:
                first = next(parts, None)
                yield None if first is None else itertools.chain([first], parts)
            if not self.missing(digests=False):
                with leases.hold_lease(folder, name, wait=True):  # two workers may finish at once
                    self.finalize()
        leases.remove_stale_leases(folder, name)

    def _lease_each(self, wanted: Iterable[int], *, repair: bool, wait: bool) -> Generator[int]:
        left = {index: leases.Lease(self.path.parent, f"{self.path.name}-part-{index:05d}") for index in wanted}
        pause = leases.backoff()
        while left:
            for index, claim in list(left.items()):
                if claim.acquire():
                    del left[index]
                    self._lease, pause = claim, leases.backoff()
                    try:
                        if self._is_to_make(index, repair=repair):  # its owner may just have finished it
                            yield index
                    finally:
                        self._lease = None
                        claim.release()
                elif not wait and claim.owner_is_alive():
                    del left[index]
            if left:
                time.sleep(next(pause))

    def _is_to_make(self, index: int, *, repair: bool) -> bool:
        return self._is_missing(index) or (repair and self._find_corruption(index) is not None)

    def finished_but_missing(self) -> list[Path]:
        """Return the finished parts that are not there any more."""
        return [self.path / name for name in self.names if not (self.path / name).exists()] if self.manifest() else []

    def is_finished(self) -> bool:
        return self.manifest() is not None and not self.missing()

    def start(self, logprob_metadata: Mapping[str, Any]) -> None:
        """Record, before the first part, what is being made and what its values mean."""
        with translate_write_errors(self.path):
            make_directory(self.path)
        remove_temporary_files(self.path)
        write_json(self._header_path, {**self._header(), "logprob_metadata": dict(logprob_metadata)})

    def write(self, index: int, save: Callable[[Path], None], *, rows: int, tokens: int) -> bool:
        """Write part `index` by `save(temporary path)`. Return whether it counts: it is dropped where the claim to it
        was lost, or where the stage was begun anew under other settings."""
        name = self.names[index]
        try:
            with atomic_write(self.path / name) as temporary:
                save(temporary)
                part = Part(name, rows, tokens, temporary.stat().st_size, sha256_file(temporary))
                fsync_path(temporary)  # may take its time, so before the claim is looked at
                self._check_lease()
                write_json(self._receipt(index), asdict(part))
                self._check_lease()
        except leases.LeaseLost:
            return False
        return True

    def _check_lease(self) -> None:
        begun = self._read_header()
        is_own = begun is not None and begun["fingerprint"] == self.fingerprint.digest
        if self._lease is not None and not (is_own and self._lease.is_held()):
            raise leases.LeaseLost

    def _header(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "fingerprint": self.fingerprint.digest,
            "settings": dict(self.fingerprint.settings),
            "inputs": dict(self.fingerprint.inputs),
        }

    def finalize(self) -> bool:
        """Write the manifest if every part is there and it is not written yet. Return whether the stage is finished."""
        if self.missing():
            return False
        # A part that was removed and made again has a receipt that is newer than the manifest.
        receipts = [self._read(self._receipt(index), PartRecord) for index in range(len(self.names))]
        if self._header_path.exists() or any(receipts):
            header: StageHeader = self._read(self._header_path, StageHeader) or self._read(self.manifest_path, Manifest)
            parts = [receipt or asdict(self._manifest_entry(i)) for i, receipt in enumerate(receipts)]
            write_json(self.manifest_path, {**header, "parts": parts})
            for index in range(len(self.names)):
                self._receipt(index).unlink(missing_ok=True)
            remove_temporary_files(self.path)
            self._header_path.unlink(missing_ok=True)  # last: while it is there, sealing is tried again
        return True

    def sha256(self, index: int) -> str:
        """Return the recorded digest of a finished part."""
        return (self.record(index) or self._manifest_entry(index)).sha256

    def verify(self, index: int, *, digests: bool = True) -> Path:
        """Return the path of a finished part. Raises OpdctlError (code 3) when it is not what was recorded."""
        path, record = self.path / self.names[index], self.record(index)
        hint = f"run `{self.rerun_command} --repair` to make this part again"
        check_no_symlinks(path)
        if record is None or not path.exists():
            raise corrupt_artifact(path, "the part is missing", hint)
        if (size := path.stat().st_size) != record.bytes:
            raise corrupt_artifact(path, f"{size} bytes, {record.bytes} were written", hint)
        if digests and (digest := sha256_file(path)) != record.sha256:
            raise corrupt_artifact(path, f"its SHA-256 is {digest[:12]}…, {record.sha256[:12]}… was written", hint)
        return path

    def corrupted_parts(self, *, digests: bool = True) -> dict[int, str]:
        """Return what is wrong with each part that the manifest lists."""
        indices = range(len(self.names)) if self.manifest() else ()
        return {index: what for index in indices if (what := self._find_corruption(index, digests=digests))}

    def _find_corruption(self, index: int, *, digests: bool = True) -> str | None:
        """Return what is wrong with a part, or None."""
        try:
            self.verify(index, digests=digests)
        except OpdctlError as error:
            return error.message
        return None

    @property
    def digest(self) -> str:
        """The digest of the finished stage: of its parts, not of when or where they were made."""
        manifest = self.manifest()
        if manifest is None:
            raise OpdctlError(f"{self.path}: not finished", hint=f"run `{self.rerun_command}`", code=ExitCode.FAILED)
        return digest_of([part["sha256"] for part in manifest["parts"]])


def read_stage_rows(folder: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a finished stage, whatever made it. Raises OpdctlError (code 3) where a part is damaged."""
    if problems := verify_stage(folder):
        raise OpdctlError(
            "\n".join(problems), hint="run the command that made it again with --repair", code=ExitCode.BAD_DATA
        )
    names = [part["name"] for part in read_json(folder / "manifest.json", Sealed)["parts"]]
    return [row for name in names for row in read_rows(folder / name, kind)]


def verify_stage(folder: Path) -> list[str]:
    """Return what is wrong with the parts that the manifest in `folder` lists, whatever stage made them."""
    found = []
    for part in read_json(folder / "manifest.json", Sealed)["parts"]:
        path = folder / part["name"]
        check_no_symlinks(folder, path)
        if not path.exists():
            found.append(f"{path}: missing")
        elif sha256_file(path) != part["sha256"]:
            found.append(f"{path}: its SHA-256 is not the one that was written")
    return found
