"""The transformers engine, on the toy models and on distributions computed by hand."""

import math

import numpy as np
import pytest
import torch
from helpers.engines import directory, generate, requests
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.transformers import TransformersEngine, sample
from opdctl.recipe.schema import MIN_TEMPERATURE, RolloutColumns, Sampling, Score


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(directory("toy:student"), "cpu")


def test_response_depends_on_the_seed_and_not_on_the_batch(engine):
    wanted = requests(12, cut=4)
    together = generate(engine, wanted)
    alone = [generate(engine, [one])[0] for one in wanted]
    backwards = generate(engine, wanted[::-1], batch_size=5)[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_array_equal(a.response_ids, c.response_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=2e-5)


def test_each_forward_pass_counts(engine):
    before = engine.num_passes
    (completion,) = generate(engine, requests(1), max_tokens=5)
    tokens = len(completion.response_ids)
    assert engine.num_passes == before + tokens
    answered = ScoreRequest(requests(1)[0].prompt_ids, completion.response_ids)
    engine.score([answered] * 4, Score(tokens_per_batch=2 * (13 + tokens)), lambda n: None)
    assert engine.num_passes == before + tokens + 2


def test_seeds_give_different_responses(engine):
    one = requests(1)[0]
    found = {generate(engine, [Request(one.prompt_ids, seed)])[0].response_ids.tobytes() for seed in range(8)}
    assert len(found) > 1


def test_sampled_and_scored_logprobs_agree(engine):
    """Prompts of several lengths: left padding without mask and positions would be wrong by nats without an error."""
    wanted = requests(16, cut=5)
    completions = generate(engine, wanted, max_tokens=160)
    answered = [ScoreRequest(r.prompt_ids, c.response_ids) for r, c in zip(wanted, completions, strict=True)]
    for budget in (1, 500, 100_000):
        scores = engine.score(answered, Score(tokens_per_batch=budget), lambda n: None)
        for completion, score in zip(completions, scores, strict=True):
            np.testing.assert_allclose(score.logprobs, completion.logprobs, rtol=0, atol=1e-4)
            assert (score.entropies, score.top_ids, score.student_top_logprobs, score.hidden_states) == (None,) * 4


def test_entropy_and_top_k_are_those_of_the_entire_distribution(engine):
    """Entropy and most probable ids, sampled or scored, compared with a plain forward pass per response."""
    wanted = requests(6, cut=5)
    sampling, everything = Sampling(max_tokens=60), {"entropy": True, "top_k": 5}
    completions = engine.generate(wanted, sampling, 256, lambda n: None, columns=RolloutColumns(**everything))
    answered = [ScoreRequest(r.prompt_ids, c.response_ids, c.top_ids) for r, c in zip(wanted, completions, strict=True)]
    settings = Score(tokens_per_batch=400, student_top_k=True, hidden_states=True, **everything)
    scores = engine.score(answered, settings, lambda n: None)
    for each, drawn, scored in zip(answered, completions, scores, strict=True):
        ids = torch.from_numpy(np.concatenate([each.prompt_ids, each.response_ids]).astype(np.int64))
        with torch.no_grad():
            whole = engine._model(ids[None]).logits[0, len(each.prompt_ids) - 1 : -1].double().log_softmax(-1)
        entropy, (top, top_ids) = -(whole.exp() * whole).sum(-1), whole.topk(5, dim=-1)
        for found in (drawn, scored):
            np.testing.assert_allclose(found.entropies, entropy, atol=1e-4)
            np.testing.assert_allclose(found.top_logprobs, top, atol=1e-4)
            np.testing.assert_array_equal(found.top_ids, top_ids)
        np.testing.assert_allclose(scored.student_top_logprobs, drawn.top_logprobs, atol=1e-4)
        logits = torch.from_numpy(scored.hidden_states()) @ engine._model.lm_head.weight.T
        np.testing.assert_allclose(logits.detach().log_softmax(-1), whole, atol=1e-4)


def test_finish_reasons_and_the_end_of_sequence(engine):
    for completion in generate(engine, requests(64), max_tokens=116):
        ends = completion.response_ids == 1
        if completion.finish_reason == "stop":
            assert ends[-1]
            assert ends.sum() == 1
        else:
            assert len(completion.response_ids) == 116
            assert not ends.any()
        assert len(completion.logprobs) == len(completion.response_ids)


def test_progress_sums_to_the_number_of_requests(engine):
    told = []
    engine.generate(requests(10), Sampling(max_tokens=110), 4, told.append)
    assert sum(told) == 10


def test_loaded_weights_give_the_logprobs_of_a_fresh_engine(engine):
    prompts = [ScoreRequest(r.prompt_ids, np.arange(2, 20, dtype=np.int32)) for r in requests(4)]
    other = TransformersEngine(directory("toy:student-spread"), "cpu")
    fresh = TransformersEngine(directory("toy:student"), "cpu")
    want = other.score(prompts, Score(), lambda n: None)
    before = fresh.score(prompts, Score(), lambda n: None)
    fresh.load_weights(directory("toy:student-spread"))
    after = fresh.score(prompts, Score(), lambda n: None)
    for a, b, c in zip(before, after, want, strict=True):
        assert not np.allclose(a.logprobs, b.logprobs)
        np.testing.assert_array_equal(b.logprobs, c.logprobs)


def test_sample_by_hand():
    # probabilities 1/2, 1/4, 1/4: u in [0, .5) → 0, [.5, .75) → 1, [.75, 1) → 2
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).repeat(5, 1)
    tokens, logps = sample(logits, torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751]), 1.0, 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(logps, np.log([0.5, 0.5, 0.25, 0.25, 0.25]), rtol=1e-6)


def test_top_p_keeps_the_fewest_tokens_and_renormalizes():
    # of 1/2, 3/10, 2/10, top-p 0.6 keeps the first two: 5/8 and 3/8
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(2, 1)
    tokens, logps = sample(logits, torch.tensor([0.1, 0.999]), 1.0, 0.6)
    assert set(tokens.tolist()) == {1, 2}
    assert sorted(logps.exp().tolist()) == pytest.approx([3 / 8, 5 / 8])


def test_temperature_changes_logprobs():
    # logits log 4 and 0 at temperature 2: 2 to 1
    _, logps = sample(torch.tensor([[math.log(4), 0.0]]), torch.tensor([0.0]), 2.0, 1.0)
    assert logps.exp().item() == pytest.approx(2 / 3)


def test_least_temperature_samples_the_most_probable_token():
    logits = torch.tensor([[-3e4, 0.0, 3e4, 2.9e4]]).repeat(3, 1)
    tokens, logps = sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), MIN_TEMPERATURE, 1.0)
    assert (tokens.tolist(), logps.tolist()) == ([2, 2, 2], [0.0, 0.0, 0.0])


@given(st.lists(st.floats(-60, 60), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True, width=32))
@settings(max_examples=200)
def test_tokens_of_probability_zero_are_never_sampled(logits, uniform):
    barred = torch.tensor([[*logits, -torch.inf, -torch.inf]])
    token, logp = sample(barred, torch.tensor([uniform]), 1.0, 1.0)
    assert token.item() < len(logits)
    assert torch.isfinite(logp).all()


def test_samples_follow_the_distribution():
    """A chi-squared test of 20,000 fixed samples of 4 tokens; by chance one in a thousand exceeds 16.27."""
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    uniforms = torch.from_numpy(np.random.default_rng(3).random(20_000, dtype=np.float32))
    tokens, _ = sample(share.log().repeat(20_000, 1), uniforms, 1.0, 1.0)
    found = torch.bincount(tokens, minlength=4)
    assert ((found - 20_000 * share) ** 2 / (20_000 * share)).sum() < 16.27
