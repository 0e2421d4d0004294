"""The ranks of training on a cluster, by Ray Train.

Ray Train places the ranks, starts all of them again if one is lost, and leads them to each other. Each of its workers
starts `opdctl train` as torchrun does, by the same environment variables, and passes on what it prints. So a rank has
its own main thread, signals and exit code. The run directory has the state of training: no checkpoint is Ray's.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from opdctl import console, signals
from opdctl.cluster.connection import check_code, code_identity, connect, describe_failure, enter_directory
from opdctl.cluster.mailbox import Reporter, start_mailbox, take_events
from opdctl.cluster.worker_pool import CALL_POLL_SECONDS, LOGS_HINT, START_NOTICE_SECONDS, STOP_SECONDS, has_gpus
from opdctl.environment import join_python_path
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.schema import Recipe
from opdctl.runs.layout import list_steps

MAX_LOSSES_OF_STEP = 5
"""Times that ranks may be lost in the same step, until training stops."""
NODE_VARIABLES = ("RAY_JOB_ID", "RAY_RAYLET_PID")
"""Of a worker of Ray, which the process that it starts is not."""
RAY_TRAIN_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a step that is lost is resumed from the run directory
}


@dataclass(frozen=True)
class RankSetup:
    """What a rank receives. arguments: of the command. run_path: absolute. code: of the driver. mailbox: its name."""

    arguments: Sequence[str]
    run_path: Path
    directory: Path
    code: str
    mailbox: str


class LostRankError(Exception):
    """A rank ended by a signal, such as that of a machine that is shut down: all ranks start again."""


# ── The driver ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run_ranks(recipe: Recipe, path: Path, arguments: Sequence[str]) -> int:
    """Run `opdctl` with these arguments as `hardware.train_gpus` ranks, and return the exit code of the first to fail.

    Raises:
        OpdctlError: the cluster cannot be reached; the ranks were lost too often in the same step.
    """
    with connect(recipe.pipeline):
        import ray

        name, mailbox = start_mailbox()
        setup = RankSetup(arguments, path.resolve(), Path.cwd(), code_identity(), name)
        driver = _Driver(mailbox)
        threading.Thread(target=driver.fit, args=(recipe, setup), daemon=True).start()
        try:
            while not (driver.ended.wait(CALL_POLL_SECONDS) or driver.error):
                signals.check()
                driver.read_mailbox()
        finally:
            driver.stop()
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(mailbox)
    if driver.error:
        raise driver.error
    return next(iter(driver.failures.values()), ExitCode.DONE)


class _Driver:
    """What the process that started the command knows of the ranks.

    failures: exit codes of ranks that have failed since all have started. error: what ends training. ended: set after
    Ray Train has ended. (A thread's `is_alive` is no longer right once a signal has interrupted its `join`: bpo-45274.)
    """

    def __init__(self, mailbox: Any):
        self.failures: dict[str, int] = {}
        self.error: OpdctlError | None = None
        self.ended = threading.Event()
        self._mailbox = mailbox
        self._losses, self._step = 0, -1
        self._has_ranks = False
        self._begin: float | None = time.monotonic()

    def fit(self, recipe: Recipe, setup: RankSetup) -> None:
        """Run the trainer of Ray Train until its end."""
        try:
            _fit(recipe, setup)
        except Exception as error:  # of Ray; after a request to stop nobody reads it
            self.error = self.error or OpdctlError("failed_rank", describe_failure(error), hint=LOGS_HINT)
        finally:
            self.ended.set()

    def read_mailbox(self, *, stop: bool = False) -> None:
        """Print and note what the ranks have reported."""
        events = take_events(self._mailbox, stop=stop)
        if self._begin and time.monotonic() - self._begin > START_NOTICE_SECONDS:
            self._begin = None
            console.info("the ranks have not started yet: Ray waits for nodes with room for all of them")
        for sender, kind, value in events:
            self._has_ranks = True
            if kind == "out":
                sys.stdout.write(value)
                sys.stdout.flush()
            elif kind == "print":
                console.print_line(value.rstrip("\n"))
            elif kind == "started":
                self._note_start(sender, value)
            elif kind == "ended" and value:
                self.failures[sender] = value
            elif kind == "error":
                self.error = self.error or value

    def _note_start(self, sender: str, step: int) -> None:
        """Note that a rank has started, with the number of steps that exist. With rank 0, all others start again."""
        self._begin = None
        if sender != "rank 0":
            return
        if self._step >= 0:
            console.warn("a rank was lost; all ranks start again")
        self._losses, self._step = self._losses + 1 if step == self._step else 0, step
        self.failures.clear()
        if self._losses >= MAX_LOSSES_OF_STEP:
            why = f"ranks were lost {self._losses} times in step {max(step - 1, 0)}"
            self.error = OpdctlError("failed_rank", why, hint=LOGS_HINT)

    def stop(self) -> None:
        """Let the ranks that run end as by SIGTERM, within STOP_SECONDS, and print what they have reported.

        Ray Train ends after them. If it used the connection after its end, Ray would end this process with code 1.
        """
        self.read_mailbox()
        deadline = time.monotonic() + STOP_SECONDS
        while self._has_ranks and not self.ended.wait(CALL_POLL_SECONDS) and time.monotonic() < deadline:
            self.read_mailbox(stop=True)
        self.read_mailbox()


def _fit(recipe: Recipe, setup: RankSetup) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    os.environ.update(RAY_TRAIN_SETTINGS)
    use_gpu, hardware = has_gpus(recipe.pipeline.device), recipe.hardware
    with TemporaryDirectory(prefix="opdctl-ranks-") as storage:  # what Ray Train writes; ranks do not use it
        DataParallelTrainer(
            supervise_rank,
            train_loop_config={"setup": setup},
            scaling_config=ScalingConfig(
                num_workers=hardware.train_gpus,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": max(1, recipe.pipeline.threads), **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=RunConfig(storage_path=storage, name="ranks", failure_config=FailureConfig(max_failures=-1)),
        ).fit()


# ── A rank ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def supervise_rank(config: Mapping[str, Any]) -> None:
    """Run one rank in a process, until its end, on the worker of Ray Train that this is called on.

    Raises:
        LostRankError: the process ended by a signal. Ray Train then starts all ranks again.
    """
    import ray.train

    setup: RankSetup = config["setup"]
    rank = ray.train.get_context().get_world_rank()
    stopping = threading.Event()
    reporter = Reporter(setup.mailbox, f"rank {rank}", stopping.set)
    try:
        check_code(setup.code)
        enter_directory(setup.directory)
        environment = _environment()
    except OpdctlError as error:
        reporter.send("error", error)
        reporter.flush()
        return
    reporter.send("started", _count_steps(setup.run_path))
    command = [sys.executable, "-P", "-m", "opdctl.cluster.rank_process", str(os.getpid()), *setup.arguments]
    code = _run_process(command, environment, reporter, stopping)
    if not stopping.is_set() and (code < 0 or code == ExitCode.REQUEUE):
        raise LostRankError(f"rank {rank} on {socket.gethostname()} ended with exit code {code}")
    reporter.send("ended", code)
    reporter.flush()


def _count_steps(path: Path) -> int:
    """Return the number of steps that the run has started."""
    return len(list_steps(path)) if path.is_dir() else 0


def _environment() -> dict[str, str]:
    """Return the environment of the process: that of torchrun for this rank. All ranks call this at the same time."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context = get_context()
    address, port = broadcast_from_rank_zero(_find_address())
    kept = {name: value for name, value in os.environ.items() if name not in NODE_VARIABLES}
    return kept | {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": join_python_path(),
    }


def _find_address() -> tuple[str, int]:
    """Return the address of this node, and a port of it that is free at the moment."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _run_process(
    command: Sequence[str], environment: Mapping[str, str], reporter: Reporter, stopping: threading.Event
) -> int:
    """Run a process, pass on what it prints, and return its exit code. It gets SIGTERM as soon as `stopping` is set."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    streams = {"out": process.stdout, "print": process.stderr}
    readers = [threading.Thread(target=_pass_on, args=(each, kind, reporter)) for kind, each in streams.items()]
    for reader in readers:
        reader.start()
    while process.poll() is None:
        if stopping.wait(CALL_POLL_SECONDS):
            process.send_signal(signal.SIGTERM)
            break
    code = process.wait()
    for reader in readers:
        reader.join()
    return code


def _pass_on(stream: IO[bytes], kind: str, reporter: Reporter) -> None:
    for line in stream:
        text = line.decode(errors="replace")
        reporter.send(kind, text)
