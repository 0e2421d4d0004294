"""The gradient of an update: the formula on full logits, whatever the micro-batches."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from opdctl import distributed
from opdctl.errors import OpdctlError
from opdctl.models.loading import load_model
from opdctl.recipe.schema import WeightSettings
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.training.trainer import Trainer


def gradient(run, samples=None) -> dict[str, torch.Tensor]:
    """Return the gradient that the first step's responses give, before clipping."""
    trainer = Trainer(run, "cpu")
    for batch in trainer.make_micro_batches(0, samples or list(read_scored(run, 0))):
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


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [1, 120, 300])
def test_gradient_does_not_depend_on_the_micro_batches(scored_run, budget, packing):
    split = with_settings(scored_run, tokens_per_micro_batch=budget, packing=packing)
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


@pytest.mark.parametrize("every_n_layers", [1, 2])
def test_gradient_checkpointing_recomputes_and_keeps_the_gradient(scored_run, every_n_layers, monkeypatch):
    calls, forward = [], Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda module, x: calls.append(module) or forward(module, x))
    settings = {"gradient_checkpointing": True, "checkpoint_every_n_layers": every_n_layers}
    recomputed_gradient = gradient(with_settings(scored_run, **settings))
    recomputed = [calls.count(module) for module in dict.fromkeys(calls)]
    calls.clear()
    assert_same_gradient(recomputed_gradient, gradient(scored_run))
    once, _ = (calls.count(module) for module in dict.fromkeys(calls))
    assert recomputed == [once + 1, once + (every_n_layers == 1)]  # of the two layers


def formula_gradient(run, samples) -> dict[str, torch.Tensor]:
    """Return the gradient of - (1 / tokens) Σ w_t c_t A_t log p, one response at a time, in float64.

    c = min(p / p_sampled, 5) is the correction if another distribution was sampled.
    """
    model = load_model(run.student, device="cpu").double()
    tokens = sum(len(sample.response.response_ids) for sample in samples)
    for sample in samples:
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp = logp.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        advantage = torch.from_numpy(sample.teacher.logprobs).double() - logp.detach()
        spent = advantage.abs().cumsum(0) - advantage.abs()
        weight = 1 + 0.5 * (1 - spent / advantage.abs().sum())
        if sample.response.sampling_logprobs is not None:
            ratio = (logp.detach() - torch.from_numpy(sample.response.sampling_logprobs)).exp()
            weight *= ratio.clamp(max=5)
        (-(weight * advantage * logp).sum() / tokens).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradient_is_that_of_the_formula_on_full_logits(scored_run):
    assert_same_gradient(gradient(scored_run), formula_gradient(scored_run, list(read_scored(scored_run, 0))))


@pytest.fixture(scope="module")
def corrected_samples(scored_run):
    """Responses with log-probs of another distribution: some ratios exceed the cap, others are far below 1."""
    noise, samples = np.random.default_rng(0), list(read_scored(scored_run, 0))
    sampled = [s.response.logprobs + noise.normal(0, 1.5, len(s.response.logprobs)).astype(np.float32) for s in samples]
    return [
        dataclasses.replace(sample, response=dataclasses.replace(sample.response, sampling_logprobs=logp_T))
        for sample, logp_T in zip(samples, sampled, strict=True)
    ]


def test_gradient_of_another_sampled_distribution_is_corrected(scored_run, corrected_samples):
    assert_same_gradient(gradient(scored_run, corrected_samples), formula_gradient(scored_run, corrected_samples))


@pytest.mark.parametrize(("budget", "packing"), [(1, True), (120, True), (120, False)])
def test_corrected_gradient_does_not_depend_on_the_micro_batches(scored_run, corrected_samples, budget, packing):
    split = with_settings(scored_run, tokens_per_micro_batch=budget, packing=packing)
    assert_same_gradient(gradient(split, corrected_samples), gradient(scored_run, corrected_samples))


def test_weights_and_mismatch_read_the_students_own_log_probs(scored_run, corrected_samples):
    trainer = Trainer(scored_run, "cpu")
    sums = []
    for samples in (list(read_scored(scored_run, 0)), corrected_samples):
        (batch,) = trainer.make_micro_batches(0, samples)
        sums.append((batch.weight_N.sum().item(), trainer._backward(batch)[1]))
    (own_weight, own), (weight, corrected) = sums
    assert weight == own_weight
    for name in own.keys() - {"loss", "rollout_correction", "rollout_correction_squared"}:
        assert corrected[name] == own[name], name
    assert corrected["rollout_correction"] != pytest.approx(own["rollout_correction"], rel=1e-2)


# ── Weights by the trainer's own log-probs ───────────────────────────────────────────────────────────────────────────


def with_weight(run, **settings):
    """Return the run with another [weight], and several micro-batches."""
    recipe = run.recipe.model_copy(update={"weight": WeightSettings(**settings)})
    return with_settings(dataclasses.replace(run, recipe=recipe), tokens_per_micro_batch=160)


def with_logprobs(samples, logprobs):
    """Return the samples with other log-probs of the rollout."""
    return [
        dataclasses.replace(sample, response=dataclasses.replace(sample.response, logprobs=logp_T))
        for sample, logp_T in zip(samples, logprobs, strict=True)
    ]


def batches_of(run, samples):
    return Trainer(run, "cpu").make_micro_batches(0, samples)


WEIGHTS_READING_LOGPROBS = [{"name": "iw_opd"}, {"name": "prefix_ratio", "alpha": 0.1}]


@pytest.mark.parametrize("weight", WEIGHTS_READING_LOGPROBS, ids=lambda weight: weight["name"])
def test_update_is_the_same_if_rollout_and_trainer_have_the_same_log_probs(scored_run, weight):
    own, stored = (with_weight(scored_run, **weight, logprobs=name) for name in ("trainer", "rollout"))
    samples = list(read_scored(scored_run, 0))
    trainer = Trainer(own, "cpu")
    logprobs = trainer._old_logprobs(0, samples)
    planted = with_logprobs(samples, [logprobs[sample.response.sample_id] for sample in samples])
    gradients = []
    for run in (own, stored):
        trainer = Trainer(run, "cpu")
        for batch in trainer.make_micro_batches(0, planted):
            trainer._backward(batch)
        gradients.append({name: parameter.grad for name, parameter in trainer._model.named_parameters()})
    for name, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][name]), name


@pytest.mark.parametrize("weight", WEIGHTS_READING_LOGPROBS, ids=lambda weight: weight["name"])
def test_log_probs_of_the_rollout_do_not_enter_the_trainers_weights(scored_run, weight):
    samples = list(read_scored(scored_run, 0))
    noise = np.random.default_rng(0)
    noisy = [s.response.logprobs + noise.normal(0, 1, len(s.response.logprobs)).astype(np.float32) for s in samples]
    planted = with_logprobs(samples, noisy)
    for name in ("trainer", "rollout"):
        run = with_weight(scored_run, **weight, logprobs=name)
        pairs = zip(batches_of(run, samples), batches_of(run, planted), strict=True)
        assert all(torch.equal(one.weight_N, other.weight_N) for one, other in pairs) == (name == "trainer")


def test_trainers_log_probs_are_those_of_the_first_backward_pass(scored_run):
    trainer = Trainer(with_weight(scored_run, name="iw_opd", logprobs="trainer"), "cpu")
    batches = trainer.make_micro_batches(0, list(read_scored(scored_run, 0)))
    assert len(batches) > 2
    for batch in batches:
        assert torch.equal(trainer._backward(dataclasses.replace(batch, old_logp_N=None))[0], batch.old_logp_N)
        assert (batch.old_logp_N - batch.rollout_logp_N).abs().max() < 1e-4


@pytest.mark.parametrize("weight", [{"name": "linear_decay"}, {"name": "iw_opd", "logprobs": "rollout"}])
def test_no_forward_pass_without_need(scored_run, weight, monkeypatch):
    monkeypatch.delattr(Trainer, "_old_logprobs")
    batches = batches_of(with_weight(scored_run, **{"logprobs": "trainer", **weight}), list(read_scored(scored_run, 0)))
    assert all(batch.old_logp_N is None for batch in batches)


def test_old_log_probs_are_computed_without_dropout(scored_run):
    lora = scored_run.recipe.lora.model_copy(update={"rank": 2, "dropout": 0.5})
    run = with_weight(scored_run, name="iw_opd", logprobs="trainer")
    trainer = Trainer(dataclasses.replace(run, recipe=run.recipe.model_copy(update={"lora": lora})), "cpu")
    for name, parameter in trainer._model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    samples = list(read_scored(scored_run, 0))
    first, second = trainer._old_logprobs(0, samples), trainer._old_logprobs(0, samples)
    assert all(np.array_equal(logp_T, second[name]) for name, logp_T in first.items())
    batch = trainer.make_micro_batches(0, samples)[0]
    assert not torch.equal(
        trainer._logp_N(batch.sequences), trainer._logp_N(batch.sequences)
    )  # training has dropout again


def test_log_prob_of_the_trainer_that_is_not_finite(scored_run):
    trainer = Trainer(with_weight(scored_run, name="iw_opd", logprobs="trainer"), "cpu")
    with torch.no_grad():
        trainer._model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(OpdctlError) as caught:
        trainer.make_micro_batches(0, list(read_scored(scored_run, 0)))
    assert caught.value.kind == "nonfinite_value"


def test_cached_memory_is_returned_after_a_step(scored_run, tmp_path, monkeypatch):
    """Engines on the same GPU are other processes, which cannot use what the trainer's allocator keeps."""
    run, written = Run.load(Path(shutil.copytree(scored_run.path, tmp_path / "run"))), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: written.append(run.student_path(1).is_dir()))
    Trainer(run, "cpu").train_step(0)
    run.finish_update()
    assert written == [True]


def test_probe_of_a_sharded_student_is_that_of_the_whole_one_and_leaves_it_sharded(scored_run):
    """Gathered parameters would stay in the memory that engines need until the next update."""
    probe = Trainer(scored_run, "cpu")._score_probe()
    sharded = Trainer(with_settings(scored_run, cpu_offload=True), "cpu")  # over one process
    assert sharded._score_probe()["ids"] == probe["ids"]
    assert sharded._score_probe()["logprobs"] == pytest.approx(probe["logprobs"], abs=1e-4)
    assert all(isinstance(parameter, DTensor) for parameter in sharded._model.parameters())
    distributed.destroy_process_group()
