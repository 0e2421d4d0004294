"""Where the time from the command to the first sampled token goes, by phase: `python tests/bench/startup.py`.

A new process trains the quickstart until its first token and reports when it reached the end of each phase. Medians of
several processes; the first, which fills the caches of the file system, is not counted.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
PHASES = {
    "interpreter, this script": "start",
    "imports of the command line": "cli",
    "recipe": "recipe",
    "imports of torch, transformers and the stages": "libraries",
    "a new run: models checked": "models",
    "prompts rendered, tokenized": "prompts",
    "prompts stored, run directory": "run",
    "engines with student and teacher": "engines",
    "the first token": "token",
}
"""The phases with the moments at which they end."""


def report_moments(folder: str) -> None:
    """Train in this process until the first token, and print the moments as a JSON object: seconds since the epoch."""
    moments = {"start": time.time()}
    from opdctl import garbage_collection, signals

    garbage_collection.defer_collections()  # as __main__.py does
    from opdctl.cli.main import main

    moments["cli"] = time.time()

    def mark_end(owner: Any, function: str, moment: str) -> None:
        call: Callable[..., Any] = getattr(owner, function)

        def marked(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            moments.setdefault(moment, time.time())
            return result

        setattr(owner, function, marked)

    from opdctl.cli import train

    def after_imports(recipe: Any, path: Path, *needs: str) -> Any:
        moments["libraries"] = time.time()
        from opdctl.engines import transformers
        from opdctl.engines.pool import EnginePool
        from opdctl.runs import open as opening

        mark_end(opening, "prepare_models", "models")
        mark_end(opening, "check_lengths", "prompts")
        mark_end(EnginePool, "start", "engines")
        sample = transformers.sample

        def sample_and_end(*arguments: Any) -> None:
            sample(*arguments)
            moments["token"] = time.time()
            print(json.dumps(moments), flush=True)
            sys.stdout.close()
            signals.os._exit(0)

        transformers.sample = sample_and_end
        return open_run(recipe, path, *needs)

    open_run = train.open_run_and_device
    mark_end(train, "read_recipe_options", "recipe")
    train.open_run_and_device = after_imports
    mark_end(train, "open_run_and_device", "run")
    words = ["train", "--recipe", str(ROOT / "recipes/quickstart.toml"), "--set", "eval.every_steps=0"]
    sys.argv = ["opdctl", *words, "--output", f"{folder}/run", "-q"]
    main()


def measure() -> dict[str, float]:
    """Return the seconds of each phase in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        words = [sys.executable, __file__, "--report", folder]
        result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    moments: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    ends = [start, *(moments[moment] for moment in PHASES.values())]
    return {phase: end - before for phase, (before, end) in zip(PHASES, itertools.pairwise(ends), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--report", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.report:
        report_moments(args.report)
        return
    times = [measure() for _ in range(args.repeat + 1)][1:]
    print("| phase | seconds |\n|---|---:|")
    for phase in PHASES:
        print(f"| {phase} | {median(each[phase] for each in times):.2f} |")
    print(f"| all | {median(sum(each.values()) for each in times):.2f} |")


if __name__ == "__main__":
    main()
