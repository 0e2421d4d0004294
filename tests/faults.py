"""The fault harness: the quickstart's chain under random kills, three workers a stage, against the same undisturbed.

    python tests/faults.py                       # 100 kills
    python tests/faults.py --kills 1000 --seed 1

Step after step, three workers each draw, score and update. At random moments one of them, whichever, is killed with
SIGKILL and another is started in its place. At the end the student, every part and every trainer state must be those of
an undisturbed chain to the bit, every response must be there exactly once, and nothing else may be left.
"""

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import QUICKSTART, artifacts, invoke, names

import opdctl.engines.hf
import opdctl.online  # noqa: F401 - and all that it imports, before any worker is forked
from opdctl import claims
from opdctl.records import Response
from opdctl.run import Run, recorded_run
from opdctl.store import read_rows

WORKERS = 3
STAGES = ("rollout", "score-teacher", "train --no-fill")
FINE = {"rollout": (0,), "score-teacher": (0,), "train --no-fill": (0, 1, 5)}  # one trains; the others find it at work
FIRST_SPAN = 1.0  # seconds that a stage is thought to take before any has been seen


@dataclass
class Chain:
    """A run made by forked workers, `kills` of which are to be killed; without any there is one worker a stage."""

    path: Path
    settings: tuple[str, ...]
    kills: int
    chance: random.Random
    killed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    _spans: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, FIRST_SPAN))

    def go(self, steps: int) -> int:
        """Make steps until there are `steps` and all kills are dealt out; return how many there are."""
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
        run = recorded_run(self.path)
        if stage == "train --no-fill":
            return run.update_path(step).exists()
        return run.rollout(step).done() if stage == "rollout" else run.is_scored(step)

    def _attempt(self, stage: str, step: int, kills: int) -> int:
        """Let workers do a stage, kill some of them, and return how many."""
        start, dealt = time.monotonic(), 0
        workers = [self._worker(stage) for _ in range(WORKERS if self.kills else 1)]
        while workers:
            if dealt < kills and not self._is_done(stage, step):
                delay = self.chance.uniform(0, self._spans[stage])
                time.sleep(delay)
            workers = [pid for pid in workers if not self._has_ended(pid, stage)]
            if workers and dealt < kills:
                victim = self.chance.choice(workers)
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                workers.remove(victim)
                workers.append(self._worker(stage))
                dealt += 1
                self.killed[stage] += 1
                print(f"kill {sum(self.killed.values())}: step {step}, {stage}", file=sys.stderr)
            time.sleep(0.01)
        if not dealt:
            self._spans[stage] = time.monotonic() - start
        return dealt

    def _worker(self, stage: str) -> int:
        """Run a stage's command in a forked process: the libraries are loaded already."""
        if child := os.fork():
            return child
        options = [word for setting in self.settings for word in ("--set", setting)]
        begin = [] if (self.path / "run.json").exists() else ["--recipe", QUICKSTART, *options]
        result = invoke(*stage.split(), "--output", self.path, *begin)
        if result.code not in FINE[stage]:
            print(result.err, file=sys.stderr)
        os._exit(result.code)

    def _has_ended(self, pid: int, stage: str) -> bool:
        ended, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status)
        if ended and code not in FINE[stage]:
            raise AssertionError(f"{stage}: a worker ended with {code}")
        return bool(ended)


def check_every_response_is_there_once(run: Run, steps: int) -> int:
    """Return how many there are."""
    count = 0
    for step in range(steps):
        stage = run.rollout(step)
        found = [row.sample_id for index in range(len(stage.names)) for row in read_rows(stage.verify(index), Response)]
        assert found == [name for name, _ in run.draws(step)], f"step {step}"
        count += len(found)
    return count


def check(folder: Path, kills: int, seed: int, steps: int, settings: tuple[str, ...] = ()) -> str:
    """Compare a chain under `kills` with an undisturbed one of as many steps, and return what there is to say of it."""
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    claims.LEASE, claims.HEARTBEAT = 5.0, 0.2  # three that want to train see soon that one is at it
    settings = ("rollout.parts=6", "eval.every=0", "pipeline.threads=1", *settings)
    disturbed = Chain(folder / "disturbed", settings, kills, random.Random(seed))
    done = disturbed.go(steps)
    Chain(folder / "undisturbed", settings, 0, random.Random(seed)).go(done)
    found, wanted = artifacts(folder / "disturbed"), artifacts(folder / "undisturbed")
    assert found.keys() == wanted.keys()
    assert [name for name, data in found.items() if data != wanted[name]] == []
    left = {*names(folder / "disturbed")} ^ {*names(folder / "undisturbed")}
    assert not left, left
    responses = check_every_response_is_there_once(recorded_run(folder / "disturbed"), done)
    assert invoke("status", folder / "disturbed", "--verify").code == 0
    dealt = ", ".join(f"{number} of {stage}" for stage, number in disturbed.killed.items())
    return (
        f"{sum(disturbed.killed.values())} kills ({dealt}) in {done} steps: {len(found)} files equal to the bit, the "
        f"student among them; {responses} responses, each once"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(check(Path(folder), arguments.kills, arguments.seed, arguments.steps, tuple(arguments.set)))


if __name__ == "__main__":
    main()
