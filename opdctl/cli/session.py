"""What every command does around its work: error handling, reading the recipe, opening the run, JSON output."""

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from opdctl import console, distributed, garbage_collection, signals
from opdctl.errors import DISK_FULL_ERRNOS, WRITE_ERRNOS, ExitCode, OpdctlError, is_out_of_memory

if TYPE_CHECKING:
    from opdctl.recipe.load import Purpose
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run

RERUN_HINT = "run the same command again to resume"


@contextlib.contextmanager
def command_session(verbose: bool | None, *, as_json: bool) -> Iterator[None]:
    """Set up messages and signals; turn every error into one message and an exit code."""
    is_other_rank = not distributed.is_main()  # other ranks report their errors only
    level = {None: 0, True: 1, False: -1}[verbose]
    os.umask(os.umask(0) | 0o002)  # never create world-writable files, whatever the umask
    signals.install_handlers()
    prefix = f"rank {distributed.rank()}: " if is_other_rank else ""
    with console.settings(-1 if is_other_rank else level, prefix, is_stdout_json=as_json):
        try:
            with _report_errors(verbose=bool(verbose)), signals.raise_signals():
                yield
                signals.check()
                distributed.wait_for_end()
        finally:
            distributed.destroy_process_group()


@contextlib.contextmanager
def _report_errors(*, verbose: bool) -> Iterator[None]:
    """Turn an error into one message and an exit. After a signal any error is one of stopping."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        raise typer.Exit(_report_stop(signals.received() or signals.StopRequested(signal.SIGINT))) from error
    except Exception as error:
        if stop := signals.received():
            raise typer.Exit(_report_stop(stop)) from error
        raise _report_exception(error, verbose=verbose) from error


def _report_stop(stop: signals.StopRequested) -> int:
    """Report a signal and return the exit code. torchrun sends one to the other ranks too when a rank fails."""
    if (failure := distributed.peer_failure()) and failure.exit_code not in signals.SIGNAL_CODES.values():
        return _report_peer_failure(failure)
    distributed.report_failure(f"stopped by {stop.name}", stop.exit_code)
    if distributed.is_main():
        console.error(f"Stopped by {stop.name}: finished parts are kept", RERUN_HINT)
    return stop.exit_code


def _report_peer_failure(failure: distributed.Failure | None) -> int:
    """Report that another rank ended, and return the exit code: that of the other rank if it is known."""
    message = failure.message if failure else "another rank ended without a message, as by a signal"
    hint = "the launcher's output may name the signal; if it is SIGKILL, the usual cause is that memory ran out"
    console.error(f"Failed rank: {message}", hint if failure is None or failure.is_lost else None)
    return failure.exit_code if failure else ExitCode.FAILED


def _exit_after_peer_failure(failure: distributed.Failure) -> None:
    """End this process, which may wait for a lost rank for ever. Its leases become stale, as after a kill."""
    os._exit(_report_peer_failure(failure))


def _report_exception(error: Exception, *, verbose: bool) -> Exception:
    """Report an error. Return what to raise: an exit, or with -v an exception of a library or of the system."""
    if isinstance(error, OpdctlError):
        distributed.report_failure(f"{error.message.partition(':')[0]}, see its error", error.code)
        console.error(error.message, error.hint)
        return typer.Exit(error.code)
    if isinstance(error, BrokenPipeError):  # stdout is closed; nothing to report
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
        return typer.Exit(ExitCode.FAILED)
    if distributed.is_peer_failure(error):
        return typer.Exit(_report_peer_failure(distributed.peer_failure()))
    distributed.report_failure(f"{type(error).__name__}, see its error", ExitCode.FAILED)
    if is_out_of_memory(error):
        hint = "reduce rollout.batch_size, score.tokens_per_batch or train.tokens_per_micro_batch"
        console.error(f"Out of memory: {' '.join(str(error).split())[:300]}", hint)
        return typer.Exit(ExitCode.UNAVAILABLE)
    if isinstance(error, OSError) and error.errno in (*DISK_FULL_ERRNOS, *WRITE_ERRNOS):
        console.error(f"Failed write: {error.filename or 'a file'}: {error.strerror}", None)
        return typer.Exit(ExitCode.UNAVAILABLE)
    if verbose:
        return error
    console.error(f"Internal error: {type(error).__name__}: {error}", "run again with -v for the traceback")
    return typer.Exit(ExitCode.FAILED)


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, from rank 0 alone."""
    from opdctl.artifacts.versions import SCHEMA_VERSION

    if distributed.is_main():
        sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **value}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def named_run(run_dir: Path | None, option: Path | None) -> Path | None:
    """Return the run that the argument or `--run` names, if one does.

    Raises:
        OpdctlError: both do, and differ.
    """
    if run_dir and option and run_dir != option:
        raise OpdctlError("invalid_usage", f"RUN_DIR {run_dir}, and --run {option}", hint="give one of them")
    return run_dir or option


def named_or_newest_run(run_dir: Path | None, option: Path | None = None) -> Path:
    """Return the run that the argument or `--run` names, else the newest one under runs/, which is logged.

    Raises:
        OpdctlError: none is named, and there is none.
    """
    from opdctl.runs.layout import newest_run

    named = named_run(run_dir, option)
    if named is None:
        named = newest_run()
        console.info(f"using the newest run, {named}")
    return named


def read_recipe_options(
    recipes: list[str] | None, overrides: list[str] | None, named: Path | None, purpose: "Purpose" = "run"
) -> tuple["Recipe", Path]:
    """Return the recipe and the run directory: those of `--recipe`, or the recipe recorded in the run that is named,
    else in the newest. `--set` overrides the recipe. purpose: of the command, which decides what code is trusted.

    Raises:
        OpdctlError: there is no run, or the recipe is invalid; the recorded one asks for code that is not trusted.
    """
    from opdctl.recipe.library import find_recipe, recipe_names
    from opdctl.recipe.load import load_recipe
    from opdctl.runs.layout import run_path
    from opdctl.runs.run import read_recipe

    if recipes:
        recipe = load_recipe([find_recipe(name) for name in recipes], overrides or [])
        return recipe, run_path(recipe, named)
    path = named_or_newest_run(named)
    if path.suffix == ".toml" or (not path.exists() and str(path) in recipe_names()):
        hint = f"give it as --recipe {shlex.quote(str(path))}"
        raise OpdctlError("missing_run", f"{path} is a recipe, not a run directory", hint=hint)
    return read_recipe(path, overrides or [], purpose), path


def open_run_and_device(recipe: "Recipe", path: Path, *needs: str, check_source: bool = True) -> tuple["Run", str]:
    """Open the run with the models that the command reads, and set torch up. Return the run and the device.

    Raises:
        OpdctlError: the processes of a launcher do not meet, or were started with different recipes.
    """
    from opdctl.runs.open import open_run

    join_process_group(recipe, path)
    if not distributed.is_main():
        distributed.barrier()
        distributed.wait_until_visible((path / "run.json").exists, str(path / "run.json"))
    run = open_run(recipe, path, needs=needs, check_source=check_source and distributed.is_main())
    if distributed.is_main():
        distributed.barrier()
    return run, set_up_device(recipe)


def join_process_group(recipe: "Recipe", path: Path) -> None:
    """Join the other processes of the launcher, if there are several.

    Raises:
        OpdctlError: they do not meet, or were started for another run or with another recipe.
    """
    use_gpu = recipe.pipeline.device != "cpu"
    distributed.init_process_group(use_gpu=use_gpu, on_peer_failure=_exit_after_peer_failure)
    commands = distributed.gather_objects((str(path), recipe.to_toml()))
    if others := [rank for rank, command in enumerate(commands) if command != commands[0]]:
        raise OpdctlError(
            "invalid_usage",
            f"rank {others[0]} has another recipe or run than rank 0: {commands[others[0]][0]}, {commands[0][0]}",
            hint="start independent runs in separate job steps, each with `srun --ntasks=1`",
        )


def set_up_device(recipe: "Recipe") -> str:
    """Set the number of torch's threads by the recipe, and return the device. Imports are done by now."""
    garbage_collection.restore_collections()
    import torch

    from opdctl.environment import resolve_device

    if recipe.pipeline.threads:
        torch.set_num_threads(recipe.pipeline.threads)
    is_on_other_nodes = recipe.pipeline.launcher == "ray" and not distributed.is_launched()
    device = "cpu" if is_on_other_nodes else resolve_device(recipe.pipeline.device)
    console.debug(f"device {device}, {torch.get_num_threads()} threads")
    if device == "cpu" and not is_on_other_nodes:
        warn_of_slow_dtypes(recipe)
    return device


def warn_of_slow_dtypes(recipe: "Recipe") -> None:
    """Warn if this CPU has no fast products of the numbers in bfloat16 that the models of the recipe have."""
    from opdctl.environment import MAX_BFLOAT16_RATIO, bfloat16_time_ratio
    from opdctl.recipe.schema import model_key

    keys = [
        f"{model_key(name)}.dtype"
        for name, model in recipe.models().items()
        if model.dtype == "bfloat16" and not model.server
    ]
    if keys and (ratio := bfloat16_time_ratio()) > MAX_BFLOAT16_RATIO:
        console.warn_once(
            f"bfloat16 products take {ratio:.0f} times as long as float32 ones on this CPU: set {', '.join(keys)} to "
            '"float32"'
        )
