"""Sync a run directory with an object store: plan, transfer in an order that keeps both sides readable, verify.

A journal in the run directory has the digest of each file that both sides had, with the identity of the file and of the
object at that time. So a file is read again, and an object requested, only after a change. Without the journal the
records of the run have the digests of its artifacts.
"""

import contextlib
import hashlib
import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from opdctl import console, signals
from opdctl.artifacts import files, leases, parsing
from opdctl.artifacts.manifests import JournalRecord, RunRecord, check_form
from opdctl.artifacts.object_store import ObjectStore, StoredFile, TransferStopped
from opdctl.errors import OpdctlError
from opdctl.runs.layout import step_name
from opdctl.runs.run import read_recipe
from opdctl.runs.sync_plan import (
    Direction,
    RecordedFile,
    SyncPlan,
    belongs_to_run,
    complete_files,
    decide,
    identify_run,
    is_replaceable,
    needed_to_follow,
    record_form,
    recorded_files,
    refers_to_others,
    stage_directories,
    transfer_order,
)

TRANSFER_THREADS = 16
"""Files that are transferred at a time."""
SYNC_POLL_SECONDS = 5.0
"""Between two comparisons of both sides with `--follow`."""
OUTAGE_SECONDS = 900.0
"""For which `--follow` continues without an answer of the store."""
TRANSIENT_KINDS = ("unavailable_server", "failed_download", "failed_upload")
"""Errors after which `--follow` compares again. The last two occur if a file is replaced during its transfer."""
SIGNAL_POLL_SECONDS = 0.5
"""Between two looks for a signal while files are transferred."""


class _Journal:
    """What the run directory and the store had in common at the last sync, by name."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self.records: dict[str, JournalRecord] = {}
        with contextlib.suppress(OSError, ValueError):
            for line in parsing.read_bytes(path).splitlines():
                with contextlib.suppress(ValueError):  # a line that was cut
                    record = check_form(parsing.parse_json(line), JournalRecord)
                    self.records[record["name"]] = record

    def rewrite(self) -> None:
        """Keep one line of each file."""
        if self.records:
            files.write_lines(self._path, self.records.values())

    def add(self, name: str, sha256: str, here: StoredFile, there: StoredFile) -> None:
        record = JournalRecord(name=name, sha256=sha256, size=there.size, here=here.identity, there=there.identity)
        with self._lock, files.translate_write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            self.records[name] = record

    def known(self, name: str, stored: StoredFile, side: str) -> str | None:
        """Return the digest of a file that is unchanged since the last sync."""
        record = self.records.get(name)
        is_same = record and (record["size"], record[side]) == (stored.size, stored.identity)  # type: ignore[literal-required]
        return record["sha256"] if record and is_same else None


@dataclass
class _Side:
    """The files of one side at one moment. contents: the digests of those whose content was read for the plan."""

    name: str
    stored: dict[str, StoredFile]
    journal: _Journal
    read: Callable[[str], str]
    recorded: dict[str, RecordedFile]
    contents: dict[str, str]

    def digest(self, name: str) -> str | None:
        """Return the digest of a file without reading it, or None."""
        stored, recorded = self.stored[name], self.recorded.get(name)
        if known := self.contents.get(name) or self.journal.known(name, stored, self.name):
            return known
        is_recorded = recorded and recorded.size in (None, stored.size)
        return recorded.sha256 if recorded and is_recorded else None

    def content(self, name: str, other: StoredFile) -> str:
        """Return the digest of a file that the other side has, too. Of another size, no content needs to be read."""
        if known := self.digest(name):
            return known
        return self.read(name) if self.stored[name].size == other.size else f"{self.stored[name].size} bytes"


class RunSync:
    """The sync of the run in `path` with the store.

    Raises:
        OpdctlError: the run directory contains a link or a special file.
    """

    def __init__(self, path: Path, store: ObjectStore):
        self.path, self.store = path, store
        self._name = f"sync-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}"
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    @cached_property
    def _journal(self) -> _Journal:
        return _Journal(self.path / f".{self._name}.jsonl")

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lease of this sync for the block.

        Raises:
            OpdctlError: another process syncs the same run with the same store.
        """
        with files.translate_write_errors(self.path):
            files.make_directory(self.path)
        with leases.hold_lease(self.path, self._name):
            self._journal.rewrite()
            yield

    # ── Planning ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, direction: Direction, *, follow: bool = False) -> SyncPlan:
        """Compare both sides. follow: fetch only what stages wait for.

        Raises:
            OpdctlError: the source has no run, or the sides are different runs; a finished artifact differs; a record
                is corrupt; the store does not answer.
        """
        here, there = self._sides()
        source = {"send": here, "receive": there}.get(direction)
        if source and "run.json" not in source.stored:
            where = self.path if source is here else self.store.url
            hint = "correct the path or the URL; `opdctl status` lists the runs of a directory"
            raise OpdctlError("missing_run", f"{where}: run.json is missing", hint=hint)
        if direction == "receive" and not here.stored and self.path.exists():
            self._check_is_empty()
        self._check_same_run(here, there)
        finished = stage_directories({*here.stored, *there.stored})
        ready = [complete_files(side.stored, side.recorded, finished) for side in (here, there)]
        wanted = needed_to_follow(ready[1]) if follow else {*ready[1]}
        arriving = there.recorded | {name: RecordedFile(sha256) for name, sha256 in there.contents.items()}
        plan = SyncPlan(here.stored, there.stored, here.recorded, arriving)
        clashes = []
        for name in sorted({*ready[0], *ready[1]}, key=transfer_order):
            decision, digest = self._compare(name, here, there, direction)
            if decision == "conflict" and direction != "receive" and name in ready[0] and name not in ready[1]:
                decision = "send"  # what a killed sync has left there has no record yet
            if decision == "conflict" and is_replaceable(name):
                decision = "leave" if direction == "both" else direction
                plan.kept.extend([name] if direction == "both" else [])
            if decision == "conflict":
                clashes.append(name)
            elif decision == "send" and name in ready[0]:
                plan.sent.append(name)
            elif decision == "receive" and name in wanted:
                plan.received.append(name)
            elif decision == "same":
                plan.unchanged.append(name)
                if digest and not self._is_known(name, here, there):
                    plan.confirmed[name] = digest
        if clashes:
            raise OpdctlError(
                "source_mismatch",
                f"{self.path} and {self.store.url} have different versions of finished artifacts: "
                + ", ".join(clashes[:3])
                + f" and {len(clashes) - 3} more" * (len(clashes) > 3),
                hint="keep one of the two: sync the other with another URL or directory",
            )
        return plan

    def _check_is_empty(self) -> None:
        is_directory = self.path.is_dir()
        present = (file for file in self.path.rglob("[!.]*") if not file.is_dir())
        if not is_directory or any(present):  # a sync that ended early leaves empty directories
            reason = "is not empty and not a run directory" if is_directory else "is a file"
            hint = "give the path of a run, or of a new directory"
            raise OpdctlError("unusable_output", f"{self.path} {reason}", hint=hint)

    def _sides(self) -> tuple[_Side, _Side]:
        journal, store = self._journal, self.store
        there_files = {name: file for name, file in store.list().items() if belongs_to_run(name)}
        here_files = _list_run(self.path)
        here = _Side("here", here_files, journal, lambda name: files.sha256_file(self.path / name), {}, {})
        there = _Side("there", there_files, journal, store.sha256, {}, {})
        records = {name: form for name in here_files if (form := record_form(name))}
        for name, form in sorted(records.items(), key=_receipts_first):
            with contextlib.suppress(FileNotFoundError):
                here.recorded |= recorded_files(name, self._read_record(name, form))
        self._read_stored_records(here, there)
        return here, there

    def _read_record(self, name: str, form: Any) -> Any:
        """Return a record of the run directory. Raises FileNotFoundError if a worker has just removed it."""
        try:
            return files.read_json(self.path / name, form, f"run `opdctl run repair {shlex.quote(str(self.path))}`")
        except OpdctlError:
            if not (self.path / name).exists():
                raise FileNotFoundError from None
            raise

    def _read_stored_records(self, here: _Side, there: _Side) -> None:
        """Add what the records of the store contain. Those that the run directory has, too, are read there."""
        records = {name: form for name in there.stored if (form := record_form(name))}
        known = {name: there.digest(name) for name in records}
        equal = {name for name in records if name in here.stored and known[name] and known[name] == here.digest(name)}
        for name in equal:
            files_of_record = recorded_files(name, self._read_record(name, records[name]))
            there.recorded |= files_of_record
        others = sorted(records.keys() - equal)
        with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
            contents = pool.map(lambda name: self.store.read(name, there.stored[name]), others)
            for name, data in sorted(zip(others, contents, strict=True), key=_receipts_first):
                hint = "replace the object by an intact copy, or remove it"
                record = files.parse_json_file(f"{self.store.url}/{name}", data, records[name], hint)
                there.recorded |= recorded_files(name, record)
                there.contents[name] = hashlib.sha256(data).hexdigest()

    def _check_same_run(self, here: _Side, there: _Side) -> None:
        if not ("run.json" in here.stored and "run.json" in there.stored):
            return
        if here.content("run.json", there.stored["run.json"]) == there.digest("run.json"):
            return
        data = self.store.read("run.json", there.stored["run.json"])
        hint = "use another URL or directory"
        other = files.parse_json_file(f"{self.store.url}/run.json", data, RunRecord, hint)
        if identify_run(other) != identify_run(self._read_record("run.json", RunRecord)):
            raise OpdctlError("source_mismatch", f"{self.store.url} has another run than {self.path}", hint=hint)

    def _compare(self, name: str, here: _Side, there: _Side, direction: Direction) -> tuple[Any, str | None]:
        """Return what to do with a file, and its digest if both sides have it."""
        record = self._journal.records.get(name)
        last = record["sha256"] if record else None
        if name not in here.stored:
            return decide(None, there.digest(name) or "unknown", last, direction), None
        if name not in there.stored:
            return decide(here.digest(name) or "unknown", None, last, direction), None
        recorded, size = there.recorded.get(name), there.stored[name].size
        if direction != "receive" and recorded and recorded.size not in (None, size):
            return "send", None  # an object that was cut is as good as none
        digests = here.content(name, there.stored[name]), there.content(name, here.stored[name])
        return decide(*digests, last, direction), digests[0]

    def _is_known(self, name: str, *sides: _Side) -> bool:
        return all(self._journal.known(name, side.stored[name], side.name) for side in sides)

    # ── Transfers ────────────────────────────────────────────────────────────────────────────────────────────────────

    def transfer(self, plan: SyncPlan) -> None:
        """Transfer the files of a plan, several at a time; those that refer to others after all before them.

        Raises:
            OpdctlError: a transfer failed, or what arrived differs from its record. It is not put in place.
        """
        files.require_space(self.path, plan.received_bytes, "the download")
        for directory in {(self.path / name).parent for name in plan.received}:
            files.remove_temporary_files(directory)  # of syncs that were killed
        for name, sha256 in plan.confirmed.items():
            self._journal.add(name, sha256, plan.here[name], plan.there[name])
        names, total = {*plan.sent, *plan.received}, plan.sent_bytes + plan.received_bytes
        if not names:
            return
        title = f"syncing {len(names):,} files"
        with console.progress(title, total, is_bytes=True) as advance, ThreadPoolExecutor(TRANSFER_THREADS) as pool:
            lock = threading.Lock()

            def count(size: int) -> None:
                if size > 0 and self._stop.is_set():
                    raise TransferStopped
                with lock:
                    advance(size)

            sent, futures = {*plan.sent}, []
            before: list[Future[None]] = []
            for name in sorted(names, key=transfer_order):
                move = partial(self._send if name in sent else self._receive, plan, name, count)
                must_wait = refers_to_others(name)
                future = pool.submit(self._run_after, before if must_wait else [], move)
                before = [] if must_wait else before
                before.append(future)
                futures.append(future)
            self._wait(pool, futures)

    def _run_after(self, before: list["Future[None]"], move: Callable[[], None]) -> None:
        try:
            for future in before:
                future.result()
            if self._stop.is_set():
                raise TransferStopped
            move()
        except BaseException as error:
            if not isinstance(error, TransferStopped | CancelledError):
                self._failure = self._failure or error
            self._stop.set()
            raise

    def _wait(self, pool: ThreadPoolExecutor, futures: list["Future[None]"]) -> None:
        try:
            for future in futures:
                while not future.done():
                    signals.check()
                    with contextlib.suppress(TimeoutError, Exception):
                        future.result(timeout=SIGNAL_POLL_SECONDS)
                future.result()
        except BaseException as error:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            failure, self._failure = self._failure, None
            self._stop.clear()
            if isinstance(error, Exception) and failure:
                raise failure from None
            raise

    def _send(self, plan: SyncPlan, name: str, count: Callable[[int], None]) -> None:
        path, recorded = self.path / name, plan.recorded_here.get(name)

        def check(sha256: str) -> None:
            if recorded and sha256 != recorded.sha256:
                why = f"{path}: SHA-256 {sha256[:12]}…, expected {recorded.sha256[:12]}…"
                hint = f"run `opdctl run repair {shlex.quote(str(self.path))}`"
                raise OpdctlError("checksum_mismatch", why, hint=hint)

        try:
            here = _describe(path.lstat())
            there, sha256 = self.store.send(path, name, check, count)
        except FileNotFoundError:  # a worker has removed it, such as the receipt of a part
            return
        self._journal.add(name, sha256, here, there)

    def _receive(self, plan: SyncPlan, name: str, count: Callable[[int], None]) -> None:
        path, stored, recorded = self.path / name, plan.there[name], plan.recorded_there.get(name)
        if recorded and recorded.size not in (None, stored.size):
            why = f"{self.store.url}/{name}: has {stored.size} bytes, expected {recorded.size}"
            raise OpdctlError("corrupt_artifact", why, hint="replace the object by an intact copy, or remove it")
        if path.is_dir():
            raise OpdctlError("unusable_output", f"{path} is a directory, {self.store.url}/{name} an object")
        with files.atomic_write(path) as temporary:
            self.store.fetch(name, stored, temporary, count)
            sha256 = files.sha256_file(temporary)
            self._check_content(name, temporary, sha256, recorded)
        self._journal.add(name, sha256, _describe(path.lstat()), stored)

    def _check_content(self, name: str, arrived: Path, sha256: str, recorded: RecordedFile | None) -> None:
        source, hint = f"{self.store.url}/{name}", "replace the object by an intact copy, or remove it"
        if recorded and recorded.sha256 != sha256:
            why = f"{source}: SHA-256 {sha256[:12]}…, expected {recorded.sha256[:12]}…"
            raise OpdctlError("checksum_mismatch", why, hint=hint)
        if not recorded and name.endswith(".json") and not name.startswith("analysis/tables/"):
            files.parse_json_file(source, parsing.read_bytes(arrived), dict[str, Any], hint)

    # ── Following ────────────────────────────────────────────────────────────────────────────────────────────────────

    def follow(self, on_transfer: Callable[[SyncPlan], None]) -> None:
        """Keep both sides in step until both have the last update.

        on_transfer: is called after files were transferred.

        Raises:
            OpdctlError: as `plan` and `transfer` do; the store did not answer for OUTAGE_SECONDS.
        """
        answered = time.monotonic()
        while True:
            try:
                plan = self.plan("both", follow=True)
                self.transfer(plan)
                answered = time.monotonic()
            except OpdctlError as error:
                if error.kind not in TRANSIENT_KINDS or time.monotonic() - answered > OUTAGE_SECONDS:
                    raise
                console.warn(f"{error.message}; trying again")
            else:
                for name in plan.kept:
                    console.warn_once(f"{self.path / name}: changed on both sides, and left as it is")
                if plan.sent or plan.received:
                    on_transfer(plan)
                elif self._is_finished(plan):
                    return
            signals.check()
            time.sleep(SYNC_POLL_SECONDS)

    def _is_finished(self, plan: SyncPlan) -> bool:
        if not {"run.json", "recipe.toml"} <= plan.here.keys():
            return False
        last = f"{step_name(read_recipe(self.path).train.steps - 1)}/update.json"
        return last in plan.here and last in plan.there


def _receipts_first(item: tuple[str, Any]) -> bool:
    """Sort records so that a manifest overrides the receipts beside it."""
    return not item[0].endswith(".receipt.json")


def _describe(stat: os.stat_result) -> StoredFile:
    return StoredFile(stat.st_size, f"{stat.st_ino} {stat.st_mtime_ns}")


def _list_run(path: Path) -> dict[str, StoredFile]:
    """Return the files of a run directory that are synced."""
    if not path.is_dir():
        return {}
    files.check_tree(path)
    found = {}
    for directory, names, entries in os.walk(path):
        names[:] = [name for name in names if not name.startswith(".") and name not in files.FOREIGN_DIRECTORIES]
        for entry in entries:
            full = Path(directory, entry)
            if belongs_to_run(name := full.relative_to(path).as_posix()):
                with contextlib.suppress(FileNotFoundError):
                    found[name] = _describe(full.lstat())
    return found
