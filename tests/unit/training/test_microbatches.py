"""Micro-batches: every token counts once, however responses are split and ranks share them."""

import dataclasses

import numpy as np
import pytest
import torch

from opdctl.losses.token_weights import IwOpd
from opdctl.runs.scored_responses import read_scored, to_weight_inputs
from opdctl.training.microbatches import micro_batches_of_rank, split_in_half
from opdctl.training.trainer import Trainer


@pytest.fixture(scope="module")
def micro_batches(scored_run):
    return Trainer(scored_run, "cpu").make_micro_batches(0, list(read_scored(scored_run, 0)))


@pytest.mark.parametrize(("count", "world_size"), [(1, 2), (2, 2), (5, 2), (5, 3), (3, 8)])
def test_ranks_get_equally_many_micro_batches(count, world_size, micro_batches):
    batches = [dataclasses.replace(micro_batches[0]) for _ in range(count)]
    by_rank = [micro_batches_of_rank(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in by_rank}) == 1
    counted = [batch for of_rank in by_rank for batch in of_rank if not batch.is_filler]
    assert sorted(map(id, counted)) == sorted(map(id, batches))
    assert not any(batch.loss_scale_N.any() for of_rank in by_rank for batch in of_rank if batch.is_filler)


def test_splitting_keeps_every_response_and_token(micro_batches):
    (batch,) = micro_batches
    assert len(batch.samples) == 8
    halves = split_in_half(batch)
    assert [len(half.samples) for half in halves] == [4, 4]
    assert [sample for half in halves for sample in half.samples] == batch.samples
    for name in ("rollout_logp_N", "teacher_logp_N", "weight_N", "loss_scale_N"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(batch, name))
    (single,) = split_in_half(split_in_half(split_in_half(halves[0])[0])[0])
    assert len(single.samples) == 1


def test_token_loss_scales_are_weights_over_the_number_of_tokens(micro_batches):
    (batch,) = micro_batches
    torch.testing.assert_close(batch.loss_scale_N, batch.weight_N / len(batch.weight_N))


def test_weights_in_training_and_in_the_analysis_are_equal(scored_run, micro_batches):
    weights = {
        sample.response.sample_id: weight_T
        for batch in micro_batches
        for sample, weight_T in zip(batch.samples, batch.padded.split(batch.weight_N), strict=True)
    }
    for sample in read_scored(scored_run, 0):
        expected = IwOpd(0.5)(to_weight_inputs(sample, 0))
        np.testing.assert_allclose(weights[sample.response.sample_id].numpy(), expected, rtol=0, atol=1e-6)
