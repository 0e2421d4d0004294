"""Everything that the sweep examines, and what it found."""

import contextlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import transformers
from helpers import architectures
from pebble import ProcessExpired, ProcessPool
from sweep import quantized, tokenizer_kinds
from sweep.models import examine_model
from sweep.outcomes import Outcome

TIMEOUT_SECONDS = 120
MAX_MEMORY_BYTES = 8 * 2**30
CATEGORIES: Mapping[str, Iterable[str]] = {
    "model": architectures.NAMES,
    "quantized": quantized.METHODS,
    "tokenizer": tokenizer_kinds.KINDS,
}


@dataclass
class Finding:
    """What became of a model, a quantized teacher or a tokenizer, by what it was used for."""

    category: str
    name: str
    outcomes: dict[str, Outcome]
    seconds: float


def limit_memory() -> None:
    """Limit the address space of this process, so that a wrong config cannot use up the machine's memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.RLIM_INFINITY))


def examine(category: str, name: str, uses: tuple[str, ...] = ("training", "lora")) -> Finding:
    """Build one of `CATEGORIES` and use it. Messages are discarded."""
    start = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name_of_folder, open(os.devnull, "w") as null:
        folder = Path(name_of_folder)
        with contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
            if category == "model":
                outcomes = examine_model(name, folder, uses)
            elif category == "quantized":
                outcomes = {"scores": quantized.examine_quantized(name, folder)}
            else:
                outcomes = {"prompts": tokenizer_kinds.examine_tokenizer(name, folder)}
    return Finding(category, name, outcomes, time.monotonic() - start)


def examine_all(items: Sequence[tuple[str, str]], uses: tuple[str, ...], workers: int) -> Iterator[Finding]:
    """Yield the finding of each (category, name).

    Each has a new process, so that neither a crash nor what an earlier model changed matters.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a fork server does not inherit sys.path
    context = get_context("forkserver")
    context.set_forkserver_preload(["sweep.findings"])
    with ProcessPool(workers, max_tasks=1, initializer=limit_memory, context=context) as pool:
        futures = [pool.schedule(examine, [category, name, uses], timeout=TIMEOUT_SECONDS) for category, name in items]
        for (category, name), future in zip(items, futures, strict=True):
            try:
                yield future.result()
            except (TimeoutError, ProcessExpired) as error:
                crash = Outcome("error", f"{type(error).__name__}: {error}")
                yield Finding(category, name, dict.fromkeys(uses, crash), 0.0)
