"""A bfloat16 student in training: the numbers of its engine, on any number of processes, over float32 weights."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets
from helpers.ranks import call_in_ranks, rank_variables
from safetensors.torch import load_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from opdctl import distributed
from opdctl.runs.run import Run
from opdctl.training.trainer import Trainer

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A run in bfloat16 whose first step is sampled and scored. Each response is a micro-batch by itself."""
    path = tmp_path_factory.mktemp("scored") / "run"
    settings = ("student.dtype=bfloat16", "rollout.max_tokens=40", "train.tokens_per_micro_batch=1")
    for command in ("rollout", "score-teacher"):
        assert invoke(command, "--recipe", QUICKSTART, *sets(*settings), "--output", path).code == 0
    return path


@pytest.fixture(autouse=True)
def group_of_one():
    """A trainer of a sharded student creates it."""
    yield
    distributed.destroy_process_group()


def copy(scored, path, lora=None, **train):
    """Return a copy of the run with other settings."""
    run = Run.load(Path(shutil.copytree(scored, path)))
    sections = {"train": train, "lora": lora or {}}
    changed = {name: getattr(run.recipe, name).model_copy(update=values) for name, values in sections.items()}
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update=changed))


def update(run):
    """Make the first step's update. Return its metrics."""
    if distributed.world_size() > 1:
        distributed.init_process_group(use_gpu=False, on_peer_failure=lambda failure: None)
    trainer = Trainer(run, "cpu")
    metrics = trainer.train_step(0)
    trainer.finish_save()
    trainer.close()
    distributed.destroy_process_group()
    return {name: metrics[name] for name in ("loss", "grad_norm", "k1", "mismatch_kl", "entropy", "ratio")}


@pytest.mark.parametrize(
    ("lora", "train"),
    [({}, {}), (LORA, {"gradient_checkpointing": True}), ({}, {"master_dtype": "bfloat16"})],
    ids=["full", "LoRA, checkpointing", "bfloat16 weights"],
)
def test_two_processes_train_the_student_of_one(scored, tmp_path, lora, train):
    """In the same micro-batches. The order of sums over them differs, so hardly a weight does, and by an update."""
    one, two = (copy(scored, tmp_path / name, lora, **train) for name in ("one", "two"))
    (metrics,) = call_in_ranks(partial(update, one), rank_variables(1))  # threads of a trainer do not survive a fork
    for of_rank in call_in_ranks(partial(update, two), rank_variables(2)):
        assert of_rank == pytest.approx(metrics, rel=1e-5)
    before = load_file(one.student.path / "model.safetensors")
    students = [load_file(run.student_path(1) / "model.safetensors") for run in (one, two)]
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=2**-7, atol=2 * one.recipe.train.learning_rate)
        assert (students[1][name] != value).float().mean() < (1e-2 if train.get("master_dtype") else 1e-3)
        assert "proj" not in name or (value != before[name].bfloat16()).any()


def test_log_probs_are_those_of_the_engine(scored, tmp_path):
    """The engine adds the residual stream in bfloat16. In float32, as under autocast, the KL would be 1e-4 or more."""
    assert 0 < update(copy(scored, tmp_path / "run"))["mismatch_kl"] < 2e-5


def test_update_continues_after_an_error_within_a_pass(scored, tmp_path, monkeypatch):
    """A single process makes the micro-batches smaller after an out-of-memory error, here in the backward pass."""
    failed = copy(scored, tmp_path / "failed", tokens_per_micro_batch=4000)
    smaller = copy(scored, tmp_path / "smaller", tokens_per_micro_batch=212)
    remaining = [2]

    class Exhausted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.view_as(hidden)

        @staticmethod
        def backward(ctx, grad):
            remaining[0] -= 1
            if remaining[0] == 0:  # the first layer: the second is done, and some matrices of this one
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return grad

    forward = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, hidden: forward(self, Exhausted.apply(hidden)))
    metrics = update(failed)
    assert remaining[0] < 0
    assert metrics == pytest.approx(update(smaller), rel=1e-2)  # their gradients are rounded to bfloat16
