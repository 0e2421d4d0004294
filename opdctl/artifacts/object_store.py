"""Objects below a URL, by the file systems of fsspec: list, read, send and fetch them.

The store is untrusted: sizes are checked while data arrive, and nothing that a library reports is printed unredacted.
Credentials are found by the libraries, in the environment and in the files of the store's own tools.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import Callback

from opdctl.artifacts import leases, parsing
from opdctl.errors import DISK_FULL_ERRNOS, OpdctlError, summarize_exception

BLOCK_BYTES = 8 * 2**20
"""The largest file that is sent by one request, and the smallest part of a larger one."""
ATTEMPTS = 2
"""Of each transfer, each with the retries of the store's library."""
RETRY_SECONDS = 1.0
"""Before the second attempt."""
PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
"""The extra of opdctl with the file system of a URL's scheme."""
CREDENTIALS_IN_URL = re.compile(r"^[^:/]+://[^@]*:[^@]*@|\?|::")
SECRETS = (
    (re.compile(r"(\w+://)[^/\s@]*@"), r"\1"),
    (re.compile(r"\?[^\s'\")>]*"), "?…"),
    (re.compile(r"(?i)\b([\w-]*(?:key|secret|token|signature|password|credential)[\w-]*['\"]?\s*[=:]\s*)\S+"), r"\1…"),
)
"""Patterns of credentials and signed queries in the texts of libraries, and what replaces each."""
S3_OPTIONS = {"use_listings_cache": False, "default_block_size": BLOCK_BYTES, "max_concurrency": 4}
"""The last two bound the memory that a large file takes: parts, and how many of them are in transfer."""
Result = TypeVar("Result")


class TransferStopped(Exception):  # noqa: N818 - control flow, not an error
    """The command ends: a transfer is given up between two blocks."""


@dataclass(frozen=True)
class StoredFile:
    """A file or an object. identity: a text that changes when its content is replaced. size: bytes."""

    size: int
    identity: str


def is_url(word: str) -> bool:
    """Whether a word of a command line is a URL, not a path."""
    return "://" in word


def redact(text: str) -> str:
    """Return a text without credentials and signed queries."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


class ObjectStore:
    """The objects below a URL, named by their path relative to it.

    Raises:
        OpdctlError: the URL contains credentials, its scheme is unknown, or the package of its file system is missing.
    """

    def __init__(self, url: str):
        scheme = urlsplit(url).scheme
        if CREDENTIALS_IN_URL.search(url):
            raise OpdctlError(
                "invalid_usage",
                f"{scheme}://…: a URL with a password, a query or `::`",
                hint="give only bucket and path; the store's library finds credentials in the environment or its files",
            )
        self.url = url.rstrip("/")
        is_s3 = scheme in ("s3", "s3a")
        self._parts = {"chunksize": BLOCK_BYTES} if is_s3 else {}
        try:
            options = {"skip_instance_cache": True, **(S3_OPTIONS if is_s3 else {})}
            self._system, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = PACKAGES.get(scheme)
            hint = f"pip install 'opdctl[{extra}]'" if extra else "install the package that the message names"
            raise OpdctlError("missing_package", f"{self.url}: {summarize_exception(error)}", hint=hint) from None
        except ValueError as error:
            hint = "use s3://, gs://, az:// or another scheme of fsspec"
            raise OpdctlError("invalid_usage", redact(f"{self.url}: {error}"), hint=hint) from None

    # ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def list(self) -> dict[str, StoredFile]:
        """Return every object by its relative name, whatever the name. One request of S3 lists 1,000."""
        found = self._attempt(lambda: self._system.find(self._root, detail=True))
        prefix = self._root.rstrip("/") + "/"
        return {
            name.removeprefix(prefix): _describe(info)
            for name, info in found.items()
            if name.startswith(prefix) and info.get("type") == "file" and not info.get("islink")
        }

    def read(self, name: str, stored: StoredFile) -> bytes:
        """Return the content of a small object.

        Raises:
            OpdctlError: it is larger than JSON files of a run are, or cannot be read.
        """
        if stored.size > parsing.MAX_JSON_BYTES:
            raise OpdctlError("corrupt_artifact", f"{self.url}/{name}: has {stored.size} bytes")
        data: bytes = self._attempt(lambda: self._system.cat_file(self._path(name)))
        return data

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of an object, which is read."""
        return self._attempt(lambda: self._hash(self._path(name)))

    def _hash(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._system.open(path, "rb", block_size=BLOCK_BYTES) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def fetch(self, name: str, stored: StoredFile, target: Path, on_bytes: Callable[[int], None]) -> None:
        """Write an object to the file `target`.

        Raises:
            OpdctlError: the object has another size than it was listed with, or cannot be read.
        """

        def fetch() -> None:
            with _counted(on_bytes, stored.size, f"{self.url}/{name}") as count:
                self._system.get_file(self._path(name), str(target), callback=_Blocks(count))

        self._attempt(fetch)
        if (size := target.stat().st_size) != stored.size:
            why = f"{self.url}/{name}: {size} bytes arrived, expected {stored.size}"
            raise OpdctlError("failed_download", why, hint="run the same command again")

    # ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def send(
        self, file: Path, name: str, check: Callable[[str], None], on_bytes: Callable[[int], None]
    ) -> tuple[StoredFile, str]:
        """Write a file to an object, which appears or is replaced as a whole. Return the object and its SHA-256.

        check: is called with the SHA-256 before the object appears, and prevents it by an exception.

        Raises:
            FileNotFoundError: the file was removed in the meantime.
            OpdctlError: the store does not hold what was sent, or does not answer.
        """
        with parsing.open_regular(file) as (source, size):

            def send() -> str:
                source.seek(0)
                with _counted(on_bytes, size, str(file)) as count:
                    return self._write(source, size, name, check, count)

            digest = self._attempt(send)
        stored = _describe(self._attempt(lambda: self._system.info(self._path(name))))
        if stored.size != size:
            why = f"{self.url}/{name}: the store holds {stored.size} bytes, {size} were sent"
            raise OpdctlError("failed_upload", why, hint="run the same command again")
        return stored, digest

    def _write(
        self,
        source: BufferedReader,
        size: int,
        name: str,
        check: Callable[[str], None],
        count: Callable[[int], None],
    ) -> str:
        """Write `size` bytes, and return their SHA-256. `check` gets it before the object appears."""
        path = self._path(name)
        if not self._system.async_impl:
            return self._write_beside(source, size, path, check, count)
        if size <= BLOCK_BYTES:
            data = source.read(size)
            digest = hashlib.sha256(data).hexdigest()
            check(digest)
            self._system.pipe_file(path, data)
            count(size)
            return digest
        digest = hashlib.file_digest(source, "sha256").hexdigest()
        check(digest)
        self._system.put_file(source.name, path, callback=_Blocks(count), **self._parts)
        return digest

    def _write_beside(
        self,
        source: BufferedReader,
        size: int,
        path: str,
        check: Callable[[str], None],
        count: Callable[[int], None],
    ) -> str:
        """Write to a file system whose files are not replaced as a whole: under a temporary name, then rename."""
        parent, _, base = path.rpartition("/")
        temporary = f"{parent}/.tmp-{leases.worker_token()}-{base}"
        self._system.makedirs(parent, exist_ok=True)
        try:
            with self._system.open(temporary, "wb") as target:
                digest = _copy(source, target, size, count)
            check(digest)
            self._system.mv(temporary, path)
        finally:
            if self._system.exists(temporary):
                self._system.rm_file(temporary)
        return digest

    # ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _attempt(self, request: Callable[[], Result]) -> Result:
        """Return the result of a request, after up to ATTEMPTS attempts if connections fail."""
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except (OpdctlError, TransferStopped):
                raise
            except Exception as error:  # each library raises its own
                if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                    raise
                translated = self._translate(error)
                if translated.kind != "unavailable_server" or attempt == ATTEMPTS - 1:
                    raise translated from None  # the cause may contain credentials
            time.sleep(RETRY_SECONDS)
        raise AssertionError

    def _translate(self, error: Exception) -> OpdctlError:
        """Return the error of opdctl for one of a store's library."""
        why = f"{self.url}: {redact(summarize_exception(error))}"
        if isinstance(error, FileNotFoundError):
            return OpdctlError("missing_file", why, hint="create the bucket, or correct the URL")
        if isinstance(error, PermissionError) or re.search("Credential|Auth", type(error).__name__):
            hint = (
                "check the credentials of the store, such as AWS_PROFILE or ~/.aws/credentials, and their permissions"
            )
            return OpdctlError("missing_token", why, hint=hint)
        hint = "check the network and the endpoint, such as AWS_ENDPOINT_URL; run the same command again to resume"
        return OpdctlError("unavailable_server", why, hint=hint)


def _describe(info: dict[str, Any]) -> StoredFile:
    """Return size and identity of an object: its entity tag or, in file systems without one, its times."""
    tag = info.get("ETag") or info.get("etag") or info.get("generation")
    times = [info.get(name) for name in ("ino", "mtime", "last_modified")]
    if created := info.get("created"):
        times.append(created.timestamp() if hasattr(created, "timestamp") else created)
    return StoredFile(int(info.get("size") or 0), str(tag or times))


class _Blocks(Callback):
    """Reports bytes that arrive to a function, which may raise."""

    def __init__(self, count: Callable[[int], None]):
        super().__init__()
        self._count = count

    def relative_update(self, inc: int = 1) -> None:
        self._count(inc)


@contextlib.contextmanager
def _counted(on_bytes: Callable[[int], None], size: int, name: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts bytes. What a failed attempt has counted is taken back.

    Raises:
        OpdctlError: there are more than `size`.
    """
    total = 0

    def count(number: int) -> None:
        nonlocal total
        total += number
        if total > size:
            raise OpdctlError("failed_download", f"{name}: more than the {size} bytes that were listed")
        on_bytes(number)

    try:
        yield count
    except Exception:
        on_bytes(-min(total, size))
        raise


def _copy(source: BufferedReader, target: Any, size: int, count: Callable[[int], None]) -> str:
    """Copy `size` bytes, or those that there are, and return their SHA-256."""
    digest, left = hashlib.sha256(), size
    while block := source.read(min(BLOCK_BYTES, left)):
        target.write(block)
        digest.update(block)
        left -= len(block)
        count(len(block))
    return digest.hexdigest()
