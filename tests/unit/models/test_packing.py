"""Packed sequences: the hidden states and gradients that each has alone, for any lengths."""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers.models import SMALL, make
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from opdctl.models import packing
from opdctl.models.batching import pack_batch, pad_batch
from opdctl.models.logprobs import response_states
from opdctl.models.self_check import enable_packing

KINDS = {
    "qwen3": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 4, "head_dim": 16, "num_key_value_heads": 1},  # every second layer has the window
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def build(kind: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "initializer_range": 0.3, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # the others refuse float64
    return model.eval().to(dtype)


def pairs_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 60, n).astype(np.int32) for n in pair) for pair in lengths]


def states_and_gradient(model, batches):
    """Return the hidden states, and the gradient of all parameters for a loss that weights each state differently."""
    model.zero_grad()
    states = [response_states(model, b.input_ids_BT, b.rows_N, b.positions_N, b.packed)[0] for b in batches]
    states_ND = torch.cat(states)
    weights_ND = torch.arange(states_ND.numel()).remainder(7).reshape(states_ND.shape).to(states_ND)
    (states_ND * weights_ND).sum().backward()
    return states_ND.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    """Return a plain model, and the same one with packing, both in float64."""
    plain = build(request.param)
    packed = copy.deepcopy(plain)
    assert enable_packing(packed, 1e-3) is None
    return plain, packed


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=6))
def test_packed_sequences_are_those_of_one_pass_each(models, lengths):
    plain, packed = models
    pairs = pairs_of([*lengths, (2, 7)])
    expected, expected_gradient = states_and_gradient(plain, [pad_batch([pair], "cpu") for pair in pairs])
    states, gradient = states_and_gradient(packed, [pack_batch(pairs, "cpu")])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)
    assert gradient.keys() == expected_gradient.keys()
    for name, value in gradient.items():
        # The norms and rotary embeddings of transformers are float32 even in a float64 model.
        assert (value - expected_gradient[name]).norm() <= 1e-5 * expected_gradient[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_near_to_float64_as_padded(kind):
    """With checkpointing, which runs each layer twice."""
    pairs = pairs_of([(3, 21), (9, 2), (5, 12), (2, 15), (1, 1)])
    expected, expected_gradient = states_and_gradient(build(kind), [pad_batch([pair], "cpu") for pair in pairs])
    model = build(kind, torch.float32)
    model.gradient_checkpointing_enable()
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")
    errors = []
    for batch in (pad_batch(pairs, "cpu"), pack_batch(pairs, "cpu")):
        if batch.packed:
            assert enable_packing(model, 1e-4) is None
        states, gradient = states_and_gradient(model, [batch])
        found = torch.cat([states.flatten(), *(gradient[name].flatten() for name in expected_gradient)]).double()
        reference = torch.cat([expected.flatten(), *(value.flatten() for value in expected_gradient.values())])
        errors.append(float((found - reference).norm() / reference.norm()))
    assert max(errors) < 1e-5
    assert errors[1] < 3 * errors[0]


def test_kernel_for_different_lengths_gets_each_sequence():
    """The kernel of CUDA, replaced by a float64 product for each sequence."""

    def attend(query, key, value, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
        assert query.shape[1] == 2
        assert key.shape[1] == 1
        assert enable_gqa
        assert window_size == (-1, 0)
        assert ends.dtype == torch.int32
        assert longest == longest_key == int(ends.diff().max())
        outputs = []
        for start, end in zip(ends[:-1].tolist(), key_ends[1:].tolist(), strict=True):
            scores = scale * torch.einsum("qhd,kgd->hqk", query[start:end], key[start:end])
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hqk,kgd->qhd", probabilities, value[start:end]))
        return torch.cat(outputs)

    model, pairs = build("qwen3"), pairs_of([(3, 5), (2, 7), (4, 4)])
    assert enable_packing(model, 1e-5) is None
    expected, _ = states_and_gradient(model, [pack_batch(pairs, "cpu")])
    with patch.object(packing, "_has_kernel", lambda *qkv: True), patch.object(packing, "varlen_attn", attend):
        states, _ = states_and_gradient(model, [pack_batch(pairs, "cpu")])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)


def test_attention_across_sequences_is_refused(monkeypatch):
    """As by a kernel that ignores the lengths, and by a mask of the model's own."""
    model = make("llama")
    with monkeypatch.context() as patched:
        patched.setattr(packing.PackedSequences, "runs", property(lambda self: [(1, sum(self.lengths))]))
        assert "nats" in enable_packing(model, 1e-3)
    assert not packing.is_enabled(model)
    assert enable_packing(model, 1e-3) is None
    assert packing.is_enabled(model)
