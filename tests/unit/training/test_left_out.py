"""Tokens of weight 0: the model does not read what follows the last one that counts, and the gradient is the same."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.commands import small_recipe
from helpers.planted import plant, planted_run

from opdctl.losses.token_weights import Weight
from opdctl.models.loading import load_model
from opdctl.runs.scored_responses import read_scored
from opdctl.training.microbatches import make_micro_batches
from opdctl.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class RandomWeights(Weight):
    """Of each response: 0 after a random token, and at half of the tokens before it."""

    def weigh_step(self, responses):
        random, weights = np.random.default_rng(0), []
        for tokens in responses:
            weight_T = random.random(len(tokens)) * (random.random(len(tokens)) < 0.5)
            weight_T[random.integers(len(tokens)) :] = 0
            weights.append(weight_T)
        return weights


def formula_gradient(run, scored, weights):
    """Return the gradient of - (1 / tokens) Σ w_t A_t log p over all tokens in float64, one response at a time."""
    model = load_model(run.student, device="cpu").double()
    tokens = sum(len(sample.response.response_ids) for sample in scored)
    for sample, weight_T in zip(scored, weights, strict=True):
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logp_TV = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp_T = logp_TV.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        advantage_T = torch.from_numpy(sample.teacher.logprobs).double() - logp_T.detach()
        (-(torch.from_numpy(weight_T) * advantage_T * logp_T).sum() / tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_gradient_is_that_of_all_tokens(scored_run, packs):
    recipe = small_recipe("weight.name=uniform", f"train.packing={str(packs).lower()}")
    trainer, scored = Trainer(dataclasses.replace(scored_run, recipe=recipe), "cpu"), list(read_scored(scored_run, 0))
    trainer._weight = RandomWeights()
    batches = trainer.make_micro_batches(0, scored)
    assert all((batch.sequences.packed is not None) == packs for batch in batches)
    for batch in batches:
        trainer._backward(batch)
    expected = formula_gradient(scored_run, scored, RandomWeights().weigh_step([s.teacher.logprobs for s in scored]))
    for name, parameter in trainer._model.named_parameters():
        error = (parameter.grad.double() - expected[name]).norm()
        assert error <= 1e-5 * expected[name].norm() + 1e-9, name


@dataclasses.dataclass(frozen=True)
class FixedWeights(Weight):
    def weigh_step(self, responses):
        return [np.array(weight_T, float) for weight_T in ((1, 0, 2, 0), (1, 2), (0, 0, 0))]


def test_tokens_of_weight_0_are_left_out(tmp_path):
    """The model reads a response up to the last token that counts; a weight of 0 within it leaves out a row."""
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.array([0.5, -1, 2, 4]), np.array([1.0, -3]), np.ones(3)])
    weight, scored = FixedWeights(), list(read_scored(run, 0))
    (batch,) = make_micro_batches(run.recipe, 0, scored, weight, "cpu")
    kept = {sample.sample_id: (3, [0, 2]) for sample in [scored[0].response]}
    kept |= {scored[1].response.sample_id: (2, [0, 1]), scored[2].response.sample_id: (0, [])}
    left_out = dict(zip([0, 1, 2], [(2, 3, 5), (0, 0, 0), (3, 3, 3)], strict=True))
    order = [[sample.response.sample_id for sample in scored].index(s.response.sample_id) for s in batch.samples]
    assert [tuple(each) for each in batch.left_out] == [pytest.approx(left_out[index]) for index in order]
    logprobs = batch.sequences.split(batch.rollout_logp_N)
    for sample, index, logp_T in zip(batch.samples, order, logprobs, strict=True):
        length, positions = kept[sample.response.sample_id]
        whole = scored[index].response
        np.testing.assert_array_equal(sample.response.response_ids, whole.response_ids[:length])
        np.testing.assert_array_equal(logp_T.numpy(), whole.logprobs[positions])
    assert batch.sequences.input_ids_BT.shape == (3, 1 + 3)  # of a prompt and the longest response


def test_metrics_of_all_tokens_count_those_that_are_left_out(scored_run):
    """With prefix_only, k1, |A| and the mean weight are over all tokens, as those of uniform."""
    results = {}
    for name, weights in {"uniform": ("uniform",), "prefix": ("prefix_only", "weight.fraction=0.3")}.items():
        recipe = small_recipe(f"weight.name={weights[0]}", *weights[1:])
        trainer = Trainer(dataclasses.replace(scored_run, recipe=recipe), "cpu")
        results[name] = trainer._update(0, trainer.make_micro_batches(0, list(read_scored(scored_run, 0))))
    for metric in ("k1", "abs_advantage"):
        assert results["prefix"][metric] == pytest.approx(results["uniform"][metric], abs=1e-5)
    assert results["uniform"]["weight"] == 1
    assert results["prefix"]["weight"] == pytest.approx(0.3, abs=0.03)
    assert results["prefix"]["entropy"] != pytest.approx(results["uniform"]["entropy"], abs=1e-3)


def test_a_step_without_a_token_that_counts_has_no_gradient(scored_run):
    trainer = Trainer(scored_run, "cpu")
    trainer._weight = NoWeight()
    metrics = trainer._update(0, trainer.make_micro_batches(0, list(read_scored(scored_run, 0))))
    assert (metrics["loss"], metrics["grad_norm"], metrics["weight"]) == (0, 0, 0)
    assert metrics["k1"] != 0


class NoWeight(Weight):
    def __call__(self, tokens):
        return np.zeros(len(tokens))
