"""TODO."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from opdctl import console, distributed
from opdctl.errors import DISK_FULL_ERRNOS, WRITE_ERRNOS, ExitCode, OpdctlError, is_out_of_memory

if TYPE_CHECKING:
    from opdctl.artifacts.stage_dir import WorkerShard
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


class StopRequested(BaseException):
    """SIGTERM or SIGUSR1: a cluster wants its machine back."""


@contextlib.contextmanager
def error_handling(verbose: int, quiet: bool) -> Iterator[None]:
    """Turn errors and signals into one message and an exit code."""
    others = not distributed.is_main()  # they say their errors, and no more
    console.set_level(-1 if quiet or others else min(verbose, 1), f"rank {distributed.rank()}: " if others else "")
    os.umask(os.umask(0) | 0o002)  # nothing that all may write to, whatever the shell says
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, _request_stop)
    try:
        yield
    except OpdctlError as error:
        console.error(error.message, error.hint)
        raise typer.Exit(error.code) from error
    except StopRequested as stop:
        if not others:
            console.error("stopped by a signal; finished parts are kept", "run the same command again to go on")
        raise typer.Exit(ExitCode.REQUEUE) from stop
    except KeyboardInterrupt as stop:
        console.error("interrupted; finished parts are kept", "run the same command again to go on")
        raise typer.Exit(ExitCode.INTERRUPTED) from stop
    except typer.Exit:
        raise
    except BrokenPipeError as error:  # the reader of stdout has gone: there is nobody to tell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it on its way out
        raise typer.Exit(ExitCode.FAILED) from error
    except Exception as error:
        if distributed.is_peer_failure(error):
            console.error("another process of this run has failed, as it says itself", None)
            raise typer.Exit(ExitCode.FAILED) from error
        if is_out_of_memory(error):
            hint = "smaller batches need less: rollout.batch_size, score.tokens_per_batch, train.tokens_per_micro_batch"
            console.error(f"out of memory: {' '.join(str(error).split())[:300]}", hint)
            raise typer.Exit(ExitCode.UNAVAILABLE) from error
        if isinstance(error, OSError) and error.errno in (*DISK_FULL_ERRNOS, *WRITE_ERRNOS):
            console.error(f"{error.filename or 'a file'}: cannot be written: {error.strerror}", None)
            raise typer.Exit(ExitCode.UNAVAILABLE) from error
        if verbose:
            raise
        console.error(f"internal error: {type(error).__name__}: {error}", "run again with -v for the traceback")
        raise typer.Exit(ExitCode.FAILED) from error
    finally:
        distributed.destroy_process_group()


def _request_stop(number: int, frame: FrameType | None) -> None:
    raise StopRequested


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, from rank 0 alone."""
    from opdctl.artifacts.records import SCHEMA_VERSION

    if distributed.is_main():
        sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **value}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def read_recipe_options(recipes: list[Path] | None, overrides: list[str] | None, output: Path | None) -> "Recipe":
    from opdctl.recipe.load import load_recipe
    from opdctl.runs.run import read_recipe

    if recipes:
        return load_recipe(recipes, overrides or [])
    if output is None:
        raise OpdctlError("no recipe", hint="give --recipe FILE, or --output RUN_DIR of a run that was begun")
    return read_recipe(output, overrides or [])


def open_run_and_device(recipe: "Recipe", output: Path | None, *needs: str, record: bool = True) -> tuple["Run", str]:
    """Open the run, with the models that are needed at hand, and set torch up. Return the run and the device."""
    from opdctl.runs.open import open_run

    distributed.init_process_group()
    run = distributed.main_process_first(lambda: open_run(recipe, output, needs=needs, record=record))
    return run, set_up_device(recipe)


def set_up_device(recipe: "Recipe") -> str:
    """Set torch up as the recipe says, and return the device."""
    import torch

    from opdctl.environment import resolve_device

    if recipe.pipeline.threads:
        torch.set_num_threads(recipe.pipeline.threads)
    device = resolve_device(recipe.pipeline.device)
    console.debug(f"device {device}, {torch.get_num_threads()} threads")
    return device


def resolve_shard(text: str | None) -> "WorkerShard":
    """Return the worker that `--shard`, torchrun or Slurm's array names. Raises OpdctlError for a senseless one."""
    from opdctl.artifacts.stage_dir import ALL_PARTS, WorkerShard

    if text is None and distributed.world_size() > 1:
        return WorkerShard(distributed.rank(), distributed.world_size())
    if text is None:
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        task, least, count = (os.environ.get(name) for name in names)
        if task is None or count is None:
            return ALL_PARTS
        text = f"{int(task) - int(least or 0)}/{count}"
        console.info(f"shard {text}, by Slurm's array")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise OpdctlError(
            f"--shard {text}: must read I/N with 0 <= I < N, such as 0/4", hint="N workers are I = 0 … N-1"
        )
    return WorkerShard(int(index), int(count))


def resolve_step(run: "Run", step: int | None) -> int:
    """Return the step to work on: the current one by default, the last when all are done.

    Raises OpdctlError for a step that the run has not, or not yet.
    """
    current, steps = run.current_step(), run.recipe.train.steps
    if step is None:
        return min(current, steps - 1)
    if step >= steps:
        raise OpdctlError(f"--step {step}: {run.path} has steps 0 to {steps - 1}")
    if not run.can_sample(step):
        raise OpdctlError(
            f"--step {step}: step {step} has no student yet, {current} updates are done",
            hint=f"run `{run.command_line('train')}`",
        )
    return step
