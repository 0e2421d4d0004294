"""The fault harness: the quickstart under faults, compared with an undisturbed run.

    PYTHONPATH=tests python -m helpers.faults                       # 100 kills
    PYTHONPATH=tests python -m helpers.faults --kills 1000 --seed 1
    PYTHONPATH=tests python -m helpers.faults --signals 100 --steps 4
    PYTHONPATH=tests python -m helpers.faults --files --kills 20    # workers of score-teacher --input
    PYTHONPATH=tests python -m helpers.faults --calls    # a fault at every write, rename and flush, one at a time

Kills: in every step, three workers sample, score and update. At random moments a random one is killed with SIGKILL and
another one is started. At the end the student, every part and every trainer state must be bit-identical to those of an
undisturbed run, every response must exist exactly once, and no other file may remain.

Files: three workers of `opdctl score-teacher --input` score responses into one directory, and are killed in this way.
A complete one is followed by another, until all kills have happened. All bytes must be those of an undisturbed one.

Signals: `opdctl train` gets two random ones of SIGTERM, SIGUSR1 and Ctrl-C, the first at a random moment of its run and
the second soon after it. It must end with the exit code of one of them, and the next process goes on.

Calls: a small run is trained on a disk that fails at the n-th call of opdctl.artifacts that writes, renames or flushes,
for every n: once by a power cut that loses what was not flushed, once by a system error. What is read afterwards must
be correct, and the same command must end as without the fault.
"""

import argparse
import atexit
import errno
import faulthandler
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import forks
from helpers.commands import QUICKSTART, Result, artifacts, invoke, names, sets

import opdctl.__main__
import opdctl.engines.transformers
import opdctl.pipeline.loop
from opdctl import signals
from opdctl.artifacts import directories, files, leases, stage_dir, tables, tensor_files
from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows
from opdctl.errors import ExitCode
from opdctl.runs import status
from opdctl.runs.run import Run

# ── Kills ────────────────────────────────────────────────────────────────────────────────────────────────────────────

WORKERS = 3
STAGES = ("rollout", "score-teacher", "train --no-fill")
EXPECTED_CODES = {"rollout": (0,), "score-teacher": (0,), "train --no-fill": (0, 1, 5)}  # only one worker trains
FIRST_SPAN_SECONDS = 1.0  # assumed duration of a stage before the first one


@dataclass
class Chain:
    """A run made by forked workers, of which `kills` are killed; with 0 kills there is one worker for each stage."""

    path: Path
    settings: tuple[str, ...]
    kills: int
    rng: random.Random
    killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    _spans: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, FIRST_SPAN_SECONDS))

    def run(self, steps: int) -> int:
        """Make steps until there are `steps` and all kills have happened; return the number of steps."""
        done = 0
        while done < steps or sum(self.killed.values()) < self.kills:
            for stage in STAGES:
                left = max((steps - done) * len(STAGES) - STAGES.index(stage), 1)
                quota = -(-(self.kills - sum(self.killed.values())) // left)
                while not self._is_done(stage, done):
                    quota -= self._attempt(stage, done, max(quota, 0))
            done += 1
        return done

    def _is_done(self, stage: str, step: int) -> bool:
        if not (self.path / "run.json").exists():
            return False
        run = Run.load(self.path)
        if stage == "train --no-fill":
            return run.update_path(step).exists() and run.trainer_path(step + 1).is_dir()
        return run.rollout_stage(step).is_finished() if stage == "rollout" else run.is_scored(step)

    def _attempt(self, stage: str, step: int, kills: int) -> int:
        """Let workers make a stage, kill some of them, and return the number of kills."""
        start, killed = time.monotonic(), 0
        workers = [self._worker(stage) for _ in range(WORKERS if self.kills else 1)]
        while workers:
            if killed < kills and not self._is_done(stage, step):
                delay = self.rng.uniform(0, self._spans[stage])
                time.sleep(delay)
            workers = [pid for pid in workers if not self._has_ended(pid, stage)]
            if time.monotonic() > start + forks.MAX_WAIT_SECONDS:
                for pid in workers:
                    forks.abort(pid)
                raise AssertionError(f"step {step}, {stage}: {len(workers)} workers did not end")
            if workers and killed < kills:
                victim = self.rng.choice(workers)
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                workers.remove(victim)
                workers.append(self._worker(stage))
                killed += 1
                self.killed[stage] += 1
                print(f"kill {sum(self.killed.values())}: step {step}, {stage}", file=sys.stderr)
            time.sleep(0.01)
        if not killed:
            self._spans[stage] = time.monotonic() - start
        return killed

    def _worker(self, stage: str) -> int:
        """Start a worker of a stage, and return its process id."""
        options = [word for setting in self.settings for word in ("--set", setting)]
        begin = [] if (self.path / "run.json").exists() else ["--recipe", QUICKSTART, *options]

        def work() -> int:
            result = invoke(*stage.split(), "--output", self.path, *begin)
            if result.code not in EXPECTED_CODES[stage]:
                print(result.err, file=sys.stderr)
            return result.code

        return forks.fork(work)

    def _has_ended(self, pid: int, stage: str) -> bool:
        code = forks.exit_code(pid)
        if code not in (None, *EXPECTED_CODES[stage]):
            raise AssertionError(f"{stage}: a worker ended with {code}")
        return code is not None


def made(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in artifacts(run).items() if not name.endswith(".lock")}


def run_files(run: Path) -> list[str]:
    """Return all names but those of leases: that of the last killed owner may remain, and does no harm."""
    return sorted(name for name in names(run) if not name.endswith(".lock"))


def check_every_response_exists_once(run: Run, steps: int) -> int:
    """Return the number of responses."""
    count = 0
    for step in range(steps):
        stage = run.rollout_stage(step)
        found = [row.sample_id for index in range(len(stage.names)) for row in read_rows(stage.verify(index), Response)]
        assert found == [name for name, _ in run.samples(step)], f"step {step}"
        count += len(found)
    return count


def kill(folder: Path, kills: int, seed: int, steps: int, settings: tuple[str, ...] = ()) -> str:
    """Compare a chain under `kills` with an undisturbed one of as many steps, and return a summary as text."""
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    leases.LEASE_SECONDS, leases.HEARTBEAT_SECONDS = 5.0, 0.2  # workers soon see that another one trains
    settings = ("rollout.num_parts=6", "eval.every_steps=0", "pipeline.threads=1", *settings)
    disturbed = Chain(folder / "disturbed", settings, kills, random.Random(seed))
    done = disturbed.run(steps)
    Chain(folder / "undisturbed", settings, 0, random.Random(seed)).run(done)
    found, expected = (made(folder / name) for name in ("disturbed", "undisturbed"))
    assert {*run_files(folder / "disturbed")} ^ {*run_files(folder / "undisturbed")} == set()
    assert [name for name, data in found.items() if data != expected[name]] == []
    responses = check_every_response_exists_once(Run.load(folder / "disturbed"), done)
    assert invoke("status", folder / "disturbed", "--verify").code == 0
    by_stage = ", ".join(f"{number} of {stage}" for stage, number in disturbed.killed.items())
    return (
        f"{sum(disturbed.killed.values())} kills ({by_stage}) in {done} steps: {len(found)} bit-identical files, "
        f"including the student; {responses} responses, each once"
    )


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

FILES_PARTS = 12


def score_files(source: Path, output: Path) -> int:
    """Start a worker that scores a file, and return its process id."""
    words = ["--input", source, "--teacher", "toy:teacher", "--output", output]
    settings = ("teacher.dtype=float32", "score.engine=transformers", "score.top_k=4", "pipeline.threads=1")
    options = [word for each in (*settings, f"rollout.num_parts={FILES_PARTS}") for word in ("--set", each)]

    def work() -> int:
        result = invoke("score-teacher", *words, *options)
        if result.code:
            print(result.err, file=sys.stderr)
        return result.code

    return forks.fork(work)


def kill_scorers(folder: Path, kills: int, seed: int) -> str:
    """Compare a directory of scores whose workers were killed with an undisturbed one, and return a summary."""
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    leases.LEASE_SECONDS, leases.HEARTBEAT_SECONDS = 5.0, 0.2
    settings = ("rollout.prompts_per_step=32", "rollout.num_parts=1", "train.steps=1", "pipeline.threads=1")
    run, source = folder / "run", folder / "responses.parquet"
    assert invoke("train", "--recipe", QUICKSTART, *sets(*settings), "--output", run).code == 0
    assert invoke("run", "export", run, source).code == 0
    start = time.monotonic()
    assert forks.wait(score_files(source, folder / "undisturbed")) == 0
    span, rng, killed, rounds = time.monotonic() - start, random.Random(seed), 0, 0
    expected = {path.name: path.read_bytes() for path in (folder / "undisturbed").iterdir()}
    while killed < kills:
        output = folder / f"disturbed-{rounds}"
        workers = [score_files(source, output) for _ in range(WORKERS)]
        while killed < kills and not (output / "manifest.json").exists():
            time.sleep(rng.uniform(0, span))
            victim = rng.choice(workers)
            if forks.exit_code(victim) is None:
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                killed += 1
                print(f"kill {killed}: {len(list(output.glob('part-*.parquet')))} parts", file=sys.stderr)
            workers[workers.index(victim)] = score_files(source, output)
        assert {forks.wait(worker) for worker in workers} == {0}
        assert forks.wait(score_files(source, output)) == 0  # parts of a worker that was killed last
        found = {path.name: path.read_bytes() for path in output.iterdir() if not path.name.endswith(".lock")}
        assert found.keys() == expected.keys()
        assert [name for name, data in found.items() if data != expected[name]] == []
        rounds += 1
    return f"{killed} kills of workers in {rounds} directories: {len(expected)} bit-identical files in each"


# ── Signals ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SECOND_SIGNAL_SECONDS = 0.3  # after the first one, at most
BEFORE_MAIN_SECONDS = 0.2  # until Python has started: it does not know the handlers of opdctl yet


def start(output: Path, settings: tuple[str, ...], *, spawn: bool) -> int:
    """Start `opdctl train`, and return its process id. Its messages go to `output`.log.

    spawn: as a new process, which takes seconds; otherwise as a forked one.
    """
    words = ["train", "--recipe", str(QUICKSTART), "--output", str(output)]
    words += [word for setting in settings for word in ("--set", setting)]
    log = output.with_suffix(".log").open("w")
    if spawn:
        return subprocess.Popen([sys.executable, "-m", "opdctl", *words], stdout=log, stderr=log).pid

    def work() -> int:
        signals.install_handlers()
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.argv = ["opdctl", *words]
        atexit._clear()  # the exit functions of the process that forked, which remove its folder
        try:
            opdctl.__main__.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return forks.fork(work)


def signal_twice(process: int, rng: random.Random, span: float) -> int:
    """Send two signals to a process, the first within `span` seconds; return its exit code, which is checked."""
    moment, pause = rng.uniform(0, span), rng.uniform(0, SECOND_SIGNAL_SECONDS)
    numbers = rng.choices([*signals.SIGNAL_CODES], k=2)
    for number, seconds in zip(numbers, (moment, pause), strict=True):
        time.sleep(seconds)
        os.kill(process, number)  # does nothing if it has ended
    code = forks.wait(process)
    names = " ".join(number.name for number in numbers)
    print(f"{names} after {moment:.2f} and {pause:.2f} s: exit {code}", file=sys.stderr)
    # Python handles signals that came during one call of a library in the order of their numbers.
    assert code in (0, *(signals.SIGNAL_CODES[number] for number in numbers)) or moment < BEFORE_MAIN_SECONDS
    return code


def interrupt(folder: Path, count: int, seed: int, steps: int, settings: tuple[str, ...], *, spawn: bool) -> str:
    """Compare runs under `count` double signals with an undisturbed one, and return a summary as text."""
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    settings = ("rollout.num_parts=6", "eval.every_steps=0", "pipeline.threads=1", f"train.steps={steps}", *settings)
    whole, codes, runs, begin = folder / "undisturbed", Counter[int](), 0, time.monotonic()
    assert forks.wait(start(whole, settings, spawn=spawn)) == 0
    span, rng = time.monotonic() - begin, random.Random(seed)
    while sum(codes.values()) < count:
        output = folder / f"run-{runs}"
        while sum(codes.values()) < count and (code := signal_twice(start(output, settings, spawn=spawn), rng, span)):
            codes[code] += 1
            assert "Traceback" not in output.with_suffix(".log").read_text()
        assert forks.wait(start(output, settings, spawn=spawn)) == 0
        assert made(output) == made(whole)
        assert run_files(output) == run_files(whole)
        runs += 1
    by_code = ", ".join(f"{number} exits with {code}" for code, number in sorted(codes.items()))
    return f"{sum(codes.values())} double signals ({by_code}) in {runs} runs of {steps} steps: bit-identical files"


# ── Calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TINY = ("rollout.prompts_per_step=4", "rollout.max_tokens=4", "rollout.num_parts=1", "train.steps=1")
CALLS = {  # the functions that write, rename and flush, with the module or class that opdctl.artifacts takes them from
    "write_text": Path,
    "write_bytes": Path,
    "write_table": tables.pq,
    "save_file": tables,
    "open": Path,
    "mkdir": Path,
    "rename": Path,
    "replace": os,
    "fsync": os,
}
ARTIFACT_FILES = {module.__file__ for module in (directories, files, stage_dir, tables, tensor_files)}


class Disk:
    """A disk on which the `at`-th write, rename or fsync of opdctl.artifacts fails.

    After a power cut, half of each file that was not flushed remains and, if `undo`, no rename in a directory that was
    not flushed.
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
            is_other_caller = sys._getframe(1).f_code.co_filename not in ARTIFACT_FILES
            if is_other_caller or (name == "open" and arguments[1] == "rb"):
                return call(*arguments, **options)
            if self.count == self.at:
                self.at = None
                self._fault(self, name, arguments)
            self.count += 1
            result = None if name == "fsync" else call(*arguments, **options)  # a real fsync is slow
            if name == "fsync":
                stat = os.fstat(arguments[0])
                self._flushed.add((stat.st_ino, stat.st_size))
                folder = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                self._renamed = [pair for pair in self._renamed if pair[1].parent != folder]
            elif name in ("replace", "rename"):
                self._renamed.append((Path(arguments[0]), Path(arguments[1])))
            return result

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
    """The call fails after a part of the data was written."""
    if name.startswith("write"):
        path = arguments[0] if name != "write_table" else arguments[1]
        Path.open(path, "wb").write(b"half")
    code = errno.ENOSPC if disk.count % 2 else errno.EIO
    raise OSError(code, os.strerror(code))


def train(output: Path) -> Result:
    return invoke("train", "--recipe", QUICKSTART, *sets(*TINY), "--output", output)


def train_until(output: Path, at: int | None, fault: Any) -> tuple[int, int]:
    """Train in a forked process on a disk with a fault; return the exit code and the number of calls."""
    counted = output.with_suffix(".calls")

    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(output, at, fault)
            disk.install(patch)
            result = train(output)
        counted.write_text(f"{disk.count}\n{result.err}")
        return result.code

    code = forks.wait(forks.fork(work))
    return code, int(counted.read_text().splitlines()[0]) if code >= 0 else 0


def check_nothing_wrong_is_read(output: Path, whole: Path) -> None:
    """Check that everything that counts as finished equals the undisturbed run."""
    if not (output / "run.json").exists():
        return
    found = status.collect_status(Run.load(output), verify=True)
    assert not found.is_corrupt
    for stage in found.stages:
        if stage.state == "done" and stage.stage in ("rollout", "teacher"):
            for part in (whole / f"step-{stage.step:05d}/{stage.stage}").glob("part-*"):
                assert (output / part.relative_to(whole)).read_bytes() == part.read_bytes()


def fail_at_calls(folder: Path, fault: Any, start: int = 0, stride: int = 1) -> str:
    """Train on a disk that fails at the `start`-th call, at the one `stride` later, and so on, and check each run."""
    # A worker waits one lease time for a lease whose file a power cut has damaged.
    leases.LEASE_SECONDS, leases.HEARTBEAT_SECONDS = 0.3, 0.1
    folder.mkdir(exist_ok=True)
    whole = folder / "whole"
    code, total = train_until(whole, None, fault)
    assert code == 0
    for at in range(start, total, stride):
        output = folder / f"run-{at}"
        code, _ = train_until(output, at, fault)
        if fault is power_cut:
            assert code == -signal.SIGKILL
        else:
            text = output.with_suffix(".calls").read_text()
            assert code == ExitCode.UNAVAILABLE, text
            assert "error: Disk full: " in text or "error: Failed write: " in text, text
            assert not list(output.rglob(".tmp-*")), at
        check_nothing_wrong_is_read(output, whole)
        again = train(output)
        assert again.code == 0, (at, again.err)
        assert made(output) == made(whole), at
        assert run_files(output) == run_files(whole), at
        shutil.rmtree(output)
    return f"{fault.__name__}: at {len(range(start, total, stride))} of {total} calls; every rerun ended the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an override of the recipe")
    parser.add_argument("--signals", type=int, default=0, metavar="COUNT")
    parser.add_argument("--spawn", action="store_true", help="send the signals to new processes, not to forked ones")
    parser.add_argument("--files", action="store_true", help="kill workers of score-teacher --input")
    parser.add_argument("--calls", action="store_true")
    arguments = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.signals:
            limits = (arguments.signals, arguments.seed, arguments.steps, tuple(arguments.set))
            print(interrupt(Path(folder), *limits, spawn=arguments.spawn))
        elif arguments.files:
            print(kill_scorers(Path(folder), arguments.kills, arguments.seed))
        elif arguments.calls:
            for fault in (power_cut, system_error):
                print(fail_at_calls(Path(folder) / fault.__name__, fault))
        else:
            print(kill(Path(folder), arguments.kills, arguments.seed, arguments.steps, tuple(arguments.set)))


if __name__ == "__main__":
    main()
