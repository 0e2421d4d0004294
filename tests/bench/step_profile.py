"""Where the time of a step goes, by stage and kind of work: `python tests/bench/step_profile.py`.

A thread looks every two milliseconds at which function the stages are in. That costs a few percent, and does not make
one kind of work seem longer than another, as a profiler of every call does.

    python tests/bench/step_profile.py --batch 8 --completion 256
    python tests/bench/step_profile.py --toy --batch 8 --completion 116
"""

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))

import against_trl

SAMPLE_SECONDS = 0.002
KINDS = {
    "flushes to disk": [
        "artifacts/files.py:fsync_path",
        "artifacts/files.py:_flush_content",
    ],
    "checksums": ["artifacts/files.py:sha256", "models/held_weights.py:"],
    "products with the output matrix": ["models/logprobs.py:_all_logits", "models/logprobs.py:_accumulate"],
    "sampling": ["engines/sampling.py:", "engines/transformers.py:add", "engines/transformers.py:find"],
    "layers, forward": ["models/decoding.py:", "models/tracing.py:", "models/logprobs.py:response_states"],
    "passes over logits": ["models/logprobs.py:", "training/trainer.py:chunk_loss", "losses/"],
    "layers, backward": ["torch/autograd/"],
    "optimizer": ["training/trainer.py:_optimizer_step"],
    "weights of the student: export, reload": ["training/export.py:", "models/loading.py:"],
    "engine's own code": ["opdctl/engines/"],
    "wait for the record of the update": ["runs/run.py:finish_update"],
    "records, parts, other files": ["opdctl/artifacts/", "opdctl/runs/", "training/publish.py:"],
}
"""Parts of the places, "file:function", of each kind of work. The innermost function that has a kind decides."""


def find_kind(frame: FrameType | None) -> str:
    while frame:
        place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        for kind, places in KINDS.items():
            if any(each in place for each in places):
                return kind
        frame = frame.f_back
    return "other code"


class Sampler:
    """Counts the kinds of work of the main thread by stage. stage: its present one, None if nothing is counted."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.stage: str | None = None
        self._main, self._is_ended = threading.main_thread().ident, threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._is_ended.wait(SAMPLE_SECONDS):
            if (stage := self.stage) and self._main:
                self.counts[stage, find_kind(sys._current_frames()[self._main])] += 1

    def close(self) -> None:
        self._is_ended.set()


def main() -> None:
    args = against_trl.make_parser(str(__doc__)).parse_args()
    sys.setswitchinterval(SAMPLE_SECONDS / 10)
    sampler, seconds = Sampler(), Counter[str]()
    with against_trl.models(args):
        against_trl.make_prompts(args.models / "prompts.jsonl", args.batch * args.steps, args.toy)
        with against_trl.open_opdctl(args) as stages:
            for step in range(args.steps):
                for stage, run_stage in stages(step).items():
                    start, sampler.stage = time.perf_counter(), stage if step else None  # the first is a warm-up
                    run_stage()
                    sampler.stage = None
                    seconds[stage] += (time.perf_counter() - start) * (step > 0) / (args.steps - 1)
    sampler.close()
    total = sum(seconds.values())
    print(f"batch {args.batch} x {args.completion} tokens, {args.threads} threads; means of {args.steps - 1} steps\n")
    print("| stage | work | milliseconds | share of the step |\n|---|---|---:|---:|")
    for stage, of_stage in seconds.items():
        counts = {kind: count for (name, kind), count in sampler.counts.items() if name == stage}
        for kind in sorted(counts, key=counts.__getitem__, reverse=True):
            part = of_stage * counts[kind] / sum(counts.values())
            if part >= total / 200:
                print(f"| {stage} | {kind} | {part * 1e3:,.1f} | {part / total:.1%} |")
        print(f"| **{stage}** | all | {of_stage * 1e3:,.1f} | {of_stage / total:.1%} |")
    print(f"| **step** | all | {total * 1e3:,.1f} | |")


if __name__ == "__main__":
    main()
