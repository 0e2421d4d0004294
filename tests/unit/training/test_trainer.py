"""The gradient of an update: the formula on full logits, whatever the micro-batches."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from opdctl.models.loading import load_model
from opdctl.recipe.schema import WeightSettings
from opdctl.runs.scored_responses import read_scored
from opdctl.training.trainer import Trainer


def gradient(run, step=0) -> dict[str, torch.Tensor]:
    """Return the gradient that a step's responses give, before clipping."""
    trainer = Trainer(run, "cpu")
    for batch in trainer.make_micro_batches(step, list(read_scored(run, step))):
        trainer._backward(batch)
    return {name: parameter.grad.clone() for name, parameter in trainer._model.named_parameters()}


def assert_same_gradient(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of each parameter's gradient by norm: the float32 error of sums over hundreds of tokens."""
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        assert (value.double() - expected[name].double()).norm() <= 1e-5 * expected[name].norm(), name


def with_settings(run, **settings):
    """Return the run with other [train] settings."""
    train = run.recipe.train.model_copy(update=settings)
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"train": train}))


@pytest.mark.parametrize("budget", [1, 120, 300])
def test_gradient_does_not_depend_on_the_micro_batches(scored_run, budget):
    split = with_settings(scored_run, tokens_per_micro_batch=budget)
    assert_same_gradient(gradient(split), gradient(scored_run))


def test_denominator_of_the_selected_tokens_belongs_to_the_step(scored_run):
    """Divided by the selected tokens of the whole step, whatever the micro-batches."""
    weight = WeightSettings(name="prefix_only", fraction=0.3)
    prefix = dataclasses.replace(scored_run, recipe=scored_run.recipe.model_copy(update={"weight": weight}))
    selecting = with_settings(prefix, denominator="selected")
    expected = gradient(selecting)
    assert_same_gradient(gradient(with_settings(selecting, tokens_per_micro_batch=120)), expected)
    lengths = [len(sample.response.response_ids) for sample in read_scored(scored_run, 0)]
    ratio = sum(lengths) / sum(math.ceil(round(0.3 * length, 9)) for length in lengths)
    assert_same_gradient({name: ratio * grad for name, grad in gradient(prefix).items()}, expected)


def test_gradient_checkpointing_recomputes_and_keeps_the_gradient(scored_run, monkeypatch):
    calls, forward = [], Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    recomputed_gradient = gradient(with_settings(scored_run, gradient_checkpointing=True))
    recomputed = len(calls)
    calls.clear()
    assert_same_gradient(recomputed_gradient, gradient(scored_run))
    assert recomputed == len(calls) + 2  # each of the two layers once more


def test_gradient_is_that_of_the_formula_on_full_logits(scored_run):
    """- (1 / tokens) Σ w_t A_t ∇ log p, one response at a time, in float64."""
    model = load_model(scored_run.student, device="cpu").double()
    samples = list(read_scored(scored_run, 0))
    tokens = sum(len(sample.response.response_ids) for sample in samples)
    for sample in samples:
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp = logp.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        advantage = torch.from_numpy(sample.teacher.logprobs).double() - logp.detach()
        spent = advantage.abs().cumsum(0) - advantage.abs()
        weight = 1 + 0.5 * (1 - spent / advantage.abs().sum())
        (-(weight * advantage * logp).sum() / tokens).backward()
    assert_same_gradient(gradient(scored_run), {name: p.grad for name, p in model.named_parameters()})
