"""Log-probs from hidden states: exact against the plain formula, in value and gradient, whatever the chunks."""

import numpy as np
import pytest
import torch

from opdctl import logprobs
from opdctl.batches import by_token_budget, pad
from opdctl.config import Model
from opdctl.model import ModelDir, load, locate

D, V = 8, 11


def plain(hidden_ND, head_VD, targets_N):
    """Log-softmax of the whole logits in float64."""
    return (hidden_ND.double() @ head_VD.double().T).log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(23, D, requires_grad=True)
    head = torch.randn(V, D, requires_grad=True)
    return hidden, head, torch.randint(0, V, (23,))


@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
def test_values_and_gradients_equal_those_of_the_plain_formula_for_every_chunk(inputs, chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk * V)
    hidden, head, targets = inputs
    upstream = torch.linspace(-1, 1, 23)
    found, entropy = logprobs.token_logprobs(hidden, head, targets)
    gradients = torch.autograd.grad(found @ upstream, (hidden, head))
    want = plain(hidden, head, targets)
    wanted = torch.autograd.grad(want @ upstream.double(), (hidden, head))
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)
    whole = (hidden.double() @ head.double().T).log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(whole.exp() * whole).sum(-1), rtol=0, atol=1e-5)
    assert not entropy.requires_grad


def test_bfloat16_hidden_states_are_multiplied_in_float32(inputs):
    hidden, head, targets = (value.detach() for value in inputs)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    found, _ = logprobs.token_logprobs(hidden, head, targets)
    torch.testing.assert_close(found.double(), plain(hidden, head, targets), rtol=0, atol=1e-5)


def test_by_hand_two_words_of_equal_logit():
    # two words, logits 0 and 0: log 1/2 each, entropy log 2
    found, entropy = logprobs.token_logprobs(torch.zeros(1, D), torch.zeros(2, D), torch.tensor([1]))
    assert found.item() == pytest.approx(-np.log(2))
    assert entropy.item() == pytest.approx(np.log(2))


def test_no_tokens_give_no_logprobs():
    found, entropy = logprobs.token_logprobs(torch.zeros(0, D), torch.zeros(V, D), torch.zeros(0, dtype=torch.int64))
    assert found.shape == entropy.shape == (0,)


@pytest.fixture(scope="module")
def student():
    directory = ModelDir(locate(Model(model="toy:student"), "student.model"), "float32")
    return load(directory, device="cpu"), directory


def ragged(lengths):
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 28, p).astype(np.int32), rng.integers(2, 28, r).astype(np.int32)) for p, r in lengths]


def test_each_token_is_predicted_from_the_one_before_and_padding_changes_nothing(student):
    """Against one unpadded forward pass a sequence: the commonest fault is to be off by one."""
    model, directory = student
    sequences = ragged([(3, 5), (13, 40), (1, 1), (7, 0), (2, 17)])
    padded = pad(sequences, "cpu")
    with torch.no_grad():
        found, _ = logprobs.response_logprobs(
            model, padded.input_ids_BT, padded.rows_N, padded.positions_N, vocab_size=directory.vocab_size
        )
        for (prompt, response), logp_T in zip(sequences, padded.split(found), strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
            whole = model(ids[None]).logits[0].double().log_softmax(-1)
            want = [whole[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
            np.testing.assert_allclose(logp_T.numpy(), want, rtol=0, atol=2e-5)


def test_rows_beyond_the_tokenizer_get_no_probability(student):
    """With the vocabulary cut to 28 words, their probabilities alone make one."""
    model, directory = student
    prompt, _ = ragged([(5, 1)])[0]
    total = 0.0
    for word in range(28):
        padded = pad([(prompt, np.array([word], np.int32))], "cpu")
        with torch.no_grad():
            arguments = (model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
            total += float(logprobs.response_logprobs(*arguments, vocab_size=28)[0].exp())
    assert directory.vocab_size == 56
    assert total == pytest.approx(1, abs=1e-5)


def test_batches_keep_to_the_budget_and_hold_every_sequence_once():
    lengths = [5, 100, 7, 7, 30, 1, 64]
    batches = by_token_budget(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 64
