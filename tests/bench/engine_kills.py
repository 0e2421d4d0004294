"""Kills a command or its engine at random moments, and looks for processes that are left.

    PYTHONPATH=tests python tests/bench/engine_kills.py                 # 70 kills without vLLM, 30 with it
    PYTHONPATH=tests python tests/bench/engine_kills.py --kills 10 --vllm 0 --seed 1

Without vLLM the command is a process that starts an engine with a worker process (`helpers.hosted`) and lets it load
weights, sample, score, sleep and end, again and again. With vLLM it is `opdctl train` on the toy task. Every process
inherits a variable of its environment, by which all of them are found.

After the kill of a command nothing may be left within `LIMIT_SECONDS`. After the kill of an engine the command must
end by itself, with the error of the engine, or with success if it did not need the engine any more.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers.commands import QUICKSTART, sets

from opdctl.errors import ExitCode

MARKER = "OPDCTL_ENGINE_KILLS"
LIMIT_SECONDS = 60.0
FAKE = """
from helpers.hosted import host
from helpers.engines import requests
from opdctl.engines.base import ScoreRequest
from opdctl.recipe.schema import Sampling, Score
from helpers.hosted import model
for _ in range(2):
    engine = host(worker=True)
    engine.load_weights(model("other"))
    for _ in range(200):
        engine.generate(requests(200), Sampling(), 8, lambda n: None)
        engine.score([ScoreRequest(r.prompt_ids, r.prompt_ids) for r in requests(200)], Score(), lambda n: None)
    engine.release(keep_weights=True)
    engine.close()
"""
VLLM_SETTINGS = ("rollout.engine=vllm", "score.engine=vllm", "vllm.enforce_eager=true", "train.steps=2")


def commands(vllm: bool, folder: Path) -> list[str]:
    if not vllm:
        return [sys.executable, "-c", f"from opdctl.errors import OpdctlError\ntry:\n{indented(FAKE)}\n{HANDLER}"]
    options = ["--recipe", str(QUICKSTART), *sets(*VLLM_SETTINGS), "--output", str(folder / "run")]
    return [sys.executable, "-m", "opdctl", "train", *options]


HANDLER = f"except OpdctlError as error:\n    print(error.message)\n    raise SystemExit({int(ExitCode.UNAVAILABLE)})"


def indented(code: str) -> str:
    return "\n".join(f"    {line}" for line in code.splitlines())


def marked(marker: str) -> dict[int, str]:
    """Return the command lines of all processes with a marker, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and f"{MARKER}={marker}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def wait_until_gone(marker: str) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while left := marked(marker):
        if time.monotonic() > deadline:
            raise SystemExit(f"left after the kill: {left}")
        time.sleep(0.05)


def run(vllm: bool, delay: float | None, target: str, marker: str) -> str:
    """Start a command, kill the command or its engine after `delay` seconds, and return what happened as text."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        command = commands(vllm, Path(folder))
        environment = os.environ | {MARKER: marker}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        if delay is None:
            code = process.wait()
            assert code == 0, Path(folder, "output").read_text()
            wait_until_gone(marker)
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        hosts = [pid for pid, line in marked(marker).items() if "opdctl.engines.host_process" in line]
        victim = process.pid if target == "command" else next(iter(hosts), None)
        if process.poll() is not None or victim is None:
            process.kill()
            process.wait()
            wait_until_gone(marker)
            return "no engine at that moment"
        os.kill(victim, signal.SIGKILL)
        code = process.wait(LIMIT_SECONDS)
        wait_until_gone(marker)
        text = Path(folder, "output").read_text()
        if target == "command":
            assert code == -signal.SIGKILL, text
            return "command killed"
        assert code == 0 or (code == ExitCode.UNAVAILABLE and "ailed engine: " in text), (code, text)
        return f"engine killed, exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=70, help="without vLLM")
    parser.add_argument("--vllm", type=int, default=30, help="kills with vLLM")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for vllm, kills in ((False, args.kills), (True, args.vllm)):
        if not kills:
            continue
        start = time.monotonic()
        run(vllm, None, "", f"{os.getpid()}-{vllm}")
        seconds, outcomes = time.monotonic() - start, Counter[str]()
        done = 0
        while done < kills:
            target = rng.choice(["command", "engine"])
            outcome = run(vllm, rng.uniform(0, seconds), target, f"{os.getpid()}-{vllm}-{sum(outcomes.values())}")
            outcomes[outcome] += 1
            done += "killed" in outcome
            print(f"{'vLLM' if vllm else 'without vLLM'}, {done} of {kills}: {outcome}", file=sys.stderr, flush=True)
        print(f"{'with' if vllm else 'without'} vLLM: {dict(outcomes)}; no process is left", flush=True)


if __name__ == "__main__":
    main()
