"""The one error that opdctl raises on purpose, its exit codes, and the nearest-name hint."""

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit status says."""

    DONE = 0
    NO = 1
    """It ran, but the answer is no."""
    USAGE = 2
    """Wrong usage or recipe."""
    DATA = 3
    """Damaged or bad data."""
    SETTINGS = 4
    """The run directory was made under other settings."""
    REACH = 5
    """Something needed is out of reach: a model hub, a server, disk space."""
    REQUEUE = 75
    """Stopped by SIGTERM or SIGUSR1: run the same command again."""
    INTERRUPTED = 130


class OpdctlError(Exception):
    """An error the user can act on.

    message: what is wrong, where (file, key, row) and why. hint: what to do about it. code: the exit status.
    """

    def __init__(self, message: str, *, hint: str | None = None, code: ExitCode = ExitCode.USAGE):
        super().__init__(message)
        self.message, self.hint, self.code = message, hint, code


DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
WRITE_ERRNOS = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE)
"""The system's words for a disk that is full, and for one that takes nothing."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: the GPU's or the CPU's, by torch's words, which have no class in common."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


MAX_SUGGESTIONS = 10  # names that a message lists at most


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the name nearest to `name`, else the names there are, else nothing."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    shown = ", ".join(f"`{n}`" for n in names[:MAX_SUGGESTIONS]) + (", …" if len(names) > MAX_SUGGESTIONS else "")
    return f"; there are {shown}" if names else ""
