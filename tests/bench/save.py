"""Seconds and memory of writing a student and a trainer state: `python tests/bench/save.py --out DIR`.

A random Qwen3 with the sizes of Qwen3-0.6B, in files of at most 600 MB, is exported in bfloat16, and its trainer state
saved, by one and by two processes on CPUs. The student is also held in memory first, as where the file system lets
writers wait: a network file system, or a local one that is mounted with `sync`. Memory is the peak of a process
during the call, less that before it.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import peak_bytes, reset_peak, resident_bytes, run_in_new_process

TREE = Path(__file__).parents[2]
SIZES = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}


def make_student(folder: Path, layers: int) -> None:
    import torch
    from helpers.models import save
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **SIZES, head_dim=128, vocab_size=151_936, num_hidden_layers=layers, tie_word_embeddings=True, bos_token_id=None
    )
    torch.set_default_dtype(torch.bfloat16)
    save(Qwen3ForCausalLM(config), folder, max_shard_size="600MB")


# ── One process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(call: Any) -> tuple[float, float]:
    """Return the seconds and the MiB of a call."""
    before = resident_bytes()
    reset_peak()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, (peak_bytes() - before) / 2**20


def measure(student: Path, out: Path) -> dict[str, tuple[float, float]]:
    """Write a student and a state, with their digests, by the opdctl of this process."""
    import torch
    from helpers.commands import small_recipe

    from opdctl import distributed
    from opdctl.artifacts.memory_directory import remove_temporary_directory
    from opdctl.models.directory import ModelDir
    from opdctl.training import checkpoint, export, policy, writing

    torch.set_num_threads(1)
    distributed.init_process_group(use_gpu=False, on_peer_failure=print)
    directory, own = ModelDir(student, "bfloat16"), dict[str, int]()
    model = policy.load_policy(directory, small_recipe("student.dtype=bfloat16"), "cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": torch.ones(())}
        optimizer.state[parameter] |= {key: torch.ones_like(parameter) for key in checkpoint.MOMENTS}
    exporter = export.StudentExporter(model, directory, "bfloat16")
    state = checkpoint.state_tensors(model, optimizer)
    held: list[writing.HeldStudent] = []

    def copy_and_complete() -> None:
        own = writing.write_student(out / "copy", held[0].copy_to, flush=False)
        writing.complete_student(out / "copy", own)

    works = {
        "student, before the next rollout": lambda: own.update(
            writing.write_student(out / "student", exporter.export, flush=False)
        ),
        "student, in the background": lambda: writing.complete_student(out / "student", own),
        "student in memory, before the next rollout": lambda: held.append(
            writing.hold_student("step-00001", exporter.export)
        ),
        "student in memory, in the background": copy_and_complete,
        "trainer state, in the background": lambda: writing.write_trainer_state(out / "state", state, lambda: "0" * 64),
    }
    result = {what: measured(work) for what, work in works.items()}
    held[0].directory.close()
    remove_temporary_directory(held[0].directory.path)
    distributed.barrier()
    distributed.destroy_process_group()
    return result


# ── All ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(student: Path, out: Path, processes: int) -> list[dict[str, Any]]:
    """Return what each rank measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    if processes > 1:
        meeting |= {"WORLD_SIZE": str(processes)}
    environment = {**os.environ, **meeting, "PYTHONPATH": f"{TREE}:{TREE / 'tests'}", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(processes):
        words = [sys.executable, str(Path(__file__).resolve()), "--measure", str(student), "--out", str(out)]
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        ranks.append(subprocess.Popen(words, env=environment | variables, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    shutil.rmtree(out)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.out)))
        return
    student = args.out / "initial"
    run_in_new_process(make_student, student, args.layers)
    print("| processes | what | s, median | s, each | MiB, rank 0 | MiB, last rank |\n|---|---|---:|---|---:|---:|")
    for processes in (1, 2):
        results = [run(student, args.out / "written", processes) for _ in range(args.repeat)]
        for what in results[0][0]:
            seconds = [max(rank[what][0] for rank in ranks) for ranks in results]
            peaks = [max(ranks[rank][what][1] for ranks in results) for rank in range(processes)]
            each = ", ".join(f"{value:.1f}" for value in sorted(seconds))
            cells = [processes, what, f"{statistics.median(seconds):.1f}", each, f"{peaks[0]:,.0f}"]
            print(f"| {' | '.join(map(str, cells))} | {peaks[-1]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
