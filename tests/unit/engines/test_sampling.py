"""The distribution that the transformers engine samples: by hand, and compared with a plain float64 reference."""

import math

import numpy as np
import pytest
import torch
from helpers.sampling import sampled_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.engines.sampling import Penalties, restrict, sample
from opdctl.recipe.schema import MIN_TEMPERATURE, Sampling

VOCABULARY = 12


def test_sample_by_hand():
    # probabilities 1/2, 1/4, 1/4: u in [0, .5) → 0, [.5, .75) → 1, [.75, 1) → 2
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).repeat(5, 1)
    tokens, logps = sample(logits, torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751]), Sampling())
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(logps, np.log([0.5, 0.5, 0.25, 0.25, 0.25]), rtol=1e-6)


def test_top_p_keeps_the_fewest_tokens_and_renormalizes():
    # of 1/2, 3/10, 2/10, top-p 0.6 keeps the first two: 5/8 and 3/8
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(2, 1)
    tokens, logps = sample(logits, torch.tensor([0.1, 0.999]), Sampling(top_p=0.6))
    assert set(tokens.tolist()) == {1, 2}
    assert sorted(logps.exp().tolist()) == pytest.approx([3 / 8, 5 / 8])


def test_temperature_changes_logprobs():
    # logits log 4 and 0 at temperature 2: 2 to 1
    _, logps = sample(torch.tensor([[math.log(4), 0.0]]), torch.tensor([0.0]), Sampling(temperature=2.0))
    assert logps.exp().item() == pytest.approx(2 / 3)


def test_least_temperature_samples_the_most_probable_token():
    logits = torch.tensor([[-3e4, 0.0, 3e4, 2.9e4]]).repeat(3, 1)
    tokens, logps = sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), Sampling(temperature=MIN_TEMPERATURE))
    assert (tokens.tolist(), logps.tolist()) == ([2, 2, 2], [0.0, 0.0, 0.0])


@given(st.lists(st.floats(-60, 60), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True, width=32))
@settings(max_examples=200)
def test_tokens_of_probability_zero_are_never_sampled(logits, uniform):
    barred = torch.tensor([[*logits, -torch.inf, -torch.inf]])
    token, logp = sample(barred, torch.tensor([uniform]), Sampling())
    assert token.item() < len(logits)
    assert torch.isfinite(logp).all()


def test_samples_follow_the_distribution():
    """A chi-squared test of 20,000 fixed samples of 4 tokens; by chance one in a thousand exceeds 16.27."""
    share = torch.tensor([0.4, 0.3, 0.2, 0.1])
    uniforms = torch.from_numpy(np.random.default_rng(3).random(20_000, dtype=np.float32))
    tokens, _ = sample(share.log().repeat(20_000, 1), uniforms, Sampling())
    found = torch.bincount(tokens, minlength=4)
    assert ((found - 20_000 * share) ** 2 / (20_000 * share)).sum() < 16.27


# ── Penalties and cut-offs ───────────────────────────────────────────────────────────────────────────────────────────


def distribution(logits, prompts, responses, s: Sampling) -> np.ndarray:
    penalties = Penalties([np.array(ids, np.int32) for ids in prompts], VOCABULARY, s, "cpu")
    for row, ids in enumerate(responses):
        for token in ids:
            penalties.add(torch.tensor([row]), torch.tensor([token]))
    return restrict(penalties.apply(torch.arange(len(logits)), torch.tensor(logits)), s).softmax(-1).numpy()


tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=8)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.35, 0.8, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-1.1, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([-0.3, 0.0, 0.9]),
)


@given(st.lists(st.tuples(st.integers(0, 2**32), tokens, tokens), min_size=1, max_size=3), samplings)
@settings(max_examples=300, deadline=None)
def test_distribution_is_that_of_the_reference(rows, sampling):
    """Random logits, so that no tie or bound decides by rounding."""
    logits = np.stack([np.random.default_rng(seed).normal(0, 2, VOCABULARY) for seed, _, _ in rows]).astype(np.float32)
    found = distribution(logits, [row[1] for row in rows], [row[2] for row in rows], sampling)
    for p, row_logits, (_, prompt, response) in zip(found, logits, rows, strict=True):
        np.testing.assert_allclose(p, sampled_distribution(row_logits, prompt, response, sampling), rtol=0, atol=2e-6)


def test_penalties_by_hand():
    # prompt 0, response 1 1; token 2 is new. 2/2 = 1; -1·2 - 0.25·2 - 0.5 = -3; 1 unchanged.
    sampling = Sampling(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    penalties = Penalties([np.array([0], np.int32)], 3, sampling, "cpu")
    rows = torch.tensor([0])
    for _ in range(2):
        penalties.add(rows, torch.tensor([1]))
    assert penalties.apply(rows, torch.tensor([[2.0, -1.0, 1.0]])).tolist() == [[1.0, -3.0, 1.0]]


def test_top_k_keeps_ties():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert restrict(logits, Sampling(top_k=2)).tolist() == [[1.0, 2.0, 1.0, -math.inf]]


def test_min_p_is_relative_to_the_most_probable_token():
    # of 1/2, 3/10, 2/10, min-p 0.5 keeps what has at least 1/4
    p = restrict(torch.log(torch.tensor([[0.2, 0.5, 0.3]])), Sampling(min_p=0.5)).softmax(-1)
    assert p.tolist()[0] == pytest.approx([0, 5 / 8, 3 / 8])


def test_greedy_decoding_takes_the_most_probable_token_after_penalties():
    sampling = Sampling(presence_penalty=2.0)
    penalties, rows = Penalties([np.array([0], np.int32)], 2, sampling, "cpu"), torch.tensor([0])
    penalties.add(rows, torch.tensor([1]))
    greedy = sampling.model_copy(update={"temperature": 0.0})
    token, logp = sample(penalties.apply(rows, torch.tensor([[0.0, 1.0]])), torch.tensor([0.0]), greedy)
    assert (token.tolist(), logp.tolist()) == ([0], [0.0])


# ── The correction of other distributions ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.6),
        Sampling(temperature=1.4),
        Sampling(repetition_penalty=1.2, presence_penalty=1.5, frequency_penalty=0.5),
    ],
)
def test_ratio_of_own_and_sampled_probability_is_unbiased(sampling):
    """E_mu[p/mu f] = E_p[f], over the entire vocabulary in float64, for settings that cut nothing off."""
    rng = np.random.default_rng(5)
    logits, f = rng.normal(0, 2, VOCABULARY), rng.normal(0, 3, VOCABULARY)
    mu, p = sampled_distribution(logits, [1, 2], [3, 3, 4], sampling), sampled_distribution(logits, [], [], Sampling())
    assert abs((mu * f).sum() - (p * f).sum()) > 1e-2
    np.testing.assert_allclose((mu * (p / mu) * f).sum(), (p * f).sum(), rtol=1e-12)


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.8), Sampling(top_k=3), Sampling(temperature=0.7, min_p=0.2)])
def test_tokens_that_are_cut_off_are_missing_from_the_corrected_mean(sampling):
    """The corrected mean is that of the tokens that can be sampled, with their own probabilities, which sum to < 1."""
    rng = np.random.default_rng(5)
    logits, f = rng.normal(0, 2, VOCABULARY), rng.normal(0, 3, VOCABULARY)
    mu, p = sampled_distribution(logits, [], [], sampling), sampled_distribution(logits, [], [], Sampling())
    kept = mu > 0
    assert 0.5 < p[kept].sum() < 0.999
    np.testing.assert_allclose((mu * f * np.divide(p, mu, where=kept, out=np.zeros_like(p))).sum(), (p * f)[kept].sum())
