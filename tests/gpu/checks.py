"""The checks of an acceptance run. Each starts opdctl as a user does, and reads the run directory that it writes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from gpu.pairs import Pair
from gpu.updates import check_update
from gpu.workspace import CheckError, Place, Workspace

MAX_PARITY_RMS = {"bfloat16": 0.08, "float32": 1e-3}
"""Nats, between two engines: twice what rounding to bfloat16 causes on CPUs."""
KILLED_AT = {"rollout": "rollout", "score": "teacher", "update": "teacher/manifest.json"}
"""What exists in a step's directory as soon as a stage runs."""
POLL_SECONDS = 0.005
TP_2 = "vllm.tensor_parallel_size=2"
SLEEP = ("vllm.enable_sleep_mode=true", "vllm.gpu_memory_utilization=0.8")
"""Two engines do not fit: each sleeps while the other one, or the trainer, uses the GPU."""


@dataclass(frozen=True)
class Check:
    """A check of a pair of models. gpus: how many GPUs it needs at least."""

    name: str
    function: Callable[[Workspace], None]
    pair: Pair
    gpus: int = 1


def check_parity(work: Workspace, engines: tuple[str, str]) -> None:
    """Two engines give the same log-probs of the same model: the student is its own teacher."""
    settings = [f"{section}.engine={engine}" for section, engine in zip(("rollout", "score"), engines, strict=True)]
    recipe = work.recipe(f"teacher.model={work.pair.student}", *settings)
    work.opdctl("rollout", *recipe)
    work.opdctl("score-teacher", *recipe)
    from opdctl.runs.run import Run
    from opdctl.runs.scored_responses import read_scored

    scored = read_scored(Run.load(work.run), 0)
    difference_N = np.concatenate([sample.teacher.logprobs - sample.response.logprobs for sample in scored])
    rms = float(np.sqrt(np.square(difference_N, dtype=np.float64).mean()))
    work.notes.append(f"RMS {rms:.1g}, max {np.abs(difference_N).max():.1g} nats on {len(difference_N)} tokens")
    if not rms <= MAX_PARITY_RMS[work.dtype]:
        raise CheckError(f"RMS {rms:.3g} nats")


def check_stages(work: Workspace) -> None:
    """Each of the five stages is a command."""
    recipe = work.recipe("train.steps=1")
    work.opdctl("rollout", *recipe)
    work.opdctl("score-teacher", *recipe)
    work.opdctl("train", "--no-fill", *recipe)
    work.opdctl("eval", *recipe)
    work.opdctl("analyze-position", str(work.run))
    work.expect_training(steps=1)


def check_training(work: Workspace, settings: tuple[str, ...] = (), ranks: int = 1) -> None:
    """One command makes all stages on the same GPUs."""
    work.opdctl("train", *work.recipe(*settings), ranks=ranks)
    work.expect_training()


def check_kills(work: Workspace) -> None:
    """Training on one set of GPUs, in one command, is killed in each stage. It leaves no process, and resumes."""
    killed = []
    for stage in ("update",) if work.place.is_tiny else KILLED_AT:
        process = work.start("train", *work.recipe())
        while process.poll() is None and not (work.run / "step-00000" / KILLED_AT[stage]).exists():
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            process.kill()
            killed.append(stage)
        process.wait()
        work.expect_no_process()
    if not killed:
        raise CheckError(f"no command could be killed: {work.last_error()}")
    work.notes.append(f"killed in {', '.join(killed)}")
    work.opdctl("train", *work.recipe())
    work.expect_training()


def check_following(work: Workspace) -> None:
    """Rollouts, scores and updates are made side by side, on separate GPUs."""
    gpus = work.place.gpus
    size = 2 if len(gpus) >= 6 else 1
    recipe = work.recipe("eval.every_steps=0", *([TP_2] if size == 2 else []))
    update = gpus[2 * size :]
    started = [
        work.start("train", "--follow", *recipe, gpus=update, ranks=len(update)),
        work.start("rollout", "--follow", *recipe, gpus=gpus[:size]),
        work.start("score-teacher", "--follow", *recipe, gpus=gpus[size : 2 * size]),
    ]
    for process in started:
        work.wait(process)
    work.expect_training()


def list_checks(place: Place, small: Pair, others: list[Pair]) -> list[Check]:
    """Return all checks. The large pair has few of them, because its engines take long to start."""
    engine, count, large = place.engine, len(place.gpus), (others or [small])[0]
    engines = dict.fromkeys([(engine, "transformers"), (engine, engine), ("transformers", engine)])
    parities = [(*names, small) for names in engines] + [(engine, "transformers", pair) for pair in others]
    checks = [Check(f"parity, {a} and {b}", partial(check_parity, engines=(a, b)), pair) for a, b, pair in parities]
    checks += [Check("kills", check_kills, small), Check("stages", check_stages, small)]
    checks += [Check("update", check_update, pair) for pair in [*others[:2]] or [small]]
    if engine == "vllm":
        settings = (TP_2,) if count > 1 else ()
        checks.append(Check(f"train{', TP 2' if settings else ''}", partial(check_training, settings=settings), large))
        if place.device == "cuda":
            checks.append(Check("train, sleep", partial(check_training, settings=SLEEP), small))
        in_pairs = partial(check_training, ranks=count, settings=(TP_2,))
        checks.append(Check("torchrun, TP 2", in_pairs, small, gpus=4))
    checks.append(Check("torchrun", partial(check_training, ranks=count), small, gpus=2))
    checks.append(Check("follow", check_following, small, gpus=3))
    return checks
