"""Time and memory of an update with packed and with padded responses: `python tests/bench/packing.py`.

A random Qwen3 is updated on random responses, in a separate process for each measurement. `spread` has lengths from 50
to 2,000 tokens, uniform in their logarithm; `equal` has the same number of tokens in responses of one length. Seconds
are CPU time, which other work on the machine changes little. Both ways alternate, and the least time of each counts.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from against_trl import make_models
from growth import PROMPT, make_recipe, peak_gib, random_response
from processes import run_in_new_process

from opdctl.runs.open import open_run
from opdctl.training.trainer import Trainer

SHORTEST, LONGEST = 50, 2000


def measure(lengths: Sequence[int], packing: bool, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of an update, the tokens that it computes, and the memory in GiB that it adds."""
    torch.set_num_threads(args.threads)
    recipe = make_recipe("packing", args.models, args.budget, packing=packing)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(open_run(recipe, Path(folder) / "run"), "cpu")
        samples = [random_response(index, length, args.vocab) for index, length in enumerate(lengths)]
        trainer._update(0, trainer.make_micro_batches(0, samples[:1]))
        before = peak_gib()
        batches = trainer.make_micro_batches(0, samples)
        start = time.process_time()
        trainer._update(0, batches)
        seconds = time.process_time() - start
    computed = sum(batch.sequences.input_ids_BT.numel() for batch in batches)
    return {"seconds": seconds, "computed": computed, "batches": len(batches), "gib": peak_gib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print("| responses | lengths | tokens | computed: padded | packed | seconds: padded | packed | padded / packed |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        args.models = Path(folder)
        make_models(args.models, args.vocab)
        for count in args.batches:
            rng = np.random.default_rng(count)
            spread = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(int).tolist()
            for label, lengths in (("spread", spread), ("equal", [sum(spread) // count] * count)):
                found: dict[bool, dict[str, float]] = {}
                for packing in (False, True) * args.repeats:
                    result = run_in_new_process(measure, lengths, packing, args)
                    if packing not in found or result["seconds"] < found[packing]["seconds"]:
                        found[packing] = result
                padded, packed = found[False], found[True]
                print(
                    f"| {count} | {label} | {sum(lengths) + PROMPT * count:,} | {padded['computed']:,} | "
                    f"{packed['computed']:,} | {padded['seconds']:.2f} | {packed['seconds']:.2f} | "
                    f"{padded['seconds'] / packed['seconds']:.2f} | {padded['gib']:.2f} {packed['gib']:.2f} "
                    f"{padded['batches']} {packed['batches']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
