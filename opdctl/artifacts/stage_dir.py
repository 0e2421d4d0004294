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
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opdctl import SCHEMA_VERSION, claims, manifests
from opdctl.config import changed, describe_changes
from opdctl.errors import FULL, UNWRITABLE, ExitCode, OpdctlError
from opdctl.manifests import Manifest, PartRecord, ScoresRecord, Sealed, Work
from opdctl.records import GRADED, PROMPTS, RESPONSES, Graded, Prompt, Response, Scores, offsets_of

BEGUN = ("work.json", "manifest.json")  # a stage whose folder holds one of them was begun
HIDDEN = "hidden_states"
SCORE_COLUMNS = tuple(column.name for column in fields(Scores))
SCORE_KINDS = {"offsets": ("I64", 1), "top_ids": ("I32", 2), "logprobs": ("F32", 1), "entropies": ("F32", 1)}
SCORE_KINDS |= dict.fromkeys(("top_logprobs", "student_top_logprobs", HIDDEN), ("F32", 2))
"""Type and number of dimensions of each tensor of a score part."""

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
    except OSError as error:  # some network file systems cannot do it with folders, and need it not
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    """Make a folder, and those above it, and have their names on the disk."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _fsync(path.parent)


def _temporary(final: Path, kind: str = "") -> Path:
    return final.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{kind}{final.name}")


def _discard(path: Path) -> None:
    """Remove whatever is at `path`; not what a link there leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, *, everyones: bool = False) -> None:
    """Remove what dead processes of this machine left half-written in `folder`; `everyones`: what any process left, for
    whoever is alone at work there."""
    for left in folder.glob(".tmp-*" if everyones else f".tmp-{socket.gethostname()}-*"):
        pid = left.name.removeprefix(f".tmp-{socket.gethostname()}-").partition("-")[0]
        if everyones or (pid.isdigit() and pid != str(os.getpid()) and not Path("/proc", pid).exists()):
            _discard(left)


@contextlib.contextmanager
def _published(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; when the block ends well, flush it to disk and rename it to `final`."""
    temporary = _temporary(final)
    with _explained(final):
        try:
            _make_folder(final.parent)
            _discard(temporary)  # of a dead process of our own number: in containers all have the same
            yield temporary
            for path in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
                _fsync(path)
            if final.is_dir():
                remove(final)  # a directory cannot be renamed over another one
            os.replace(temporary, final)
            _fsync(final.parent)
        finally:
            _discard(temporary)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say of `path` what the system says when it cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(path) from error
        if error.errno in UNWRITABLE:
            raise OpdctlError(f"{path}: cannot be written: {error.strerror}", code=ExitCode.REACH) from error
        raise
    except SafetensorError as error:  # wraps the system's error in its text
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise _disk_full(path) from error


def _disk_full(path: Path) -> OpdctlError:
    return OpdctlError(
        f"{path}: the disk is full: it takes more than the {readable(free_space(path))} that are free",
        hint="free some space and run the same command again: finished parts are kept. What a run takes in all is said "
        "by --dry-run",
        code=ExitCode.REACH,
    )


def free_space(path: Path) -> int:
    """Return the bytes that are free where `path` is, or will be."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise OpdctlError (code 5) unless `needed` bytes are free where `path` is."""
    if (free := free_space(path)) < needed:
        raise OpdctlError(
            f"{path}: {what} needs {readable(needed)} of disk space, {readable(free)} are free",
            hint="free some space and run the same command again, or use another --output",
            code=ExitCode.REACH,
        )


def readable(count: int) -> str:
    """Return a number of bytes for a person, in powers of 1024."""
    name, size = unit(count)
    return f"{count} B" if name == "B" else f"{count / size:.1f} {name}"


def unit(count: int) -> tuple[str, int]:
    """Return the unit that leaves the fewest digits before the point, and the bytes that it stands for."""
    name, size = "B", 1
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count >= 1024 * size:
            name, size = larger, 1024 * size
    return name, size


def write_text(path: Path, text: str) -> None:
    """Write a whole small file, or leave the old one."""
    with _published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    with _published(path) as temporary:
        temporary.write_bytes(data)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, with a digest of itself."""
    write_text(path, json.dumps({**value, "digest": digest_of(value)}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: Any = dict[str, Any], hint: str | None = None) -> Any:
    """Return the JSON object in `path`, of the form `kind`.

    Raises OpdctlError (code 3) when it is not what was written, or was by another version; `hint` is what to do then.
    """
    refuse_links(path)
    try:
        value = manifests.parse(path.read_bytes())
        written = value.pop("digest", None)
        _refuse_another_version(path, value.get("schema_version", SCHEMA_VERSION))
        if written != digest_of(value):
            raise ValueError("its content is not that of its digest")
        return manifests.check(value, kind)
    except (OSError, ValueError) as error:
        hint = hint or "restore it from a copy, or start again in another --output"
        raise damaged(path, str(error), hint) from error


def _refuse_another_version(path: Path, version: object) -> None:
    if version != SCHEMA_VERSION:
        raise OpdctlError(
            f"{path}: schema version {version!r}, this opdctl reads version {SCHEMA_VERSION}",
            hint="go on with the opdctl that wrote it, or start again in another --output",
            code=ExitCode.DATA,
        )


def refuse_links(*paths: Path) -> None:
    """Raise OpdctlError (code 3) where one of the paths is a symbolic link: it may lead out of the run directory."""
    for path in paths:
        if path.is_symlink():
            raise damaged(path, "a symbolic link, and none is followed", "put what it leads to in its place")


def damaged(path: Path, why: str, hint: str | None = None) -> OpdctlError:
    """Return the error for an artifact that is not what was written."""
    hint = hint or f"remove {path} and run the command that made it again"
    return OpdctlError(f"{path}: damaged: {why}", hint=hint, code=ExitCode.DATA)


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_SCHEMAS: dict[type, pa.Schema] = {Prompt: PROMPTS, Response: RESPONSES, Graded: GRADED}
OPTIONAL = ("answer", "teacher_prompt_ids", "entropies", "top_ids", "top_logprobs", "extracted", "vote")


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
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(_SCHEMAS[kind]):
                raise ValueError(f"has columns {file.schema_arrow.names}, wanted {_SCHEMAS[kind].names}")
            table = file.read()
        table.validate(full=True)
        columns = {name: _column(name, table[name]) for name in table.schema.names}
        if kind is Response:
            lengths = [len(ids) for ids in columns["response_ids"]]
            columns |= {name: _by_token(columns[name], lengths) for name in ("top_ids", "top_logprobs")}
    except (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
        raise damaged(path, str(error)) from error
    return [kind(**{name: values[i] for name, values in columns.items()}) for i in range(table.num_rows)]


def _column(name: str, column: pa.ChunkedArray) -> list[Any]:
    if column.null_count and name not in OPTIONAL:
        raise ValueError(f"column {name} has {column.null_count} nulls")
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    if any(chunk.flatten().null_count for chunk in column.chunks):
        raise ValueError(f"column {name} has nulls within")
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
            meaning = manifests.check(json.loads((file.metadata() or {})["opdctl"]), ScoresRecord)
            ids, scored = meaning["sample_ids"], meaning["rollout"]
            lengths = _check_shapes(file)
            names, offsets = set(file.keys()), file.get_tensor("offsets")
            columns = {name: file.get_tensor(name) for name in names - {"offsets", HIDDEN}}
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    if scored != rollout_sha256:
        raise damaged(path, "it scores other responses than those beside it")
    fits = len(offsets) == len(ids) + 1 and offsets[0] == 0 and "logprobs" in columns and lengths == {offsets[-1]}
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


def _check_shapes(file: safe_open) -> set[int]:
    """Return the numbers of tokens that the columns have. Raises ValueError for a column of another kind."""
    lengths = set()
    for name in file.keys():  # noqa: SIM118 - it is no dictionary
        column = file.get_slice(name)
        shape, kind = column.get_shape(), (column.get_dtype(), len(column.get_shape()))
        if name not in SCORE_KINDS or kind != SCORE_KINDS[name]:
            raise ValueError(f"a tensor `{name}` of type {kind[0]} and shape {shape}")
        lengths |= {shape[0]} if name != "offsets" else set()
    return lengths


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
        self._work_path, self.manifest_path = (path / name for name in BEGUN)
        self._claim: claims.Claim | None = None
        refuse_links(path.parent, path)
        self._refuse_another_fingerprint()

    def _begun(self) -> dict[str, Any] | None:
        """Return what is recorded of the stage, finished or begun, or None."""
        found: Any = self.manifest() or self._read(self._work_path, Work)
        return found

    def _refuse_another_fingerprint(self) -> None:
        recorded = self._begun()
        if recorded is None:
            return
        if recorded["fingerprint"] == self.fingerprint.digest:
            if "parts" in recorded and [part["name"] for part in recorded["parts"]] != self.names:
                raise damaged(self.manifest_path, "lists other parts", f"remove {self.path} to make it again")
            return
        changes = changed(recorded["settings"], self.fingerprint.settings)
        inputs = [name for name, _, _ in changed(recorded["inputs"], self.fingerprint.inputs)]
        what = describe_changes(changes) or f"its inputs changed: {', '.join(inputs)}"
        raise OpdctlError(
            f"{self.path}: was made under other settings\n{what}",
            hint=f"put the old value back; or use another --output; or remove {self.path} to make it again",
            code=ExitCode.SETTINGS,
        )

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None while the stage is unfinished."""
        found: Manifest | None = self._read(self.manifest_path, Manifest)
        return found

    def _read(self, path: Path, kind: Any) -> Any:
        """Return what a JSON file says, or None where there is none, or none any more: another may be sealing."""
        try:
            hint = f"remove {path} and run `{self.redo}`: what it tells of is made again"
            return read_json(path, kind, hint) if path.exists() else None
        except OpdctlError:
            if path.exists():
                raise
            return None

    def record(self, index: int) -> Part | None:
        """Return what was recorded of part `index`, by its receipt or by the manifest."""
        if receipt := self._read(self._receipt(index), PartRecord):
            return Part(**receipt)
        return self._recorded(index) if self.manifest() else None

    def _recorded(self, index: int) -> Part:
        manifest = self.manifest()
        for part in manifest["parts"] if manifest else ():
            if part["name"] == self.names[index]:
                return Part(**part)
        raise damaged(self.manifest_path, f"does not list {self.names[index]}", f"remove {self.path} to make it again")

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
        return self.manifest() is None and not self._taken_over(index, digests=digests)

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
    def work(self, *, repair: bool = False, shard: Shard = WHOLE, wait: bool = False) -> Iterator[Iterator[int] | None]:
        """Yield the shard's parts to make, each claimed for as long as the caller is at it, or None where there is
        none to make; then seal the stage if all parts are there.

        A damaged part stays where it is until the new one takes its place. Parts that others have claimed are left to
        them as soon as they show life, and taken over if they do not; with `wait` the shard's parts are all there at
        the end, whoever made them.
        """
        folder, name = self.path.parent, self.path.name
        if self.done() and not repair and not self._work_path.exists():
            yield None
        else:
            wanted = shard.among(self.todo(repair=repair))
            with contextlib.closing(self._claim_each(wanted, repair=repair, wait=wait)) as parts:
                first = next(parts, None)
                yield None if first is None else itertools.chain([first], parts)
            if not self.missing(digests=False):
                with claims.claimed(folder, name, wait=True):  # two workers may finish at once
                    self.seal()
        claims.sweep(folder, name)

    def _claim_each(self, wanted: Iterable[int], *, repair: bool, wait: bool) -> Generator[int]:
        left = {index: claims.Claim(self.path.parent, f"{self.path.name}-part-{index:05d}") for index in wanted}
        pause = claims.pauses()
        while left:
            for index, claim in list(left.items()):
                if claim.take():
                    del left[index]
                    self._claim, pause = claim, claims.pauses()
                    try:
                        if self._is_wanted(index, repair=repair):  # its owner may just have finished it
                            yield index
                    finally:
                        self._claim = None
                        claim.give_back()
                elif not wait and claim.shows_life():
                    del left[index]
            if left:
                time.sleep(next(pause))

    def _is_wanted(self, index: int, *, repair: bool) -> bool:
        return self._is_missing(index) or (repair and self._damage(index) is not None)

    def lost(self) -> list[Path]:
        """Return the finished parts that are not there any more."""
        return [self.path / name for name in self.names if not (self.path / name).exists()] if self.manifest() else []

    def done(self) -> bool:
        return self.manifest() is not None and not self.missing()

    def begin(self, meaning: Mapping[str, Any]) -> None:
        """Record, before the first part, what is being made and what its values mean."""
        with _explained(self.path):
            _make_folder(self.path)
        sweep(self.path)
        write_json(self._work_path, {**self._header(), "meaning": dict(meaning)})

    def write(self, index: int, save: Callable[[Path], None], *, rows: int, tokens: int) -> bool:
        """Write part `index` by `save(temporary path)`. Return whether it counts: it is dropped where the claim to it
        was lost, or where the stage was begun anew under other settings."""
        name = self.names[index]
        try:
            with _published(self.path / name) as temporary:
                save(temporary)
                part = Part(name, rows, tokens, temporary.stat().st_size, sha256_file(temporary))
                _fsync(temporary)  # may take its time, so before the claim is looked at
                self._check_claim()
                write_json(self._receipt(index), asdict(part))
                self._check_claim()
        except claims.LostClaim:
            return False
        return True

    def _check_claim(self) -> None:
        begun = self._begun()
        is_own = begun is not None and begun["fingerprint"] == self.fingerprint.digest
        if self._claim is not None and not (is_own and self._claim.held()):
            raise claims.LostClaim

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
        # A part that was removed and made again has a receipt that is newer than the manifest.
        receipts = [self._read(self._receipt(index), PartRecord) for index in range(len(self.names))]
        if self._work_path.exists() or any(receipts):
            header: Work = self._read(self._work_path, Work) or self._read(self.manifest_path, Manifest)
            parts = [receipt or asdict(self._recorded(i)) for i, receipt in enumerate(receipts)]
            write_json(self.manifest_path, {**header, "parts": parts})
            for index in range(len(self.names)):
                self._receipt(index).unlink(missing_ok=True)
            sweep(self.path)
            self._work_path.unlink(missing_ok=True)  # last: while it is there, sealing is tried again
        return True

    def sha256(self, index: int) -> str:
        """Return the recorded digest of a finished part."""
        return (self.record(index) or self._recorded(index)).sha256

    def verify(self, index: int, *, digests: bool = True) -> Path:
        """Return the path of a finished part. Raises OpdctlError (code 3) when it is not what was recorded."""
        path, record = self.path / self.names[index], self.record(index)
        hint = f"run `{self.redo} --repair` to make this part again"
        refuse_links(path)
        if record is None or not path.exists():
            raise damaged(path, "the part is missing", hint)
        if (size := path.stat().st_size) != record.bytes:
            raise damaged(path, f"{size} bytes, {record.bytes} were written", hint)
        if digests and (digest := sha256_file(path)) != record.sha256:
            raise damaged(path, f"its SHA-256 is {digest[:12]}…, {record.sha256[:12]}… was written", hint)
        return path

    def damaged_parts(self, *, digests: bool = True) -> dict[int, str]:
        """Return what is wrong with each part that the manifest lists."""
        indices = range(len(self.names)) if self.manifest() else ()
        return {index: what for index in indices if (what := self._damage(index, digests=digests))}

    def _damage(self, index: int, *, digests: bool = True) -> str | None:
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
            raise OpdctlError(f"{self.path}: not finished", hint=f"run `{self.redo}`", code=ExitCode.NO)
        return digest_of([part["sha256"] for part in manifest["parts"]])


# ── Model directories ────────────────────────────────────────────────────────────────────────────────────────────────


def publish(final: Path, fill: Callable[[Path], None]) -> None:
    """Make the directory `final` by `fill(temporary directory)`, whole or not at all."""
    with _published(final) as temporary:
        temporary.mkdir()
        fill(temporary)


def publish_directory(final: Path, fill: Callable[[Path], None]) -> dict[str, str]:
    """Make a directory as `publish` does, and return its files' digests."""
    digests = {}

    def fill_and_digest(folder: Path) -> None:
        fill(folder)
        digests.update(directory_digests(folder))

    publish(final, fill_and_digest)
    return digests


def share(paths: Iterable[Path], old: Path, new: Path) -> int:
    """Let the folder `new` have files and folders of `old`, and return how many files: the same ones where the file
    system can link them, else copies. Every artifact is replaced when it changes, never written into; but
    the lines of metrics.jsonl are appended, so that it is copied."""
    found = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    for file in files:
        target = new / file.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix == ".jsonl":
                shutil.copyfile(file, target)
            else:
                os.link(file, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, target)
    return len(files)


def directory_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory by its relative name; hidden ones are a file manager's."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(path)): sha256_file(p) for p in files}


def check_directory(
    path: Path, digests: Mapping[str, str], hint: str = "restore it, or start again in another --output"
) -> None:
    """Raise OpdctlError (code 3) unless the files of `path` are those in `digests`; none are where it is not there."""
    refuse_links(path.parent, path, *path.rglob("*"))
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


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this digest."""
    return path.is_file() and not path.is_symlink() and sha256_file(path) == sha256


def copy(path: Path, folder: Path) -> None:
    """Put a copy of a file into a folder, in the place of one of its name."""
    shutil.copyfile(path, folder / path.name)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    with _explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Make `path` hold one JSON line a value; a file that holds them already is left alone."""
    text = "".join(json.dumps(value) + "\n" for value in values)
    if not path.exists() or read_text(path) != text:
        write_text(path, text)


def remove(path: Path) -> None:
    """Remove a directory if it is there: renamed first, so that a kill cannot leave half of it under its name."""
    if path.exists():
        with _explained(path):
            grave = _temporary(path, "old-")
            _discard(grave)
            path.rename(grave)
            _discard(grave)


def sealed_rows(folder: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a finished stage, whatever made it. Raises OpdctlError (code 3) where a part is damaged."""
    if problems := verify_sealed(folder):
        raise OpdctlError(
            "\n".join(problems), hint="run the command that made it again with --repair", code=ExitCode.DATA
        )
    names = [part["name"] for part in read_json(folder / "manifest.json", Sealed)["parts"]]
    return [row for name in names for row in read_rows(folder / name, kind)]


def verify_sealed(folder: Path) -> list[str]:
    """Return what is wrong with the parts that the manifest in `folder` lists, whatever stage made them."""
    found = []
    for part in read_json(folder / "manifest.json", Sealed)["parts"]:
        path = folder / part["name"]
        refuse_links(folder, path)
        if not path.exists():
            found.append(f"{path}: missing")
        elif sha256_file(path) != part["sha256"]:
            found.append(f"{path}: its SHA-256 is not the one that was written")
    return found
