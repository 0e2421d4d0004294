"""What tests compute on a device and compare with the CPU. A process with a pretend GPU calls these functions."""

import dataclasses
import pkgutil
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import transformers
from helpers import engines
from helpers.commands import QUICKSTART, Result, invoke, sets, small_recipe
from helpers.decoding import emulated_graphs
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from opdctl import distributed
from opdctl.artifacts.records import Completion, TokenScores
from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import Head, map_vocab_chunks, output_head
from opdctl.recipe.schema import RolloutColumns, Sampling, Score
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.training import compilation
from opdctl.training.trainer import Trainer

_T = TypeVar("_T")
STORED_COLUMNS = ("rollout.max_tokens=24", "rollout.entropy=true", "rollout.top_k=16", "score.entropy=true")
STORED_COLUMNS += ("score.top_k=16", "score.student_top_k=true", "score.hidden_states=true")
"""Settings of a run whose responses and scores serve every objective."""

TINY = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
"""Of a Qwen3 of which only the output matrix is used."""
TRAINING = {
    "policy_gradient": (),
    "top_d": ("objective.name=top_d",),
    "sampled_kl": ("objective.name=sampled_kl",),
    "full vocabulary": ("objective.name=reverse_kl", "objective.support=full"),
    "the teacher's top-k": ("objective.name=jsd", "objective.support=teacher", "objective.top_k=16"),
    "the student's top-k": ("objective.name=forward_kl", "objective.support=student", "objective.top_k=16"),
    "the trainer's log-probs": ("weight.logprobs=trainer",),
    "two updates": ("weight.name=tip", "train.updates_per_step=2", "train.tokens_per_micro_batch=100"),
    "LoRA with dropout": ("lora.rank=4", "lora.dropout=0.1"),
    "LoRA with gradient checkpointing": ("lora.rank=4", "train.gradient_checkpointing=true"),
    "FSDP2 with CPU offloading": ("train.cpu_offload=true", "train.gradient_checkpointing=true"),
}
"""Settings of a step's update on these responses and scores."""


def sample_and_score(
    device: str, dtype: str, sampling: dict[str, Any], columns: dict[str, Any], settings: dict[str, Any]
) -> tuple[list[Completion], list[TokenScores]]:
    """Sample responses with the student, load the teacher into the same engine, and score them."""
    student, teacher = (ModelDir(engines.directory(f"toy:{name}").path, dtype) for name in ("student", "teacher"))
    engine = TransformersEngine(student, device)
    requests = engines.requests(6, cut=3)
    options = {"columns": RolloutColumns(**columns)}
    completions = engine.generate(requests, Sampling(max_tokens=12, **sampling), 4, lambda n: None, **options)
    engine.load_weights(teacher)
    pairs = zip(requests, completions, strict=True)
    answered = [ScoreRequest(request.prompt_ids, done.response_ids, done.top_ids) for request, done in pairs]
    scores = engine.score(answered, Score(tokens_per_batch=100, **settings), lambda n: None)
    engine.close()
    # A process cannot send the function that reads hidden states.
    return completions, [dataclasses.replace(s, hidden_states=s.hidden_states and s.hidden_states()) for s in scores]


def sample_and_score_by_graphs(device: str) -> tuple[list[Completion], list[TokenScores], int]:
    """Like `sample_and_score`, with an emulation of CUDA graphs. Return also the number of their replays."""
    with emulated_graphs() as graphs:
        completions, scores = sample_and_score(device, "float32", {}, {}, {})
    return completions, scores, graphs.replays


def score_first_step(run: Path) -> Path:
    """Sample and score the first step of a new run, with all columns, on the CPU."""
    for command in ("rollout", "score-teacher"):
        result = invoke(command, "--recipe", QUICKSTART, *sets(*STORED_COLUMNS, "pipeline.device=cpu"), "--output", run)
        assert result.code == 0, result.err
    return run


def train_step(device: str, run: Path, *overrides: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Update the student of a run's first step. Return the metrics, and the student that a restored trainer writes."""
    opened = dataclasses.replace(Run.load(run), recipe=small_recipe(*STORED_COLUMNS, *overrides))
    metrics = Trainer(opened, device).train_step(0)
    opened.finish_update()
    student = load_file(opened.student_path(1) / "model.safetensors")
    shutil.rmtree(opened.student_path(1))
    Trainer(opened, device)  # restores the checkpoint and writes the missing student
    restored = load_file(opened.student_path(1) / "model.safetensors")
    distributed.destroy_process_group()
    assert all(torch.equal(student[name], restored[name]) for name in student)
    return {name: value for name, value in metrics.items() if np.isscalar(value)}, student


def compiled_train_step(
    device: str, run: Path, *overrides: str
) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """Like `train_step` with compiled blocks; return also the number of graphs that torch has captured.

    They run operation by operation: torch generates no code for a pretend GPU.
    """
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(compilation, "COMPILE_BACKEND", "aot_eager"):
        metrics, student = train_step(device, run, "train.compile=true", *overrides)
    return metrics, student, counters["stats"]["unique_graphs"]


def score_by_base(device: str, run: Path, *overrides: str) -> list[TokenScores]:
    """Score the responses of a run's first step by the trainer's student, its adapters disabled after an update."""
    opened = dataclasses.replace(
        Run.load(run), recipe=small_recipe(*STORED_COLUMNS, "lora.rank=4", "train.learning_rate=1e-2", *overrides)
    )
    trainer = Trainer(opened, device)
    trainer.train_step(0)
    opened.finish_update()
    requests = [ScoreRequest(s.response.prompt_ids, s.response.response_ids) for s in read_scored(opened, 0)]
    scores = [score for _, score in trainer.base_scorer().stream_scores(requests, Score())]
    trainer.close()
    distributed.destroy_process_group()
    return scores


def run_command(device: str, *arguments: object) -> Result:
    """Run a command whose recipe does not choose the device."""
    with mock.patch("opdctl.environment.resolve_device", return_value=device):
        return invoke(*arguments)


def call_with_fault(faulty: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function while another one, whose device is its last argument, puts its tensors on the CPU."""
    correct = pkgutil.resolve_name(faulty)

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return correct(*args, **(kwargs | {"device": "cpu"})) if "device" in kwargs else correct(*args[:-1], "cpu")

    with mock.patch(faulty, on_cpu):
        return function(*arguments)


def assert_same_columns(found: Sequence[object], expected: Sequence[object], tolerance: float) -> None:
    """Compare the columns of records. tolerance: of numbers, relative and absolute."""
    for record, other in zip(found, expected, strict=True):
        for column in dataclasses.fields(record):  # type: ignore[arg-type]
            value, wanted = getattr(record, column.name), getattr(other, column.name)
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(value, wanted, rtol=tolerance, atol=tolerance, err_msg=column.name)
            else:
                assert value == wanted, column.name


def gather_offloaded_head(device: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Compute log-probs by an output matrix whose only shard FSDP2 has left on the CPU.

    Return the devices of the gathered matrix, the log-prob and the shard's gradient; the gradient; and the same of a
    plain matrix.
    """
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY))
    plain_VD, hidden_ND, ids_NK = model.lm_head.weight, torch.randn(5, TINY["hidden_size"]), torch.arange(5)[:, None]
    spec = DTensorSpec(
        DeviceMesh(device, [0]), (Shard(0),), TensorMeta(plain_VD.shape, plain_VD.stride(), torch.float32)
    )
    shard_VD = torch.nn.Parameter(DTensor(plain_VD.detach().clone(), spec, requires_grad=False))

    def logprob(weight: torch.nn.Parameter, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[Head, torch.Tensor]:
        model.lm_head.weight = weight
        head = output_head(model, TINY["vocab_size"])
        total = map_vocab_chunks(head, hidden, ids, lambda chunk: chunk.selected_logp_CK.sum())
        total.backward()
        return head, total

    logprob(plain_VD, hidden_ND, ids_NK)
    head, total = logprob(shard_VD, hidden_ND.to(device), ids_NK.to(device))
    gradient = shard_VD.grad.to_local()
    devices = [head.weight_VD.device.type, total.device.type, gradient.device.type]
    torch.distributed.destroy_process_group()
    return devices, gradient, plain_VD.grad
