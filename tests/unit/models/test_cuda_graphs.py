"""The pass for one more token over a cache of a fixed size, with an emulation of its capture as a CUDA graph."""

from dataclasses import replace

import pytest
import torch
from helpers.decoding import OTHER_CACHES, PLAIN_CACHES, decode, emulated_graphs, model_of

from opdctl.models import cuda_graphs
from opdctl.models.tracing import StaticInputs, TracedDecoding

TOKENS, DROP_AFTER = 140, 30


@pytest.fixture
def graphs():
    with emulated_graphs() as emulation:
        yield emulation


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 7, 6], [5]], ids=str)
@pytest.mark.parametrize("name", PLAIN_CACHES)
def test_captured_passes_have_the_numbers_of_the_model(name, lengths, graphs):
    """The cache grows, and sequences leave the batch."""
    model = model_of(name)
    own = decode(model, lengths, TOKENS, None, drop_after=DROP_AFTER)
    captured = decode(model, lengths, TOKENS, TracedDecoding(model), drop_after=DROP_AFTER)
    for found, expected in zip(captured, own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs.captures in (3, 4)  # at first, after the drop, and where the cache has grown
    assert graphs.replays == TOKENS - 1 - graphs.captures  # the first pass is the model's own


def test_weights_may_change_in_place(graphs):
    model = model_of("qwen3")
    traced = TracedDecoding(model)
    before = decode(model, [6, 6], 8, traced)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after, own = decode(model, [6, 6], 8, traced), decode(model, [6, 6], 8, None)
    for found, expected, old in zip(after, own, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found - old).abs().max() > 1e-3
    assert graphs.captures == 2  # one for each batch


@pytest.mark.parametrize("name", OTHER_CACHES)
def test_other_models_run_their_own_code(name, graphs):
    model = model_of(name)
    own = decode(model, [6, 6, 6], 12, None)
    assert all(map(torch.equal, decode(model, [6, 6, 6], 12, TracedDecoding(model)), own))
    assert not graphs.captures


def without_mask(inputs, rooms):
    static = of(inputs, rooms)
    return replace(static, mask_BR=torch.ones_like(static.mask_BR))


def at_the_end(inputs, rooms):
    static = of(inputs, rooms)
    return replace(static, place_1=torch.full_like(static.place_1, rooms[0].shape[-2] - 1))


of = StaticInputs.of


@pytest.mark.parametrize("wrong", [without_mask, at_the_end])
def test_pass_with_other_numbers_is_not_captured(wrong, graphs, monkeypatch):
    model = model_of("qwen3")
    monkeypatch.setattr(StaticInputs, "of", wrong)
    own = decode(model, [3, 7, 6], 12, None)
    assert all(map(torch.equal, decode(model, [3, 7, 6], 12, TracedDecoding(model)), own))
    assert not graphs.captures


def test_pass_that_cannot_be_captured_is_the_recorded_one(graphs, monkeypatch):
    def fail(function, tensors):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    model = model_of("qwen3")
    own = decode(model, [3, 7, 6], 12, None)
    assert all(map(torch.equal, decode(model, [3, 7, 6], 12, TracedDecoding(model)), own))


def test_hidden_states_of_a_pass_remain_after_the_next_one(graphs):
    model = model_of("qwen3")
    states = decode(model, [4, 4], 8, TracedDecoding(model), copy=False)
    for found, expected in zip(states, decode(model, [4, 4], 8, None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
