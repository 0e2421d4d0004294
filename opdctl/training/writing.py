"""What training writes: students, the records of updates, and trainer states. All ranks call every function.

A student is written before the next rollout; the digests of its files, their flush to disk, and then the record of the
update are left to a background thread. So is a trainer state. On a file system that lets writers wait, the student is
held in memory until that thread has copied it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from opdctl import distributed, environment
from opdctl.artifacts import directories, files, leases
from opdctl.artifacts.directories import FileDigest
from opdctl.artifacts.memory_directory import (
    MemoryDirectory,
    make_temporary_directory,
    remove_temporary_directory,
)
from opdctl.artifacts.tensor_files import CreateFile
from opdctl.artifacts.versions import versioned
from opdctl.runs.run import Run
from opdctl.training import checkpoint

HELD_STUDENTS = 2
"""For which memory must be free before one is held: its files, and as much again for the engines that read them."""
WriteFiles = Callable[[Path], Mapping[str, int]]
"""Directory → the bytes of the files that this rank has written to it, by name."""


def write_student(path: Path, write: WriteFiles, *, flush: bool) -> dict[str, int]:
    """Write a student's directory atomically, and return the bytes of this rank's files by name.

    flush: before the directory gets its name. Without it, a student may be read, but is not complete before
    `complete_student`: after a loss of power, files with a name may lack content.
    """
    own: dict[str, int] = {}

    def fill(directory: Path | None) -> None:
        shared, written = _write_together(directory, write)
        own.update(written)
        if flush:
            _complete_others(shared, own)

    if distributed.is_main():
        directories.write_directory(path, fill, flush=flush)
    else:
        fill(None)
    distributed.barrier()
    return own


def complete_student(path: Path, own: Mapping[str, int]) -> dict[str, str]:
    """Flush a student's files to disk, and on rank 0 return the SHA-256 of each by name.

    own: the bytes of this rank's files by name.

    Raises:
        OpdctlError: the disk is full; another process has changed or removed a file.
    """
    _wait_for_files(path, own)
    known = _complete_others(path, own)
    return directories.complete_directory(path, known) if distributed.is_main() else {}


def should_hold_students(path: Path) -> bool:
    """Whether students for the run `path` are better held in memory until they have been copied there.

    So they are if writers to its file system wait, and all ranks are on one machine.
    """
    machines = {*distributed.gather_objects(files.machine_id())}
    return distributed.call_on_main(lambda: len(machines) == 1 and environment.waits_for_storage(path))


def has_room(num_bytes: int) -> bool:
    """Whether memory has room for a student whose weight files have as many bytes."""
    return distributed.call_on_main(lambda: environment.available_memory_bytes() > HELD_STUDENTS * num_bytes)


def hold_student(name: str, write: Callable[[Path, CreateFile], Mapping[str, int]]) -> "HeldStudent":
    """Write a student's directory, called `name`, outside of the run, with its weight files in memory.

    write: as WriteFiles, with what creates a weight file.
    """
    path = distributed.call_on_main(partial(make_temporary_directory, name))
    directory = MemoryDirectory(path)
    own = write(path, directory.create_file)
    distributed.barrier()
    return HeldStudent(directory, own)


class HeldStudent(NamedTuple):
    """A student whose weight files are in the memory of the ranks. own: the bytes of this rank's files by name."""

    directory: MemoryDirectory
    own: Mapping[str, int]

    def copy_to(self, directory: Path) -> Mapping[str, int]:
        """Copy what this rank has written, and return the bytes of its weight files by name."""
        others = self.directory.names_on_disk() if distributed.is_main() else []
        self.directory.copy_files([*others, *self.own], directory)
        return self.own

    def release(self) -> None:
        """Free its memory, and remove its directory."""
        self.directory.close()
        if distributed.is_main():
            remove_temporary_directory(self.directory.path)


def complete_update(
    run: Run, record: Mapping[str, Any], student: Mapping[str, int] | HeldStudent, state: Mapping[str, Tensor] | None
) -> str:
    """Complete the student of an update, then write update.json, which completes the step. On rank 0 return the
    student's digest. Every rank waits until it sees update.json.

    record: what update.json has beside the student's digests. student: what `write_student` or `hold_student` returned.
    state: the trainer state, if it must be complete before the step is.

    Raises:
        OpdctlError: the disk is full; this process was suspended and lost the lease on the run.
    """
    step, path = record["step"], run.student_path(record["step"] + 1)
    leases.check_held(path)
    own = write_student(path, student.copy_to, flush=False) if isinstance(student, HeldStudent) else student
    states = directories.file_states(path) if distributed.is_main() else []  # before the files are read
    digests = complete_student(path, own)
    digest = files.digest_of(digests)
    if state:
        write_trainer_state(run.trainer_path(step + 1), state, lambda: digest)
    if distributed.is_main():
        files.write_json(run.update_path(step), {**versioned("update"), **record, "student": digests})
        files.append_line(run.metrics_path, record["metrics"])
        run.mark_student_checked(step + 1, digest, states)
    distributed.barrier()
    distributed.wait_until_visible(run.update_path(step).exists, f"the update of step {step}")
    return digest


def write_trainer_state(path: Path, state: Mapping[str, Tensor], student: Callable[[], str]) -> None:
    """Write a trainer state with its digests to `path` atomically.

    student: returns, on rank 0, the digest of the student of the same step, or raises what the writing of it raised.
    """
    digest = student()  # on all ranks, before a collective: the group is of no use after a failure

    def fill(directory: Path | None) -> None:
        shared, own = _write_together(directory, partial(checkpoint.save, state=state))
        known = _complete_others(shared, own)
        if directory:
            digests = directories.directory_digests(directory, known)
            record = {**versioned("trainer"), "student": digest, "files": digests}
            files.write_json(directory / directories.DIGESTS_FILE, record)

    if distributed.is_main():
        directories.write_directory(path, fill)
    else:
        fill(None)


def _write_together(directory: Path | None, write: WriteFiles) -> tuple[Path, Mapping[str, int]]:
    """Let every rank write its files to rank 0's `directory`. Return the directory, and the bytes of this rank's files.

    Rank 0 waits until it sees those of all ranks.
    """
    shared = cast(Path, distributed.broadcast_object(directory))
    own = write(shared)
    written = {name: size for of_rank in distributed.gather_objects(own) for name, size in of_rank.items()}
    if distributed.is_main():
        _wait_for_files(shared, written)
    return shared, own


def _wait_for_files(directory: Path, sizes: Mapping[str, int]) -> None:
    if distributed.world_size() > 1:
        distributed.wait_until_visible(
            lambda: all(directories.has_size(directory / name, size) for name, size in sizes.items()),
            f"the files of all ranks in {directory}",
        )


def _complete_others(directory: Path, own: Mapping[str, int]) -> dict[str, FileDigest]:
    """Let every rank but rank 0 flush its files and read them for their digests. Return these digests by name.

    Rank 0 flushes and reads the others: each process those that it has written.
    """
    of_ranks = distributed.gather_objects({} if distributed.is_main() else directories.flush_and_hash(directory, own))
    return {name: digest for of_rank in of_ranks for name, digest in of_rank.items()}
