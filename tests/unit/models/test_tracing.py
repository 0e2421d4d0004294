"""The recorded pass for one more token, beside the model's own code: the same bits, or no recording."""

import itertools

import pytest
import torch
from helpers.decoding import OTHER_CACHES, PLAIN_CACHES, decode, model_of

from opdctl.models.tracing import TracedDecoding


@pytest.mark.parametrize("name", PLAIN_CACHES)
def test_recorded_passes_have_the_bits_of_the_model(name):
    model = model_of(name)
    traced = TracedDecoding(model)
    for lengths in ([6, 6, 6], [3, 7, 6], [5]):  # without and with a mask
        own = decode(model, lengths, 80, None, drop_after=30)
        recorded = decode(model, lengths, 80, traced, drop_after=30)
        assert all(map(torch.equal, recorded, own))
        assert traced.is_recorded(has_mask=len(set(lengths)) > 1)


def test_weights_may_change_in_place():
    model = model_of("qwen3")
    traced = TracedDecoding(model)
    before = decode(model, [6, 6], 8, traced)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = decode(model, [6, 6], 8, traced)
    assert all(map(torch.equal, after, decode(model, [6, 6], 8, None)))
    assert not torch.equal(after[0], before[0])


def by_value(states):
    return states if states.sum() > 0 else -states


def by_rows(states):
    return states if states.shape[0] > 1 else -states


def by_many_rows(states):
    return states if states.shape[0] < 100 else -states


CALLS = itertools.count()


def by_call(states):
    return states * (1 + next(CALLS) % 2)


@pytest.mark.parametrize("change", [by_value, by_rows, by_many_rows, by_call])
def test_pass_that_depends_on_more_than_its_inputs_is_not_recorded(change, monkeypatch):
    model = model_of("qwen3")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: change(forward(states)))
    traced = TracedDecoding(model)
    recorded = decode(model, [6, 6, 6], 12, traced, drop_after=4)
    assert not traced.is_recorded(has_mask=False)
    if change is not by_call:
        assert all(map(torch.equal, recorded, decode(model, [6, 6, 6], 12, None, drop_after=4)))


@pytest.mark.parametrize("name", OTHER_CACHES)
def test_other_models_run_their_own_code(name):
    model = model_of(name)
    traced = TracedDecoding(model)
    own = decode(model, [6, 6, 6], 12, None)
    assert all(map(torch.equal, decode(model, [6, 6, 6], 12, traced), own))
    assert not traced.is_recorded(has_mask=False)
