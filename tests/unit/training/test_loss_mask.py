"""The student's own tokens alone are learned: the others are context. Nothing that is stored at these counts."""

import dataclasses

import numpy as np
import pytest
import torch

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores
from opdctl.artifacts.tables import read_scores
from opdctl.models.loading import load_model
from opdctl.recipe.components import build_token_weight
from opdctl.recipe.schema import WeightSettings
from opdctl.runs.scored_responses import join, to_weight_inputs
from opdctl.training.metrics import response_stats
from opdctl.training.trainer import Trainer

Stored = tuple[list[Response], dict[str, TokenScores]]


@pytest.fixture(scope="module")
def trajectories(scored_run) -> Stored:
    """The first step's responses with a random mask each, and their scores, as they are stored."""
    rollout, stage = scored_run.rollout_stage(0), scored_run.score_stage(0, "teacher")
    responses = rollout.read_all(Response)
    scores = {
        name: score
        for index in range(len(stage.names))
        for name, score in read_scores(stage.verify(index), rollout.sha256(index)).items()
    }
    random = np.random.default_rng(0)
    return [mask(response, random.random(len(response.response_ids)) < 0.6) for response in responses], scores


def mask(response: Response, mask_T: np.ndarray) -> Response:
    mask_T[-1] |= not mask_T.any()
    return dataclasses.replace(response, loss_mask=mask_T)


def joined(stored: Stored) -> list[ScoredResponse]:
    responses, scores = stored
    return join(responses, {"teacher": scores})


def gradient(run, samples) -> dict[str, torch.Tensor]:
    trainer = Trainer(run, "cpu")
    for batch in trainer.make_micro_batches(0, samples):
        trainer._backward(batch)
    return {name: parameter.grad.clone() for name, parameter in trainer._model.named_parameters()}


def formula_gradient(run, stored: Stored) -> dict[str, torch.Tensor]:
    """Return the gradient of - (1 / own tokens) Σ w_t A_t log p over own tokens, with the weight of iw_opd on these, in
    float64, one response at a time."""
    model = load_model(run.student, device="cpu").double()
    responses, scores = stored
    tokens = sum(int(response.loss_mask.sum()) for response in responses)
    for response in responses:
        prompt, own = response.prompt_ids, response.loss_mask.nonzero()[0]
        ids = torch.from_numpy(np.concatenate([prompt, response.response_ids]).astype(np.int64))
        logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp = logp.gather(-1, ids[len(prompt) :, None]).squeeze(-1)[own]
        teacher = torch.from_numpy(scores[response.sample_id].logprobs[own]).double()
        stored_advantage = teacher - torch.from_numpy(response.logprobs[own]).double()
        spent = stored_advantage.abs().cumsum(0) - stored_advantage.abs()
        weight = 1 + 0.5 * (1 - spent / stored_advantage.abs().sum())
        (-(weight * (teacher - logp.detach()) * logp).sum() / tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradient(gradients, expected) -> None:
    for name, value in gradients.items():
        assert (value.double() - expected[name].double()).norm() <= 1e-5 * expected[name].norm(), name


def with_train(run, **settings):
    train = run.recipe.train.model_copy(update=settings)
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"train": train}))


@pytest.mark.parametrize(("budget", "packing"), [(1000, False), (1000, True), (120, False), (120, True), (1, True)])
def test_gradient_is_that_of_the_formula_over_own_tokens(scored_run, trajectories, budget, packing):
    run = with_train(scored_run, tokens_per_micro_batch=budget, packing=packing)
    assert_same_gradient(gradient(run, joined(trajectories)), formula_gradient(scored_run, trajectories))


def test_values_at_other_tokens_change_nothing(scored_run, trajectories):
    """Not one bit of the gradient, the weights and the metrics; they may even be infinite."""
    responses, scores = trajectories
    changed_responses, changed_scores = [], {}
    for response in responses:
        own = response.loss_mask
        logprobs = np.where(own, response.logprobs, -np.inf).astype(np.float32)
        teacher = np.where(own, scores[response.sample_id].logprobs, np.nan).astype(np.float32)
        changed_responses.append(dataclasses.replace(response, logprobs=logprobs))
        changed_scores[response.sample_id] = TokenScores(teacher)
    before = joined((responses, {name: TokenScores(score.logprobs) for name, score in scores.items()}))
    after = joined((changed_responses, changed_scores))
    first, second = gradient(scored_run, before), gradient(scored_run, after)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert response_stats(before) == response_stats(after)


def test_metrics_count_own_tokens(trajectories):
    own = sum(int(response.loss_mask.sum()) for response in trajectories[0])
    assert response_stats(joined(trajectories))["tokens"] == own


@pytest.mark.parametrize("name", ["iw_opd", "prefix_ratio", "linear_decay", "prefix_only", "uniform"])
def test_weights_are_those_of_a_response_of_own_tokens_alone(scored_run, trajectories, name):
    """The drift accumulates over the student's own tokens, and positions count these."""
    recipe = scored_run.recipe.model_copy(update={"weight": WeightSettings(name=name)})
    weight = build_token_weight(recipe)
    responses, scores = trajectories
    alone = [
        dataclasses.replace(each, response_ids=each.own_ids, logprobs=each.logprobs[each.loss_mask], loss_mask=None)
        for each in ([dataclasses.replace(r, entropies=None, top_ids=None, top_logprobs=None) for r in responses])
    ]
    own_scores = {r.sample_id: TokenScores(scores[r.sample_id].logprobs[r.loss_mask]) for r in responses}
    expected = [to_weight_inputs(sample, 0) for sample in join(alone, {"teacher": own_scores})]
    inputs = [to_weight_inputs(sample, 0) for sample in joined(trajectories)]
    for ours, theirs in zip(weight.weigh_step(inputs), weight.weigh_step(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_mask_of_own_tokens_only_is_no_mask(scored_run, trajectories):
    responses, scores = trajectories
    everything = [dataclasses.replace(r, loss_mask=np.ones(len(r.response_ids), bool)) for r in responses]
    nothing = [dataclasses.replace(response, loss_mask=None) for response in responses]
    first, second = (gradient(scored_run, joined((each, scores))) for each in (everything, nothing))
    assert all(torch.equal(first[name], second[name]) for name in first)
