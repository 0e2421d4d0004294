"""Every architecture of transformers as a tiny random model, taken through opdctl; each number is judged.

    python tests/sweep                       all models: about ten minutes on one core
    python tests/sweep llama qwen3_next      some models
"""

import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import TimeoutError
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import architectures
from pebble import ProcessExpired, ProcessPool

from sweep.models import Finding, Outcome, examine_in_new_folder

TIMEOUT_SECONDS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*architectures.CAUSAL, *architectures.VARIANTS])
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, with one thread each")
    args = parser.parse_args()
    context = get_context("forkserver")
    context.set_forkserver_preload(["sweep.models"])
    findings = []
    # A new process for each model, so that neither a crash nor what an earlier model changed matters.
    with ProcessPool(args.workers, max_tasks=1, context=context) as pool:
        futures = [(name, pool.schedule(examine_in_new_folder, [name], timeout=TIMEOUT_SECONDS)) for name in args.names]
        for name, future in futures:
            try:
                finding = future.result()
            except (TimeoutError, ProcessExpired) as error:
                crash = Outcome("error", f"{type(error).__name__}: {error}")
                finding = Finding(name, crash, crash, 0.0)
            findings.append(finding)
            print(f"{name:28} {finding.seconds:4.1f} s", end="")
            for outcome in (finding.training, finding.lora):
                print(f" | {outcome.outcome:9} {outcome.detail[:240]}", end="")
            print(flush=True)
    for use in ("training", "lora"):
        print(use, dict(Counter(getattr(finding, use).outcome for finding in findings)))
    if args.json:
        args.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=1))


if __name__ == "__main__":
    main()
