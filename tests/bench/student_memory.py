"""Host memory of a sharded student, per process, while it is loaded, updated and exported.

`python tests/bench/student_memory.py --out DIR [--processes 1 2 4]` trains a random Qwen3 of about 200 million
parameters, stored in bfloat16, on CPUs with gloo. The table has the peak of the memory that the kernel cannot drop
(anonymous and shared pages, sampled every 2 ms) beyond that before loading, in MiB: the largest of all processes, next
to its share of the float32 parameters. `read` is the part of `load` before the self-checks, of a sharded student.
"""

import argparse
import ctypes
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.commands import small_recipe
from helpers.models import save
from helpers.ranks import call_in_ranks, rank_variables
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdctl import distributed
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import map_vocab_chunks, output_head, response_states
from opdctl.training import policy
from opdctl.training.export import StudentExporter
from opdctl.training.optimizer import make_adamw

M_MMAP_THRESHOLD = -3  # of glibc
CONFIG = {
    "vocab_size": 24_576,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": [1, 5],
    "bos_token_id": None,
}
MIB = 2**20


class Peak:
    """The peak of this process's resident memory without pages of files, in bytes, since the last call of `reset`."""

    def __init__(self) -> None:
        self.value = self.reset()
        threading.Thread(target=self._sample, daemon=True).start()

    def reset(self) -> int:
        self.value = _resident_bytes()
        return self.value

    def _sample(self) -> None:
        while True:
            self.value = max(self.value, _resident_bytes())
            time.sleep(0.002)


def _resident_bytes() -> int:
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    shmem = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssShmem")
    )
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") + shmem


def measure(student: ModelDir, output: Path, dtype: str) -> dict[str, Any]:
    """Return the peak of each phase beyond the memory before it was loaded, and the seconds of each."""
    torch.set_num_threads(1)
    distributed.init_process_group(use_gpu=False, on_peer_failure=lambda failure: None)
    recipe = small_recipe(f"student.dtype={dtype}", "train.gradient_checkpointing=true")
    peak = Peak()
    base, start = peak.value, time.monotonic()
    result: dict[str, Any] = {}

    def finish(phase: str) -> None:
        nonlocal start
        result[phase] = peak.value - base
        result[f"{phase}_seconds"] = time.monotonic() - start
        distributed.barrier()
        peak.reset()
        start = time.monotonic()

    check_scoring = policy.check_scoring

    def measure_reading(*arguments: Any) -> None:
        result["read"] = peak.value - base
        check_scoring(*arguments)

    policy.check_scoring = measure_reading
    result["read"] = 0
    model = policy.load_policy(student, recipe, "cpu")
    finish("load")
    optimizer = make_adamw(model, recipe.train)
    ids_BT = torch.randint(6, CONFIG["vocab_size"], (1, 64))
    hidden_ND, ids_N = response_states(model, ids_BT, torch.zeros(32, dtype=torch.int64), torch.arange(32, 64))
    head = output_head(model, CONFIG["vocab_size"])
    loss = map_vocab_chunks(head, hidden_ND, ids_N[:, None], lambda chunk: -chunk.selected_logp_CK.sum())
    loss.backward()
    del head, hidden_ND, loss
    optimizer.step()
    optimizer.zero_grad()
    finish("step")
    StudentExporter(model, student, dtype).export(output)
    finish("export")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    # Freed arrays return to the system. Otherwise heap fragmentation is measured, which GPU allocators do not have.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    path = args.out / "student"
    if not path.exists():
        model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).bfloat16()
        save(model, path)
        del model
    student = ModelDir(path, args.dtype)
    parameters = student.weights.num_parameters
    print(f"{parameters / 1e6:.0f} million parameters: {parameters * 4 / MIB:.0f} MiB in float32")
    print(
        f"{'processes':>9} {'share':>6} {'read':>5}"
        + "".join(f" {phase:>7} {'s':>5}" for phase in ("load", "step", "export"))
    )
    for count in args.processes:
        output = args.out / f"export-{count}"
        output.mkdir(exist_ok=True)
        results = call_in_ranks(partial(measure, student, output, args.dtype), rank_variables(count))
        columns = ""
        for phase in ("load", "step", "export"):
            bytes_, seconds = (max(result[key] for result in results) for key in (phase, f"{phase}_seconds"))
            columns += f" {bytes_ / MIB:>7.0f} {seconds:>5.1f}"
        read = max(result["read"] for result in results)
        print(f"{count:>9} {parameters * 4 / count / MIB:>6.0f} {read / MIB:>5.0f}{columns}", flush=True)


if __name__ == "__main__":
    main()
