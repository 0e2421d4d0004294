"""Kills of workers, ranks, nodes and drivers of a Ray cluster: `python -m helpers.ray_kills --kills 30`.

Each run is killed once, at a random moment, and must end with the artifacts of a run that was not. A driver that was
killed is started again, with the same command; everything else is Ray's to start again.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from helpers.commands import QUICKSTART, artifacts, sets
from helpers.ray_cluster import start_cluster

Choose = Callable[[Sequence[Any]], Any]
KINDS = ("worker", "rank", "node", "driver")
SETTINGS = ("rollout.num_parts=4", "rollout.max_tokens=40", "train.steps=3")
APART = ("pipeline.placement=apart", "hardware.rollout_gpus=2", "hardware.score_gpus=1")
PROCESS_NAMES = {"worker": "ray::StageWorker", "rank": "opdctl.cluster.rank_process"}
LIMIT_SECONDS = 600


def start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `opdctl train --launcher ray` and return its process."""
    words = ["train", "--recipe", str(QUICKSTART), *sets(*SETTINGS, *overrides), "--output", str(path)]
    command = [sys.executable, "-m", "opdctl", *words, "--launcher", "ray"]
    log = path.with_suffix(".log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, text=True)


def kill(kind: str, cluster: Any, driver: subprocess.Popen[str], choose: Choose) -> str:
    """Kill one process, or all of a node, and return what it was; "" if there is none of the kind yet."""
    if kind == "driver":
        driver.kill()
        return "driver"
    if kind == "node":
        node = choose([node for node in cluster.list_all_nodes() if node is not cluster.head_node])
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=2)
        return "node"
    found = [process for process in psutil.process_iter() if PROCESS_NAMES[kind] in _command_line(process)]
    if not found:
        return ""
    process = choose(found)
    process.kill()
    return f"{kind} {process.pid}"


def _has_passed(moment: float) -> bool:
    return time.monotonic() > moment


def read_artifacts(run: Path) -> dict[str, bytes]:
    """Return the artifacts without the model cards, which have the recipe."""
    return {name: data for name, data in artifacts(run).items() if not name.endswith("README.md")}


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def run_with_kill(
    path: Path,
    kind: str,
    is_time: Callable[[], bool],
    cluster: Any,
    choose: Callable[[Sequence[Any]], Any],
    *overrides: str,
) -> str:
    """Train, kill once as soon as `is_time()`, and return what was killed. Raises AssertionError if the run fails."""
    killed, driver = "", start(path, *overrides)
    deadline = time.monotonic() + LIMIT_SECONDS
    while driver.poll() is None and time.monotonic() < deadline:
        if not killed and is_time():
            killed = kill(kind, cluster, driver, choose)
        time.sleep(0.05)
    if kind == "driver" and killed:
        driver = start(path, *overrides)
        driver.wait(LIMIT_SECONDS)
    assert driver.returncode == 0, path.with_suffix(".log").read_text()[-5000:]
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator, counts = random.Random(options.seed), Counter[str]()
    folder = Path(tempfile.mkdtemp(prefix="ray-kills-"))
    with start_cluster() as cluster:
        begin = time.monotonic()
        for name, overrides in (("colocated", ()), ("apart", APART)):
            process = start(folder / name, *overrides)
            assert process.wait(LIMIT_SECONDS) == 0, name
        seconds = (time.monotonic() - begin) / 2
        expected = read_artifacts(folder / "colocated")
        assert read_artifacts(folder / "apart") == expected
        for number in range(options.kills):
            kind, path = generator.choice(KINDS), folder / f"run-{number}"
            overrides = APART if kind == "worker" else generator.choice([(), APART])
            is_time = partial(_has_passed, time.monotonic() + generator.uniform(0.2, 0.9) * seconds)
            killed = run_with_kill(path, kind, is_time, cluster, generator.choice, *overrides)
            assert read_artifacts(path) == expected, f"{path}: {killed}"
            counts[kind if killed else "too late"] += 1
            sys.stdout.write(f"{number}: {killed or 'ended before'}, the same artifacts\n")
            sys.stdout.flush()
            shutil.rmtree(path)
    sys.stdout.write(f"{dict(counts)}: every run ended with the same artifacts\n")


if __name__ == "__main__":
    main()
