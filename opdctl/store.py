"""The only file that opens artifacts: parts, manifests, digests, model directories, locks. Imports no torch.

A part is written under a temporary name in its own folder, flushed to disk, and renamed; just before the rename a
receipt with its rows, tokens, bytes and SHA-256 is written beside it. Once every part is there, the receipts are
gathered into manifest.json, the mark of a finished stage. So a kill at any moment loses at most the part in work: a
part with a matching receipt is taken over, anything else is made again.

What a stage made is tied to a fingerprint: the settings that shape it and the digests of its inputs. The same
fingerprint goes on; another is refused.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opdctl import SCHEMA_VERSION
from opdctl.config import changed, describe_changes
from opdctl.errors import ExitCode, OpdctlError
from opdctl.records import GRADED, PROMPTS, RESPONSES, Graded, Prompt, Response, Scores, offsets_of

HIDDEN = "hidden_states"
SCORE_COLUMNS = tuple(column.name for column in fields(Scores))

Row = TypeVar("Row", Prompt, Response, Graded)
T = TypeVar("T")


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(final: Path) -> Path:
    return final.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{final.name}")


def sweep(folder: Path) -> None:
    """Remove what dead processes of this machine left half-written in `folder`."""
    for left in folder.glob(f".tmp-{socket.gethostname()}-*"):
        pid = left.name.removeprefix(f".tmp-{socket.gethostname()}-").partition("-")[0]
        if pid == str(os.getpid()) or not pid.isdigit() or Path("/proc", pid).exists():
            continue
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def _published(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; when the block ends well, flush it to disk and rename it to `final`."""
    temporary = _temporary(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _fsync(path)
        if final.is_dir():
            shutil.rmtree(final)  # a directory cannot be renamed over another one
        os.replace(temporary, final)
        _fsync(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(final) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OpdctlError(f"{final}: cannot be written: {error.strerror}", code=ExitCode.REACH) from error
        raise
    except SafetensorError as error:  # wraps the system's error in its text
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise _disk_full(final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _disk_full(path: Path) -> OpdctlError:
    hint = "free some space and run the same command again"
    return OpdctlError(f"{path}: the disk is full", hint=hint, code=ExitCode.REACH)


def write_text(path: Path, text: str) -> None:
    """Write a whole small file, or leave the old one."""
    with _published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    with _published(path) as temporary:
        temporary.write_bytes(data)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`. Raises OpdctlError (code 3) when it cannot be read: nothing makes it again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "restore it from a copy, or start again in another --output"
        raise damaged(path, f"cannot be read: {error}", hint) from error


def damaged(path: Path, why: str, hint: str | None = None) -> OpdctlError:
    """Return the error for an artifact that is not what was written."""
    hint = hint or f"remove {path} and run the command that made it again"
    return OpdctlError(f"{path}: damaged: {why}", hint=hint, code=ExitCode.DATA)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_SCHEMAS: dict[type, pa.Schema] = {Prompt: PROMPTS, Response: RESPONSES, Graded: GRADED}


def write_rows(path: Path, rows: Sequence[Row], kind: type[Row]) -> None:
    """Write rows as Parquet with page checksums: without them a flipped byte is mostly read in silence."""
    columns = {name: [_flat(getattr(row, name)) for row in rows] for name in _SCHEMAS[kind].names}
    pq.write_table(pa.table(columns, schema=_SCHEMAS[kind]), path, compression="zstd", write_page_checksum=True)


def _flat(value: Any) -> Any:
    """Return what a cell holds: arrays of several dimensions row by row."""
    return value.reshape(-1) if isinstance(value, np.ndarray) else value


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> list[Path]:
    """Write columns of numbers or text as `path`.parquet and `path`.csv and return both paths; NaN is null."""
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    paths = [path.with_name(f"{path.name}.parquet"), path.with_name(f"{path.name}.csv")]
    for final, write in zip(paths, (pq.write_table, pa.csv.write_csv), strict=True):
        with _published(final) as temporary:
            write(table, temporary)
    return paths


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> str:
    """Write the run's prompts, whole or not at all, and return the file's SHA-256."""
    with _published(path) as temporary:
        write_rows(temporary, prompts, Prompt)
    return sha256_file(path)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read the rows of one Parquet file. Raises OpdctlError (code 3) when it is damaged or of another schema."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, str(error)) from error
    if not table.schema.equals(_SCHEMAS[kind]):
        raise damaged(path, f"has columns {table.schema.names}, wanted {_SCHEMAS[kind].names}")
    columns = {name: _column(table[name]) for name in table.schema.names}
    if kind is Response:
        lengths = [len(ids) for ids in columns["response_ids"]]
        columns |= {name: _by_token(columns[name], lengths) for name in ("top_ids", "top_logprobs")}
    return [kind(**{name: values[i] for name, values in columns.items()}) for i in range(table.num_rows)]


def _column(column: pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    # Ids and log-probs stay arrays; a column that was not asked for is null.
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in column]


def _by_token(flat: list[np.ndarray | None], lengths: list[int]) -> list[np.ndarray | None]:
    """Bring the most probable tokens of each response back to one row a token, all of the same width."""
    width = max((len(cell) // n for cell, n in zip(flat, lengths, strict=True) if cell is not None and n), default=0)
    return [None if cell is None else cell.reshape(n, width) for cell, n in zip(flat, lengths, strict=True)]


def write_scores(path: Path, ids: Sequence[str], scores: Sequence[Scores], meaning: Mapping[str, str]) -> None:
    """Write what a model says of one rollout part as safetensors: `offsets` [R + 1], and each column [tokens, …]."""
    tensors = {"offsets": offsets_of([len(row.logprobs) for row in scores])}
    for name in SCORE_COLUMNS:
        values = [value for row in scores if (value := getattr(row, name)) is not None]
        if values:
            tensors[name] = np.concatenate([value() if callable(value) else value for value in values])
    tensors.setdefault("logprobs", np.zeros(0, np.float32))
    # One entry: safetensors writes several in an order that changes from call to call, and so would the digest.
    save_file(tensors, path, metadata={"opdctl": json.dumps({**meaning, "sample_ids": list(ids)})})


def read_scores(path: Path, rollout_sha256: str) -> dict[str, Scores]:
    """Return what a model says of one part, by sample id; hidden states are left on disk until they are asked for.

    Raises OpdctlError (code 3) when it is damaged, or when it scores another rollout part than the one of this digest.
    """
    try:
        with safe_open(path, "np") as file:
            meaning = json.loads((file.metadata() or {})["opdctl"])
            ids, scored = meaning["sample_ids"], meaning["rollout"]
            names, offsets = set(file.keys()), file.get_tensor("offsets")
            columns = {name: file.get_tensor(name) for name in names & set(SCORE_COLUMNS) - {HIDDEN}}
            lengths = [len(column) for column in columns.values()]
            lengths += [file.get_slice(HIDDEN).get_shape()[0]] if HIDDEN in names else []
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if scored != rollout_sha256:
        raise damaged(path, "it scores other responses than those beside it")
    fits = len(offsets) == len(ids) + 1 and offsets[0] == 0 and "logprobs" in columns and {*lengths} == {offsets[-1]}
    if not fits or (np.diff(offsets) < 0).any() or len(set(ids)) != len(ids):
        raise damaged(path, "its offsets, ids and log-probs do not fit together")
    spans = zip(ids, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return {
        sample: Scores(
            **{name: column[a:b] for name, column in columns.items()},
            hidden_states=partial(_read_span, path, HIDDEN, a, b) if HIDDEN in names else None,
        )
        for sample, a, b in spans
    }


def _read_span(path: Path, name: str, start: int, stop: int) -> np.ndarray:
    with safe_open(path, "np") as file:
        return file.get_slice(name)[start:stop]


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
class Shard:
    """Worker `index` of `count`: its parts are those whose number leaves that remainder."""

    index: int = 0
    count: int = 1

    def own(self, parts: int) -> list[int]:
        return list(range(self.index, parts, self.count))

    def among(self, parts: Iterable[int]) -> list[int]:
        return [part for part in parts if part % self.count == self.index]


WHOLE = Shard()


@dataclass(frozen=True)
class Part:
    """A finished part, as its receipt and the manifest record it."""

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


class StageDir:
    """The parts of one stage at one step, and their manifest.

    `redo` is the command that makes a part again, for error messages.
    """

    def __init__(self, path: Path, *, stage: str, parts: int, suffix: str, fingerprint: Fingerprint, redo: str):
        self.path, self.stage, self.fingerprint, self.redo = path, stage, fingerprint, redo
        self.names = [f"part-{i:05d}-of-{parts:05d}{suffix}" for i in range(parts)]
        self.manifest_path, self._work_path = path / "manifest.json", path / "work.json"
        self._refuse_another_fingerprint()

    def _refuse_another_fingerprint(self) -> None:
        recorded = self.manifest() or (read_json(self._work_path) if self._work_path.exists() else None)
        if recorded is None or recorded["fingerprint"] == self.fingerprint.digest:
            return
        changes = changed(recorded["settings"], self.fingerprint.settings)
        inputs = [name for name, _, _ in changed(recorded["inputs"], self.fingerprint.inputs)]
        what = describe_changes(changes) or f"its inputs changed: {', '.join(inputs)}"
        raise OpdctlError(
            f"{self.path}: was made under other settings\n{what}",
            hint=f"put the old value back; or use another --output; or remove {self.path} to make it again",
            code=ExitCode.SETTINGS,
        )

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest, or None while the stage is unfinished."""
        if not self.manifest_path.exists():
            return None
        manifest = read_json(self.manifest_path)
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise OpdctlError(
                f"{self.manifest_path}: schema version {manifest.get('schema_version')!r}, "
                f"this opdctl reads version {SCHEMA_VERSION}",
                hint="use the opdctl that wrote it, or another --output",
                code=ExitCode.DATA,
            )
        return manifest

    def record(self, index: int) -> Part | None:
        """Return what was recorded of part `index`, by its receipt or by the manifest."""
        if (receipt := self._receipt(index)).exists():
            return Part(**read_json(receipt))
        return self._recorded(index) if self.manifest() else None

    def _recorded(self, index: int) -> Part:
        manifest = self.manifest() or {"parts": []}
        for part in manifest["parts"]:
            if part["name"] == self.names[index]:
                return Part(**part)
        raise damaged(self.manifest_path, f"does not list {self.names[index]}", f"remove {self.path} to make it again")

    def _receipt(self, index: int) -> Path:
        return self.path / f"{self.names[index]}.receipt.json"

    def missing(self, *, digests: bool = True) -> list[int]:
        """Return the numbers of the parts that are still to be made.

        A part without a manifest counts if its receipt agrees: in size, and with `digests` in content.
        """
        sealed = self.manifest() is not None
        return [
            index
            for index, name in enumerate(self.names)
            if not (self.path / name).exists() or not (sealed or self._taken_over(index, digests=digests))
        ]

    def _taken_over(self, index: int, *, digests: bool) -> bool:
        record, path = self.record(index), self.path / self.names[index]
        if record is None or record.bytes != path.stat().st_size:
            return False
        return not digests or record.sha256 == sha256_file(path)

    def share(self, items: list[T], index: int) -> list[T]:
        """Return the items of part `index`: the parts are even cuts of the whole, in order."""
        count = len(self.names)
        return items[index * len(items) // count : (index + 1) * len(items) // count]

    def todo(self, *, repair: bool = False) -> list[int]:
        """Return the numbers of the parts to make: the missing ones, and with `repair` the damaged ones too."""
        return sorted({*self.missing(), *(self.damaged_parts() if repair else ())})

    @contextlib.contextmanager
    def work(self, *, repair: bool = False, shard: Shard = WHOLE) -> Iterator[list[int]]:
        """Yield the numbers of the shard's parts to make, nobody else making them; seal the stage when all are there.

        A damaged part stays where it is until the new one takes its place. Raises OpdctlError (code 5) when another
        process works on one of these parts.
        """
        if self.done() and not repair and not self._work_path.exists():
            yield []
            return
        with contextlib.ExitStack() as locks:
            for index in shard.own(len(self.names)):
                locks.enter_context(locked(self.path.parent, f"{self.path.name}-part-{index:05d}"))
            yield shard.among(self.todo(repair=repair))
            with locked(self.path.parent, self.path.name, wait=True):  # two shards may finish at once
                self.seal()

    def done(self) -> bool:
        return self.manifest() is not None and not self.missing()

    def begin(self, meaning: Mapping[str, Any]) -> None:
        """Record, before the first part, what is being made and what its values mean."""
        self.path.mkdir(parents=True, exist_ok=True)
        sweep(self.path)
        write_json(self._work_path, {**self._header(), "meaning": dict(meaning)})

    def write(self, index: int, save: Callable[[Path], None], *, rows: int, tokens: int) -> None:
        """Write part `index` by `save(temporary path)`."""
        name = self.names[index]
        with _published(self.path / name) as temporary:
            save(temporary)
            part = Part(name, rows, tokens, temporary.stat().st_size, sha256_file(temporary))
            write_json(self._receipt(index), asdict(part))

    def _header(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "fingerprint": self.fingerprint.digest,
            "settings": dict(self.fingerprint.settings),
            "inputs": dict(self.fingerprint.inputs),
        }

    def seal(self) -> bool:
        """Write the manifest if every part is there and it is not written yet. Return whether the stage is finished."""
        if self.missing():
            return False
        if self._work_path.exists():
            # A part that was removed and made again has a receipt that is newer than the manifest.
            receipts = [read_json(r) if (r := self._receipt(i)).exists() else None for i in range(len(self.names))]
            parts = [receipt or asdict(self._recorded(i)) for i, receipt in enumerate(receipts)]
            write_json(self.manifest_path, {**read_json(self._work_path), "parts": parts})
            for index in range(len(self.names)):
                self._receipt(index).unlink(missing_ok=True)
            sweep(self.path)
            self._work_path.unlink()  # last: while it is there, sealing is tried again
        return True

    def sha256(self, index: int) -> str:
        """Return the recorded digest of a finished part."""
        return self._recorded(index).sha256

    def verify(self, index: int, *, digests: bool = True) -> Path:
        """Return the path of a finished part. Raises OpdctlError (code 3) when it is not what was recorded."""
        path, record = self.path / self.names[index], self.record(index)
        hint = f"run `{self.redo} --repair` to make this part again"
        if record is None or not path.exists():
            raise damaged(path, "the part is missing", hint)
        if (size := path.stat().st_size) != record.bytes:
            raise damaged(path, f"{size} bytes, {record.bytes} were written", hint)
        if digests and (digest := sha256_file(path)) != record.sha256:
            raise damaged(path, f"its SHA-256 is {digest[:12]}…, {record.sha256[:12]}… was written", hint)
        return path

    def damaged_parts(self, *, digests: bool = True) -> dict[int, str]:
        """Return what is wrong with each part that the manifest lists."""
        found = {}
        for index in range(len(self.names)) if self.manifest() else ():
            try:
                self.verify(index, digests=digests)
            except OpdctlError as error:
                found[index] = error.message
        return found

    @property
    def digest(self) -> str:
        """The digest of the finished stage: of its parts, not of when or where they were made."""
        manifest = self.manifest()
        if manifest is None:
            raise OpdctlError(f"{self.path}: not finished", hint=f"run `{self.redo}`", code=ExitCode.NO)
        return digest_of([part["sha256"] for part in manifest["parts"]])


# ── Model directories ────────────────────────────────────────────────────────────────────────────────────────────────


def publish_directory(final: Path, fill: Callable[[Path], None]) -> dict[str, str]:
    """Make the directory `final` by `fill(temporary directory)`, whole or not at all; return its files' digests."""
    with _published(final) as temporary:
        temporary.mkdir()
        fill(temporary)
        return directory_digests(temporary)


def directory_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory by its relative name; hidden ones are a file manager's."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(path)): sha256_file(p) for p in files}


def check_directory(
    path: Path, digests: Mapping[str, str], hint: str = "restore it, or start again in another --output"
) -> None:
    """Raise OpdctlError (code 3) unless the files of `path` are those recorded in `digests`."""
    found = directory_digests(path)
    for name in sorted({*found, *digests}):
        if found.get(name) != digests.get(name):
            what = (
                "is missing"
                if name not in found
                else "was not written by this run"
                if name not in digests
                else "was changed"
            )
            raise damaged(path / name, what, hint)


@contextlib.contextmanager
def locked(folder: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock `name` of a run directory. Raises OpdctlError when another process has it, unless told to wait.

    The kernel gives a dead owner's lock back, so a kill leaves none behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise OpdctlError(
            f"{folder}: another process is working on `{name}` here",
            hint="wait for it, or use another --output",
            code=ExitCode.REACH,
        ) from None
    try:
        yield
    finally:
        lock.release()


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Make `path` hold one JSON line a value; a file that holds them already is left alone."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    if not path.exists() or read_text(path) != text:
        write_text(path, text)


def remove(path: Path) -> None:
    """Remove a directory if it is there: renamed first, so that a kill cannot leave half of it under its name."""
    if path.exists():
        grave = _temporary(path)
        path.rename(grave)
        shutil.rmtree(grave)


def sealed_rows(folder: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a finished stage, whatever made it. Raises OpdctlError (code 3) where a part is damaged."""
    if problems := verify_sealed(folder):
        raise OpdctlError(
            "\n".join(problems), hint="run the command that made it again with --repair", code=ExitCode.DATA
        )
    names = [Path(part["name"]).name for part in read_json(folder / "manifest.json")["parts"]]
    return [row for name in names for row in read_rows(folder / name, kind)]


def verify_sealed(folder: Path) -> list[str]:
    """Return what is wrong with the parts that the manifest in `folder` lists, whatever stage made them."""
    found = []
    for part in read_json(folder / "manifest.json")["parts"]:
        path = folder / Path(part["name"]).name  # a name cannot lead out of the folder
        if not path.exists():
            found.append(f"{path}: missing")
        elif sha256_file(path) != part["sha256"]:
            found.append(f"{path}: its SHA-256 is not the one that was written")
    return found
