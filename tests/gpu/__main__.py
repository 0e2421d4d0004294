"""The acceptance run on GPUs: opdctl as a user starts it, with vLLM, on one GPU or on a node of several.

    python tests/gpu                         all checks for the GPUs of this machine, in at most 15 minutes
    python tests/gpu --device cpu --tiny     the same code on a CPU: the toy models and the transformers engine
    python tests/gpu --only kills,follow     the checks whose names begin so

No network is needed: random models are made on the spot. With the directory of a SmolLM2 in OPDCTL_SMOLLM2 it is
checked, too. The table is printed and written to OUT/results.md; the exit code is 1 if a check failed or did not run.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository
sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/

from gpu import machine, pairs
from gpu.checks import Check, list_checks
from gpu.workspace import ROOT, CheckError, Place, Workspace

SMOLLM2 = "OPDCTL_SMOLLM2"
STAGES = ("rollout", "score", "update")
HEADER = ("check", "models", "result", "seconds", *(f"{stage}, tokens/s" for stage in STAGES), "memory, GiB", "notes")


@dataclass(frozen=True)
class Row:
    """The result of a check: `pass`, `FAIL` or `skipped`."""

    check: Check
    result: str
    notes: str
    seconds: float = 0.0
    tokens_per_second: tuple[float | None, ...] = (None,) * len(STAGES)
    gib: float = 0.0

    def cells(self) -> list[str]:
        speeds = ["" if speed is None else f"{speed:,.0f}" for speed in self.tokens_per_second]
        numbers = [f"{self.seconds:.0f}", *speeds, f"{self.gib:.1f}"] if self.result != "skipped" else [""] * 5
        return [self.check.name, self.check.pair.name, self.result, *numbers, self.notes]


def run_check(check: Check, place: Place, number: int) -> Row:
    """Run a check and return its row, whatever happens."""
    if check.gpus > len(place.gpus):
        return Row(check, "skipped", f"needs {check.gpus} GPUs")
    if time.monotonic() > place.deadline:
        return Row(check, "FAIL", "the time of the acceptance run was over")
    work = Workspace(place, re.sub(r"\W+", "-", f"{number:02} {check.name}"), check.pair)
    peak, start = machine.MemoryPeak(), time.monotonic()
    result = "pass"
    try:
        with peak.sampled(place.device, work.marker):
            check.function(work)
            work.expect_no_process()
    except Exception as error:
        result = "FAIL"
        work.notes.append(str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}")
    finally:
        work.kill_all()
    last = (work.metrics() or [{}])[-1]
    speeds = tuple(last.get(f"{stage}_tokens_per_second") for stage in STAGES)
    return Row(check, result, "; ".join(work.notes), time.monotonic() - start, speeds, peak.gib)


def markdown(rows: list[Row]) -> str:
    """Return the machine and the table."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    table = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join([*machine.describe(), "", *table]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="default: vllm on a GPU")
    parser.add_argument("--tiny", action="store_true", help="toy models and few tokens")
    parser.add_argument("--processes", type=int, default=1, help="on a CPU: as if there were so many GPUs")
    parser.add_argument("--only", default="", help="names of checks, or their beginnings, separated by commas")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="for models, logs, runs and results.md")
    args = parser.parse_args()
    gpus = machine.visible_gpus() if args.device == "cuda" else [str(index) for index in range(args.processes)]
    if not gpus:
        parser.error("nvidia-smi lists no GPU that this process may use; --device cpu runs the checks on a CPU")
    out, engine = args.out.resolve(), args.engine or ("vllm" if args.device == "cuda" else "transformers")
    small = pairs.toy_pair() if args.tiny else pairs.random_pair("Qwen3 8M", out / "models", *pairs.SHARED_MEMORY)
    dense, experts = "Qwen3 0.6B", "Qwen3-MoE 2B"
    others = [] if args.tiny else [pairs.random_pair(dense, out / "models")]
    others += [] if args.tiny else [pairs.random_pair(experts, out / "models", teacher=dense)]
    others += [pairs.smollm2_pair(os.environ[SMOLLM2])] if SMOLLM2 in os.environ else []
    place = Place(out, args.device, gpus, engine, args.tiny, time.monotonic() + 60 * args.minutes)
    rows = []
    for number, check in enumerate(list_checks(place, small, others)):
        if check.name.startswith(tuple(args.only.split(","))):
            rows.append(run_check(check, place, number))
            print(*rows[-1].cells(), sep=" | ", flush=True)
    (out / "results.md").write_text(markdown(rows))
    print(f"\n{markdown(rows)}")
    return any(row.result == "FAIL" for row in rows) or not rows


if __name__ == "__main__":
    sys.exit(main())
