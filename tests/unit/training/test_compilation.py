"""Compiled blocks: the numbers of the others, and one compilation for all lengths of sequences."""

import pytest
import torch
from helpers.commands import small_recipe
from helpers.models import SMALL, save
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdctl.errors import OpdctlError
from opdctl.models import batching
from opdctl.models.directory import ModelDir
from opdctl.models.logprobs import response_states
from opdctl.training import compilation
from opdctl.training.policy import load_policy

LENGTHS = ([7, 9], [5, 20, 8], [3, 3, 3, 4])


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 9, "head_dim": 8}  # torch compiles a function anew eight times at most
    return ModelDir(save(Qwen3ForCausalLM(Qwen3Config(**SMALL | layers)), tmp_path_factory.mktemp("model")), "float32")


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def states_and_gradients(model, packs):
    """Return the hidden states of batches of different lengths, and the gradients of their sum."""
    join = batching.pack_batch if packs else batching.pad_batch
    states = []
    for lengths in LENGTHS:
        ids = [torch.arange(1, length + 3).numpy() % SMALL["vocab_size"] for length in lengths]
        batch = join([(each[:2], each[2:]) for each in ids], "cpu")
        hidden_ND, _ = response_states(model, batch.input_ids_BT, batch.rows_N, batch.positions_N, batch.packed)
        hidden_ND.square().sum().backward()
        states.append(hidden_ND.detach())
    return states, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("settings", [("train.packing=false",), ("train.gradient_checkpointing=true", "lora.rank=2")])
def test_compiled_blocks_give_the_same_numbers_and_are_compiled_once(student, monkeypatch, settings):
    packs = "train.packing=false" not in settings
    expected = states_and_gradients(load_policy(student, small_recipe(*settings), "cpu"), packs)
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "COMPILE_BACKEND", counter)
    model = load_policy(student, small_recipe("train.compile=true", *settings), "cpu")
    found = states_and_gradients(model, packs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Four functions around attention, each without gradient, and for inputs without and with one: not for each layer.
    assert counter.frame_count <= 12


def test_compiler_that_fails_is_one_error(student, monkeypatch):
    def fail(graph, inputs):
        raise OSError("g++: not found")

    monkeypatch.setattr(compilation, "COMPILE_BACKEND", fail)
    with pytest.raises(OpdctlError, match=r"train\.compile: .*not found") as error:
        load_policy(student, small_recipe("train.compile=true"), "cpu")
    assert error.value.kind == "unsupported_setting"
