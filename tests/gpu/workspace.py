"""The run directory, the commands and the processes of one check."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu import machine
from gpu.pairs import Pair

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 60.0
"""After a command or a kill, for all processes of a run to end."""
MAX_MISMATCH_KL = {"bfloat16": 1e-2, "float32": 1e-5}
"""Nats, between engine and trainer, by the student's dtype."""
COMMON = (
    *("prompts.max_tokens=32", "student.dtype=bfloat16", "teacher.dtype=bfloat16"),
    *("train.steps=2", "train.keep_latest=9", "eval.every_steps=1"),
)
FULL = (
    *("prompts.limit=256", "rollout.prompts_per_step=64", "rollout.num_parts=4", "rollout.max_tokens=256"),
    *("eval.limit=16", "eval.max_tokens=64"),
)
TINY = (
    *("prompts.limit=16", "rollout.prompts_per_step=4", "rollout.num_parts=2", "rollout.max_tokens=16"),
    *("eval.limit=2", "eval.max_tokens=4", "pipeline.threads=1"),
)


class CheckError(Exception):
    """A check failed."""


@dataclass(frozen=True)
class Place:
    """Where checks run. gpus: those that commands may use; on a CPU any names, one for each process of torchrun."""

    folder: Path
    device: str
    gpus: list[str]
    engine: str
    is_tiny: bool
    deadline: float


@dataclass
class Workspace:
    """One check's directory, which is emptied. notes: for the table."""

    place: Place
    name: str
    pair: Pair
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    @property
    def folder(self) -> Path:
        return self.place.folder / self.name

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def marker(self) -> str:
        return str(self.folder)

    @property
    def dtype(self) -> str:
        return "float32" if "student.dtype=float32" in self.pair.settings else "bfloat16"

    # ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def recipe(self, *settings: str, run: Path | None = None) -> list[str]:
        """Return the options of a command that select recipe, models and run directory, by default `self.run`."""
        place, pair = self.place, self.pair
        chosen = (f"student.model={pair.student}", f"teacher.model={pair.teacher}", f"pipeline.device={place.device}")
        chosen += (f"rollout.engine={place.engine}", f"score.engine={place.engine}")
        overrides = (*COMMON, *(TINY if place.is_tiny else FULL), *chosen, *pair.settings, *settings)
        words = [word for override in overrides for word in ("--set", override)]
        return ["--recipe", str(ROOT / "recipes/quickstart.toml"), *words, "--output", str(run or self.run)]

    def start(self, *words: str, gpus: Sequence[str] | None = None, ranks: int = 1) -> "subprocess.Popen[bytes]":
        """Start an opdctl command; with several ranks, by torchrun."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        environment = os.environ | {machine.MARKER: self.marker, "HF_HUB_OFFLINE": "1"}
        if self.place.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.place.gpus if gpus is None else gpus)
        with (self.folder / "log").open("ab") as log:
            log.write(f"\n$ opdctl {' '.join(words)}\n".encode())
            log.flush()
            command = [sys.executable, *launcher, "-m", "opdctl", *words]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, process_group=0)

    def wait(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait for a command to succeed.

        Raises:
            CheckError: it failed, or the time of the acceptance run is over.
        """
        try:
            code = process.wait(max(self.place.deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            raise CheckError("the time of the acceptance run is over") from None
        if code:
            raise CheckError(f"exit code {code}: {self.last_error()}")

    def opdctl(self, *words: str, gpus: Sequence[str] | None = None, ranks: int = 1) -> None:
        """Run an opdctl command on all GPUs, or on these."""
        self.wait(self.start(*words, gpus=gpus, ranks=ranks))

    def last_error(self) -> str:
        """Return the last error of opdctl in the log, or the last line."""
        lines = [line for line in (self.folder / "log").read_text(errors="replace").splitlines() if line.strip()]
        return ([line for line in lines if line.startswith("error: ")] or lines)[-1]

    def expect_no_process(self) -> None:
        """Raise CheckError if a process of the check does not end by itself."""
        if left := machine.wait_until_gone(self.marker, GRACE_SECONDS):
            raise CheckError(f"{len(left)} processes are left after {GRACE_SECONDS:g} s")

    def kill_all(self) -> None:
        for process in machine.processes(self.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    # ── Artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────

    def metrics(self) -> list[dict[str, float]]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def expect_training(self, steps: int = 2) -> None:
        """Raise CheckError unless the run has these steps, with finite metrics, new students and small mismatches."""
        metrics = self.metrics()
        if len(metrics) != steps:
            raise CheckError(f"{len(metrics)} of {steps} steps")
        if wrong := [name for row in metrics for name, value in row.items() if not math.isfinite(value)]:
            raise CheckError(f"not finite: {', '.join(wrong)}")
        updates = [json.loads(path.read_text()) for path in self.run.glob("step-*/update.json")]
        if len({json.dumps(update["student"], sort_keys=True) for update in updates}) != steps:
            raise CheckError("an update did not change the student")
        mismatch = max(row["mismatch_kl"] for row in metrics)
        self.notes.append(f"mismatch KL {mismatch:.1g} nats")
        if mismatch > MAX_MISMATCH_KL[self.dtype]:
            raise CheckError(f"engine and trainer differ by a KL of {mismatch:.2g} nats")
