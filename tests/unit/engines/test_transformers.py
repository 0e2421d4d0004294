"""The transformers engine, on the toy models and on distributions computed by hand."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from helpers.engines import directory, generate, requests
from helpers.sampling import logprobs_of

from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Rollout, RolloutColumns, Sampling, Score


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
    before, loaded = fresh.score(prompts, Score(), lambda n: None), fresh._model
    fresh.load_weights(directory("toy:student-spread"))
    assert fresh._model is loaded  # its weights were replaced in place
    after = fresh.score(prompts, Score(), lambda n: None)
    for a, b, c in zip(before, after, want, strict=True):
        assert not np.allclose(a.logprobs, b.logprobs)
        np.testing.assert_array_equal(b.logprobs, c.logprobs)


def test_no_model_is_left_if_other_weights_cannot_be_read(tmp_path):
    engine, other = TransformersEngine(directory("toy:student"), "cpu"), tmp_path / "other"
    shutil.copytree(directory("toy:student").path, other)
    weights = other / "model.safetensors"
    whole = dataclasses.replace(directory("toy:student"), path=other)
    assert whole.weights.files  # the headers are read before the file is cut
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OpdctlError):
        engine.load_weights(whole)
    assert engine._model is None


# ── Sampling settings ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_p": 0.9, "sampling_top_k": 8, "min_p": 0.02},
        {"temperature": 1.3, "repetition_penalty": 1.2, "presence_penalty": 0.8, "frequency_penalty": 0.4},
    ],
)
def test_both_logprobs_of_a_modified_distribution_are_those_of_the_reference(engine, settings):
    """Rows leave the batch, and prompts are padded: penalties must follow their responses."""
    rollout, wanted = Rollout(max_tokens=60, stop_token_ids=[2, 5], **settings), requests(8, cut=5)
    completions = engine.generate(wanted, rollout.sampling(), 256, lambda n: None, columns=rollout)
    lengths = sorted(len(each.response_ids) for each in completions)
    assert lengths[0] < lengths[3] < lengths[6]
    for request, done in zip(wanted, completions, strict=True):
        own, sampled = logprobs_of(engine._model, request, done, rollout.sampling())
        np.testing.assert_allclose(done.logprobs, own, rtol=0, atol=1e-4)
        np.testing.assert_allclose(done.sampling_logprobs, sampled, rtol=0, atol=1e-4)
        assert np.abs(own - sampled).max() > 0.01


def test_a_default_rollout_has_one_column_of_logprobs(engine):
    rollout = Rollout(max_tokens=20)
    (default,) = engine.generate(requests(1), rollout.sampling(), 1, lambda n: None, columns=rollout)
    assert default.sampling_logprobs is None
    (plain,) = generate(engine, requests(1), max_tokens=20)
    np.testing.assert_array_equal(default.logprobs, plain.logprobs)


def test_response_ends_with_the_token_that_completes_a_stop_string(engine):
    wanted, tokenizer = requests(12, cut=4), directory("toy:student").tokenizer
    complete = generate(engine, wanted, max_tokens=60)
    stop = [tokenizer.decode(complete[0].response_ids[5:7])]
    stopped = generate(engine, wanted, max_tokens=60, stop=stop)
    ends = 0
    for before, after in zip(complete, stopped, strict=True):
        count = len(after.response_ids)
        np.testing.assert_array_equal(after.response_ids, before.response_ids[:count])
        np.testing.assert_allclose(after.logprobs, before.logprobs[:count], rtol=0, atol=2e-5)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (before.response_ids, after.response_ids)]
        assert (stop[0] in texts[0]) == (stop[0] in texts[1])
        if stop[0] in texts[1]:
            ends += 1
            assert after.finish_reason == "stop"
            assert stop[0] not in tokenizer.decode(after.response_ids[:-1], skip_special_tokens=True)
        else:
            assert count == len(before.response_ids)
    assert ends


def test_response_ends_with_a_stop_token_id(engine):
    (complete,) = generate(engine, requests(1))
    token = int(complete.response_ids[6])
    (stopped,) = generate(engine, requests(1), stop_token_ids=[token])
    end = complete.response_ids.tolist().index(token) + 1
    assert stopped.finish_reason == "stop"
    np.testing.assert_array_equal(stopped.response_ids, complete.response_ids[:end])


def test_stop_token_id_outside_the_vocabulary_is_an_error(engine):
    size = directory("toy:student").vocab_size
    with pytest.raises(OpdctlError, match=rf"stop_token_ids: {size} is outside the vocabulary of .*, {size} ids"):
        generate(engine, requests(1), stop_token_ids=[size])
