"""The one error class that opdctl raises on purpose, its kinds and exit codes, and the nearest-name suggestion."""

import difflib
import errno
import shlex
from collections.abc import Iterable
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

ErrorKind = Literal[
    "checksum_mismatch",
    "code_execution_disabled",
    "collapsed_training",
    "corrupt_artifact",
    "different_problems",
    "disk_full",
    "expired_wait",
    "failed_download",
    "failed_engine",
    "failed_environment",
    "failed_rank",
    "failed_upload",
    "failed_write",
    "immutable_setting",
    "incompatible_tokenizer",
    "incomplete_launch",
    "invalid_data",
    "invalid_model",
    "invalid_plugin",
    "invalid_recipe",
    "invalid_usage",
    "lease_held",
    "logprob_mismatch",
    "lost_lease",
    "malformed_response",
    "missing_checkpoint",
    "missing_device",
    "missing_evaluation",
    "missing_file",
    "missing_input",
    "missing_model",
    "missing_package",
    "missing_peer",
    "missing_run",
    "missing_sandbox",
    "missing_token",
    "model_mismatch",
    "nonfinite_value",
    "out_of_memory",
    "recipe_mismatch",
    "rejected_request",
    "settings_mismatch",
    "source_mismatch",
    "stale_rollout",
    "unavailable_cluster",
    "unavailable_server",
    "unknown_name",
    "unsupported_model",
    "unsupported_setting",
    "unsupported_version",
    "untrusted_code",
    "unusable_output",
    "version_mismatch",
]
"""What went wrong, as a noun phrase. The message begins with it: `checksum_mismatch` reads "Checksum mismatch: …"."""


class ExitCode(IntEnum):
    """The exit status of a command."""

    DONE = 0
    FAILED = 1
    """The command ran; the result is negative: an input is unfinished, or training collapsed."""
    USAGE = 2
    """Invalid usage or recipe."""
    BAD_DATA = 3
    """Corrupt or invalid data."""
    RECIPE_MISMATCH = 4
    """The run directory was made with different settings or models."""
    UNAVAILABLE = 5
    """A resource is out of reach: a model hub, a server, memory, disk space, a lease."""
    REQUEUE = 75
    """Stopped by SIGTERM or SIGUSR1: run the same command again."""
    INTERRUPTED = 130


EXIT_CODES: dict[str, ExitCode] = dict.fromkeys(get_args(ErrorKind), ExitCode.USAGE) | {
    "checksum_mismatch": ExitCode.BAD_DATA,
    "collapsed_training": ExitCode.FAILED,
    "corrupt_artifact": ExitCode.BAD_DATA,
    "different_problems": ExitCode.RECIPE_MISMATCH,
    "disk_full": ExitCode.UNAVAILABLE,
    "expired_wait": ExitCode.UNAVAILABLE,
    "failed_download": ExitCode.UNAVAILABLE,
    "failed_engine": ExitCode.UNAVAILABLE,
    "failed_environment": ExitCode.UNAVAILABLE,
    "failed_rank": ExitCode.UNAVAILABLE,
    "failed_upload": ExitCode.UNAVAILABLE,
    "failed_write": ExitCode.UNAVAILABLE,
    "invalid_data": ExitCode.BAD_DATA,
    "invalid_model": ExitCode.BAD_DATA,
    "lease_held": ExitCode.UNAVAILABLE,
    "logprob_mismatch": ExitCode.BAD_DATA,
    "lost_lease": ExitCode.UNAVAILABLE,
    "malformed_response": ExitCode.BAD_DATA,
    "missing_input": ExitCode.FAILED,
    "missing_peer": ExitCode.UNAVAILABLE,
    "missing_sandbox": ExitCode.UNAVAILABLE,
    "missing_token": ExitCode.UNAVAILABLE,
    "model_mismatch": ExitCode.RECIPE_MISMATCH,
    "nonfinite_value": ExitCode.BAD_DATA,
    "out_of_memory": ExitCode.UNAVAILABLE,
    "recipe_mismatch": ExitCode.RECIPE_MISMATCH,
    "settings_mismatch": ExitCode.RECIPE_MISMATCH,
    "source_mismatch": ExitCode.RECIPE_MISMATCH,
    "stale_rollout": ExitCode.RECIPE_MISMATCH,
    "unavailable_cluster": ExitCode.UNAVAILABLE,
    "unavailable_server": ExitCode.UNAVAILABLE,
    "unsupported_version": ExitCode.BAD_DATA,
}
"""The exit code of each kind; invalid usage unless listed."""


class OpdctlError(Exception):
    """An error that the user can act on.

    kind: what went wrong; it decides the exit code and the first words of the message. detail: where (file, key, row)
    and why. hint: what to do, in the imperative.

        OpdctlError("missing_file", "prompts.jsonl", hint="check prompts.source")
        # error: Missing file: prompts.jsonl
        # hint: check prompts.source
    """

    def __init__(self, kind: ErrorKind, detail: str, *, hint: str | None = None):
        self.kind, self.detail, self.hint = kind, detail, hint
        super().__init__(self.message)

    def __reduce__(self) -> Any:  # an engine's process passes its errors on
        return partial(OpdctlError, hint=self.hint), (self.kind, self.detail), vars(self)

    @property
    def message(self) -> str:
        return f"{self.kind.replace('_', ' ').capitalize()}: {self.detail}"

    @property
    def code(self) -> ExitCode:
        return EXIT_CODES[self.kind]


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
WRITE_ERRNOS = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE)
"""System error numbers of a path that cannot be written."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is an out-of-memory error of the CPU or a GPU. torch has no common class, so match the text."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def is_panic(error: BaseException) -> bool:
    """Whether the error is that of a library in Rust, such as tokenizers, which is no Exception."""
    return type(error).__name__ == "PanicException"


def summarize_exception(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


MAX_SUGGESTIONS = 10


def did_you_mean(name: str, names: Iterable[str], folder: Path | None = None) -> str:
    """Return "; did you mean `x`?" for the name nearest to `name`, else a list of the known names, else "".

    folder: that of files with these names. They are then shown as paths that a shell accepts.
    """

    def show(known_name: str) -> str:
        return known_name if folder is None else shlex.quote(str(folder / known_name))

    known = sorted(names)
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"; did you mean `{show(near[0])}`?"
    listed = ", ".join(f"`{show(n)}`" for n in known[:MAX_SUGGESTIONS]) + (
        ", …" if len(known) > MAX_SUGGESTIONS else ""
    )
    return f"; known: {listed}" if known else ""
