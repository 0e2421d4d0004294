"""Faults: at every write, rename and flush of the store in turn; a full disk, a read-only one, clocks that jump."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICKSTART, Result, artifacts, invoke, names, sets

from opdctl import claims, status, store
from opdctl.errors import ExitCode
from opdctl.run import recorded_run

TINY = ("rollout.prompts_per_step=4", "rollout.max_tokens=4", "rollout.parts=1", "train.steps=1")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """A claim whose file a power cut has spoilt is waited for during a whole lease."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "LEASE", 0.3)
        patch.setattr(claims, "HEARTBEAT", 0.1)
        yield


def train(output: Path, *overrides: str) -> Result:
    return invoke("train", "--recipe", QUICKSTART, *sets(*TINY, *overrides), "--output", output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run. Tests only read it."""
    path = tmp_path_factory.mktemp("whole") / "run"
    result = train(path)
    assert result.code == 0, result.err
    return path


# ── Every write, rename and fsync ────────────────────────────────────────────────────────────────────────────────────

CALLS = {  # where store.py finds what writes, renames and flushes
    "write_text": Path,
    "write_bytes": Path,
    "write_table": store.pq,
    "save_file": store,
    "open": Path,
    "mkdir": Path,
    "rename": Path,
    "replace": os,
    "fsync": os,
}


class Disk:
    """A disk on which the `at`-th write, rename or fsync that store.py asks for meets its fault.

    It knows what a power cut would leave: of files that were not flushed the half, of renames in folders that were not
    flushed none, if `undo`.
    """

    def __init__(self, run: Path, at: int | None, fault: Callable[["Disk", str, tuple[Any, ...]], None]):
        self.run, self.at, self.count, self._fault = run, at, 0, fault
        self._flushed: set[tuple[int, int]] = set()
        self._renamed: list[tuple[Path, Path]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name, home in CALLS.items():
            patch.setattr(home, name, self._wrapped(name, getattr(home, name)))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            theirs = sys._getframe(1).f_code.co_filename != store.__file__
            if theirs or (name == "open" and arguments[1] == "rb"):
                return call(*arguments, **options)
            if self.count == self.at:
                self.at = None
                self._fault(self, name, arguments)
            self.count += 1
            found = None if name == "fsync" else call(*arguments, **options)  # a real one takes long and tells nothing
            if name == "fsync":
                stat = os.fstat(arguments[0])
                self._flushed.add((stat.st_ino, stat.st_size))
                folder = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                self._renamed = [pair for pair in self._renamed if pair[1].parent != folder]
            elif name in ("replace", "rename"):
                self._renamed.append((Path(arguments[0]), Path(arguments[1])))
            return found

        return wrapped

    def cut(self, undo: bool) -> None:
        """Lose what was not flushed."""
        for old, new in reversed(self._renamed) if undo else ():
            new.rename(old)
        for path in self.run.rglob("*"):
            stat = path.lstat()
            if path.is_file() and (stat.st_ino, stat.st_size) not in self._flushed:
                os.truncate(path, stat.st_size // 2)


def power_cut(disk: Disk, name: str, arguments: tuple[Any, ...]) -> None:
    disk.cut(undo=disk.count % 2 == 0)
    os.kill(os.getpid(), signal.SIGKILL)


def system_error(disk: Disk, name: str, arguments: tuple[Any, ...]) -> None:
    """The call fails; of what was to be written some is there."""
    if name.startswith("write"):
        path = arguments[0] if name != "write_table" else arguments[1]
        Path.open(path, "wb").write(b"half")
    code = errno.ENOSPC if disk.count % 2 else errno.EIO
    raise OSError(code, os.strerror(code))


def train_until(output: Path, at: int | None, fault: Any) -> tuple[int, int]:
    """Train in a forked process on a disk with a fault; return the wait status and how many calls there were."""
    counted, child = output.with_suffix(".calls"), os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(output, at, fault)
            disk.install(patch)
            result = train(output)
        counted.write_text(f"{disk.count}\n{result.err}")
        os._exit(result.code)
    status = os.waitpid(child, 0)[1]
    return status, int(counted.read_text().splitlines()[0]) if os.WIFEXITED(status) else 0


def check_nothing_wrong_is_read(output: Path, whole: Path) -> None:
    """Whatever a reader takes for finished is what the undisturbed run has."""
    if not (output / "run.json").exists():
        return
    found = status.status(recorded_run(output), verify=True)
    assert not [stage for stage in found["stages"] if stage.state == "damaged"]
    for stage in found["stages"]:
        if stage.state == "done" and stage.stage in ("rollout", "teacher"):
            for part in (whole / f"step-{stage.step:05d}/{stage.stage}").glob("part-*"):
                assert (output / part.relative_to(whole)).read_bytes() == part.read_bytes()


@pytest.mark.parametrize("fault", [power_cut, system_error])
def test_after_a_fault_at_any_write_rename_or_flush_a_rerun_ends_the_same(fault, whole, tmp_path):
    code, total = train_until(tmp_path / "counted", None, fault)
    assert code == 0
    assert total > 80
    for at in range(total):
        output = tmp_path / f"run-{at}"
        code, _ = train_until(output, at, fault)
        if fault is power_cut:
            assert os.WTERMSIG(code) == signal.SIGKILL
        else:
            said = output.with_suffix(".calls").read_text()
            assert os.waitstatus_to_exitcode(code) == ExitCode.REACH, said
            assert "disk is full" in said or "cannot be written: Input/output error" in said
            assert not list(output.rglob(".tmp-*"))
        check_nothing_wrong_is_read(output, whole)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            again = train(output)
        assert again.code == 0, (at, again.err)
        assert artifacts(output) == artifacts(whole), at
        assert sorted(names(output)) == sorted(names(whole)), at
        shutil.rmtree(output)
