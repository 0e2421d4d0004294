"""Micro-batches: every token counts once, however responses are split and ranks share them."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.planted import plant, planted_run

from opdctl.losses.token_weights import IwOpd, Weight
from opdctl.runs.scored_responses import read_scored, to_weight_inputs
from opdctl.training.division import Division
from opdctl.training.microbatches import make_micro_batches, split_in_half
from opdctl.training.trainer import Trainer


@pytest.fixture(scope="module")
def micro_batches(scored_run):
    return Trainer(scored_run, "cpu").make_micro_batches(0, list(read_scored(scored_run, 0)))


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


def test_fillers_have_no_loss(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.ones(4), np.ones(2)])
    scored, weight = list(read_scored(run, 0)), FixedWeights(((1, 1, 1, 1), (1, 1)))
    for rank in range(3):
        given = (run.recipe, 0, scored, weight, "cpu", None, Division(3), rank)
        (batch,) = make_micro_batches(*given)
        assert batch.is_filler == (rank == 2)
        assert bool(batch.loss_scale_N.any()) != batch.is_filler


def test_packed_micro_batches_have_no_padding(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.ones(4), np.ones(2), np.ones(3)])
    scored, weight = list(read_scored(run, 0)), FixedWeights(((1, 1, 1, 1), (1, 1), (1, 1, 1)))
    tokens = sum(len(sample.response.prompt_ids) + len(sample.response.response_ids) for sample in scored)
    for packs in (True, False):
        given = (run.recipe, 0, scored, weight, "cpu", None, Division(packs=packs))
        (batch,) = make_micro_batches(*given)
        assert (batch.sequences.input_ids_BT.numel() == tokens) == packs
        for half in split_in_half(batch):
            assert (half.sequences.packed is not None) == packs


def test_token_loss_scales_are_weights_over_the_number_of_tokens(micro_batches):
    (batch,) = micro_batches
    torch.testing.assert_close(batch.loss_scale_N, batch.weight_N / len(batch.weight_N))


@dataclasses.dataclass(frozen=True)
class FixedWeights(Weight):
    """The weights that a test gives."""

    weights: tuple[tuple[float, ...], ...]

    def weigh_step(self, responses):
        return [np.array(weight_T, float) for weight_T in self.weights]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [[1 / 9, 2 / 9], [3 / 9], []]),
        (["denominator=selected"], [[1 / 3, 2 / 3], [1], []]),
        (["aggregate=response"], [[1 / 12, 2 / 12], [3 / 6], []]),
        # two tokens of the first response, one of the second, none of the third: 2 responses
        (["aggregate=response", "denominator=selected"], [[1 / 4, 2 / 4], [3 / 2], []]),
    ],
)
def test_denominators_by_hand(settings, expected, tmp_path):
    run = planted_run(tmp_path / "run", *(f"train.{setting}" for setting in settings))
    plant(run, 0, [np.ones(4), np.ones(2), np.ones(3)])
    weight, scored = FixedWeights(((1, 2, 0, 0), (3, 0), (0, 0, 0))), list(read_scored(run, 0))
    batches = make_micro_batches(run.recipe, 0, scored, weight, "cpu")
    scales = {}
    for batch in batches:
        pairs = zip(batch.samples, batch.sequences.split(batch.loss_scale_N), strict=True)
        scales |= {sample.response.sample_id: scale_T.tolist() for sample, scale_T in pairs}
    for sample, scale_T in zip(scored, expected, strict=True):
        assert scales[sample.response.sample_id] == pytest.approx(scale_T)


def test_weights_in_training_and_in_the_analysis_are_equal(scored_run, micro_batches):
    weights = {
        sample.response.sample_id: weight_T
        for batch in micro_batches
        for sample, weight_T in zip(batch.samples, batch.sequences.split(batch.weight_N), strict=True)
    }
    for sample in read_scored(scored_run, 0):
        expected = IwOpd(0.5)(to_weight_inputs(sample, 0))
        np.testing.assert_allclose(weights[sample.response.sample_id].numpy(), expected, rtol=0, atol=1e-6)
