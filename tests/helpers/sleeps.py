"""Workers that sleep for longer than their lease: the run of the others, bit by bit.

    PYTHONPATH=tests python -m helpers.sleeps                # 30 moments
    PYTHONPATH=tests python -m helpers.sleeps --moments 200 --seed 1

A worker is suspended by SIGSTOP at a random moment of a rollout, of scores, of an update, of an evaluation, or of the
publication of a file. Another worker finishes the run. Then the first one continues: it must change nothing, and end
with a documented exit code. The run must be bit-identical to an undisturbed one.
"""

import argparse
import faulthandler
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import forks
from helpers.commands import QUICKSTART, contents, invoke, sets
from helpers.faults import made, run_files

from opdctl import signals
from opdctl.artifacts import directories, files, leases, stage_dir
from opdctl.errors import ExitCode

SETTINGS = (
    *("rollout.prompts_per_step=4", "rollout.max_tokens=12", "train.steps=2"),
    *("eval.every_steps=1", "eval.limit=4", "eval.max_tokens=12", "eval.num_parts=2"),
)
STAGES = {  # the command of a worker, by the name of the stage; the steps of the others come before
    "rollout": ("rollout",),
    "score": ("score-teacher",),
    "update": ("train", "--no-fill"),
    "run": ("train",),
    "evaluation": ("eval", "--step", "0"),
}
KINDS = {  # of moments: the stages, and the file of opdctl that is at work
    "rollout": (("rollout", "run"), "engines/transformers.py"),
    "score": (("score", "run"), "runs/stage_loop.py"),
    "update": (("update", "run"), "training/trainer.py"),
    "publish": (tuple(STAGES), "artifacts/"),
}
CODES = (ExitCode.DONE, ExitCode.UNAVAILABLE)
"""Of a worker that continues: it dropped its parts, or it lost its lease."""


@dataclass
class Moments:
    """Counts the moments of a process by the kind of work, and stops the process at one of them."""

    stop_at: tuple[str, int] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for module in (files, stage_dir, directories):
            if hasattr(module, "fsync_path"):
                patch.setattr(module, "fsync_path", self._counted(module.fsync_path))
        patch.setattr(signals, "check", self._counted(signals.check))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            place = sys._getframe(1).f_code.co_filename
            for kind, (_, name) in KINDS.items():
                if f"opdctl/{name}" in place:
                    if self.stop_at == (kind, self.counts[kind]):
                        os.kill(os.getpid(), signal.SIGSTOP)
                    self.counts[kind] += 1
            return call(*arguments)

        return counted


def worker(output: Path, stage: str, stop_at: tuple[str, int] | None = None) -> int:
    """Start a worker, and return its process id. It writes the number of its moments to `output`.moments."""

    def work() -> int:
        moments, is_new = Moments(stop_at), not (output / "run.json").exists()
        with pytest.MonkeyPatch.context() as patch:
            moments.install(patch)
            begin = ["--recipe", QUICKSTART, *sets(*SETTINGS)] if is_new else []
            option = "--run" if stage == "evaluation" else "--output"
            result = invoke(*STAGES[stage], option, output, *begin)
        counts = " ".join(f"{kind} {count}" for kind, count in moments.counts.items())
        output.with_suffix(".moments").write_text(f"{counts}\n{result.err}")
        return result.code

    return forks.fork(work)


def count_moments(output: Path, stage: str) -> dict[str, int]:
    assert forks.wait(worker(output, stage)) == 0
    words = output.with_suffix(".moments").read_text().splitlines()[0].split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def is_stopped(pid: int) -> bool:
    """Wait until a child is stopped, or has ended; return whether it is stopped."""
    end = time.monotonic() + forks.MAX_WAIT_SECONDS
    while time.monotonic() < end:
        stopped = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if stopped is not None:
            return stopped.si_code == os.CLD_STOPPED
        time.sleep(0.01)
    raise AssertionError(f"process {pid} neither stopped nor ended")


def sleep_once(folder: Path, starts: dict[str, Path], whole: Path, stage: str, moment: tuple[str, int]) -> int:
    """Let a worker of a stage sleep at a moment while another finishes the run; return the worker's exit code."""
    output = folder / "run"
    if starts[stage].exists():
        shutil.copytree(starts[stage], output)
    sleeper = worker(output, stage, moment)
    assert is_stopped(sleeper), f"{stage}, {moment}: it ended before"
    assert forks.wait(worker(output, "run")) == 0, output.with_suffix(".moments").read_text()
    before = contents(output)
    os.kill(sleeper, signal.SIGCONT)
    code = forks.wait(sleeper)
    messages = output.with_suffix(".moments").read_text()
    assert code in CODES, f"{stage}, {moment}: exit {code}: {messages}"
    after = contents(output)
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == set(), f"{stage}, {moment}"
    left_out = "eval" if stage == "update" else " "  # `train --no-fill` evaluates no student, and steps are made once
    for files_of in (made, lambda run: dict.fromkeys(run_files(run))):
        found, expected = (
            {name: data for name, data in files_of(run).items() if not name.startswith(left_out)}
            for run in (output, whole)
        )
        assert found == expected, f"{stage}, {moment}"
    shutil.rmtree(output)
    return code


def prepare(folder: Path) -> tuple[Path, dict[str, Path], dict[str, dict[str, int]]]:
    """Make an undisturbed run. Return it, the run at the start of each stage, and the number of moments of each."""
    whole, running = folder / "whole", folder / "start"
    assert forks.wait(worker(whole, "run")) == 0
    starts, counts = {}, {}
    for stage in ("rollout", "score", "update"):
        starts[stage] = folder / f"before-{stage}"
        if running.exists():
            shutil.copytree(running, starts[stage])
        counts[stage] = count_moments(running, stage)
    starts |= {"run": folder / "none", "evaluation": starts["update"]}
    for stage in ("run", "evaluation"):
        output = folder / f"counted-{stage}"
        if starts[stage].exists():
            shutil.copytree(starts[stage], output)
        counts[stage] = count_moments(output, stage)
    return whole, starts, counts


def sleep_at_moments(folder: Path, moments: int, seed: int) -> str:
    """Let workers sleep at `moments` random moments, as many of each kind, and return a summary as text."""
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    leases.LEASE_SECONDS, leases.HEARTBEAT_SECONDS = 1.0, 0.1
    whole, starts, counts = prepare(folder)
    rng, codes = random.Random(seed), dict.fromkeys(CODES, 0)
    for index in range(moments):
        kind = list(KINDS)[index % len(KINDS)]
        stage = rng.choice([stage for stage in KINDS[kind][0] if counts[stage][kind]])
        moment = kind, rng.randrange(counts[stage][kind])
        code = sleep_once(folder, starts, whole, stage, moment)
        print(f"{' '.join(STAGES[stage])}, {kind} {moment[1]} of {counts[stage][kind]}: exit {code}", file=sys.stderr)
        codes[ExitCode(code)] += 1
    by_code = ", ".join(f"{number} exits with {code:d}" for code, number in codes.items())
    return f"{moments} sleeps ({by_code}): nothing changed after the worker continued; bit-identical runs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        print(sleep_at_moments(Path(folder), arguments.moments, arguments.seed))


if __name__ == "__main__":
    main()
