"""IW-OPD and the divergences compared with TRL's own functions; skipped if TRL is not installed.

Equal are A, the weights, and the gradient of the mean over tokens with respect to the student's logits. Different are:

- The value of the loss. TRL averages -w A log p, opdctl -w A ratio with ratio 1; only the gradients are equal. TRL logs
  the mean of w A, which is minus opdctl's loss.
- A response with Σ|A| below `iw_opd_epsilon`, 1e-8. TRL divides by epsilon, so its weights stay near 1 + gamma; opdctl
  divides by the sum, however small. If every A is zero, both weights are 1 + gamma.
- The engine's log-probs, if they differ from the trainer's. TRL uses them as log p_student in A and in the weights,
  without a correction. opdctl uses them in the weights; its A is by the trainer's, and its loss is multiplied by
  min(p_old / p_rollout, rollout_correction_cap).
- Several updates per step. TRL has neither ratio nor clip; without the engine's log-probs, A and the weights are those
  of the current student, not of the one before the step.
- The mean. Without `num_items_in_batch`, TRL averages over the micro-batch, 0 if it has no tokens; opdctl averages over
  all tokens of the step or, on request, over responses.
- Precision. TRL's weights are a running sum in the dtype of the logits, opdctl's are float64. opdctl's log-softmax is
  at least float32.
- Temperature. TRL divides the logits of both models by the sampling temperature; opdctl's log-probs are at 1.
- Non-finite log-probs of the teacher. TRL raises at the loss, opdctl when it joins responses and scores.
- Top-k divergences. TRL's jsd uses the union of the student's and the teacher's top-k, opdctl's one of them. The
  minimum tail probability is 1e-7 in TRL, 1e-6 in opdctl.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdctl.losses.objectives import TokenBatch, append_tail_logprob
from opdctl.losses.token_weights import IwOpd, ResponseTokens
from opdctl.registry import OBJECTIVES

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
Trainer = pytest.importorskip("trl.experimental.iw_opd", reason="TRL with IW-OPD is not installed").IWOPDTrainer
IGNORED = -100  # the label of a token outside the responses


def trl_loss(logits_BTV, ids_BT, labels_BT, teacher_BT, gamma=0.5, **arguments):
    """Return TRL's loss and its logged values."""
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=gamma,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    loss = Trainer._compute_iw_opd_loss(trainer, logits_BTV, ids_BT, labels_BT, teacher_BT, **arguments)
    return loss, {name.removeprefix("iw_opd/"): value for name, (value,) in trainer._metrics["train"].items()}


def opdctl_loss(logits_BTV, ids_BT, labels_BT, teacher_BT, gamma=0.5, rollout_logprobs=None):
    """Return opdctl's loss and weights of the response tokens."""
    logp_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[..., None])[..., 0]
    rollout_BT = logp_BT.detach() if rollout_logprobs is None else rollout_logprobs
    weights = []
    for student_T, teacher_T, real_T in zip(
        rollout_BT.double(), teacher_BT.double(), labels_BT != IGNORED, strict=True
    ):
        student, teacher = student_T[real_T].numpy(), teacher_T[real_T].numpy()
        weights.append(IwOpd(gamma)(ResponseTokens(student, teacher, teacher - student)))
    weight_N = torch.from_numpy(np.concatenate(weights))
    logp_N, rollout_N, teacher_N = (value[labels_BT != IGNORED] for value in (logp_BT, rollout_BT, teacher_BT))
    loss_N, _ = OBJECTIVES.build("policy_gradient", {})(TokenBatch(logp_N, logp_N.detach(), rollout_N, teacher_N))
    return (loss_N * weight_N).mean(), weight_N


def ragged(seed, dtype=torch.float64):
    """Return logits, ids, labels and teacher log-probs of a few responses, padded on both sides, with masked tokens."""
    source = torch.Generator().manual_seed(seed)
    rows, columns = 1 + torch.randint(4, (), generator=source), 2 + torch.randint(40, (), generator=source)
    logits_BTV, others_BTV = 3 * torch.randn(2, rows, columns, 7, generator=source, dtype=dtype)
    ids_BT = torch.randint(7, (rows, columns), generator=source)
    place_T, ends_B2 = torch.arange(columns), torch.randint(columns, (rows, 2), generator=source).sort(-1).values
    real_BT = (ends_B2[:, :1] <= place_T) & (place_T < ends_B2[:, 1:])  # some rows are empty
    real_BT &= torch.rand(rows, columns, generator=source) < 0.9
    real_BT[0, 0] = True
    teacher_BT = others_BTV.log_softmax(-1).gather(-1, ids_BT[..., None])[..., 0]
    # Values outside the responses must not matter.
    return logits_BTV, ids_BT, ids_BT.where(real_BT, IGNORED), teacher_BT.where(real_BT, torch.nan)


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]), st.floats(0, 2))
def test_weights_advantage_and_gradient_equal_trl(seed, dtype, gamma):
    logits, *rest = ragged(seed, dtype)
    logits.requires_grad_()
    (trl_value, logged), (opdctl_value, weight_N) = trl_loss(logits, *rest, gamma), opdctl_loss(logits, *rest, gamma)
    (trl_gradient,), (opdctl_gradient,) = (torch.autograd.grad(loss, logits) for loss in (trl_value, opdctl_value))
    torch.testing.assert_close(opdctl_gradient, trl_gradient, rtol=1e-6, atol=1e-6)
    assert -opdctl_value.item() == pytest.approx(logged["mean_advantage"], rel=1e-6, abs=1e-6)
    actual = [logged[name] for name in ("mean_weight", "min_weight", "max_weight")]
    assert actual == pytest.approx([x.item() for x in (weight_N.mean(), weight_N.min(), weight_N.max())], abs=1e-6)


def test_trl_micro_batches_sum_to_the_mean_over_the_step():
    batches = [ragged(seed) for seed in range(5)]
    counts = [int((labels != IGNORED).sum()) for _, _, labels, _ in batches]
    for logits, *_ in batches:
        logits.requires_grad_()
    for batch, count in zip(batches, counts, strict=True):
        (expected,) = torch.autograd.grad(trl_loss(*batch, num_items_in_batch=torch.tensor(sum(counts)))[0], batch[0])
        (actual,) = torch.autograd.grad(opdctl_loss(*batch)[0] * count / sum(counts), batch[0])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def response_with(advantages):
    """Return one response over two tokens of equal logits, p = 1/2, with these A."""
    ids = torch.zeros(1, len(advantages), dtype=torch.int64)
    logits = torch.zeros(1, len(advantages), 2, dtype=torch.float64)
    return logits, ids, ids, torch.tensor([advantages], dtype=torch.float64) - np.log(2)


def test_loss_values_differ_by_the_log_prob():
    # A = 1 and -3, w = 1.5 and 1.5 - 0.5/4 = 1.375; w A = 1.5 and -4.125, their mean -1.3125
    assert opdctl_loss(*response_with([1.0, -3.0]))[0].item() == pytest.approx(1.3125)
    assert trl_loss(*response_with([1.0, -3.0]))[0].item() == pytest.approx(-1.3125 * np.log(2))


def test_weights_below_epsilon_differ():
    # |A| = 1e-10 four times: the last token's fraction is 3/4; in TRL 3e-10/1e-8
    tokens = response_with([1e-10, -1e-10, 1e-10, 1e-10])
    assert opdctl_loss(*tokens)[1].tolist() == pytest.approx([1.5, 1.375, 1.25, 1.125], abs=1e-6)
    assert trl_loss(*tokens)[1]["min_weight"] == pytest.approx(1.5 - 0.5 * 0.03, abs=1e-6)
    nothing = response_with([0.0, 0.0])
    assert opdctl_loss(*nothing)[1].tolist() == [1.5, 1.5]
    assert trl_loss(*nothing)[1]["min_weight"] == 1.5


def test_only_opdctl_corrects_for_the_engines_log_probs():
    # p = 1/2, the engine's 1/4, A = 1; TRL: A = 1 + log 2. Both w = 1.5; opdctl's loss times 1/2 / 1/4 = 2
    logits, *rest = response_with([1.0])
    rollout = torch.full((1, 1), np.log(1 / 4), dtype=torch.float64)
    assert opdctl_loss(logits, *rest, rollout_logprobs=rollout)[0].item() == pytest.approx(-1.5 * 2)
    logged = trl_loss(logits, *rest, rollout_logprobs=rollout)[1]
    assert logged["mean_advantage"] == pytest.approx(1.5 * (1 + np.log(2)))


@pytest.mark.parametrize(
    ("name", "parameters", "beta", "top_k"),
    [
        ("forward_kl", {"support": "full"}, 0.0, 0),
        ("reverse_kl", {"support": "full"}, 1.0, 0),
        ("jsd", {"support": "full", "beta": 0.3}, 0.3, 0),
        ("forward_kl", {"support": "teacher"}, 0.0, 3),
        ("reverse_kl", {"support": "student"}, 1.0, 3),
    ],
)
def test_divergences_and_gradients_equal_trl(name, parameters, beta, top_k):
    student, teacher = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student.requires_grad_()
    labels = torch.arange(50).where(torch.arange(50) % 5 > 0, IGNORED)
    expected = Trainer.generalized_jsd_loss(student, teacher, labels, beta=beta, top_k=top_k)
    columns = [logits[labels != IGNORED].log_softmax(-1) for logits in (student, teacher)]
    if top_k:
        chosen = columns[0 if name == "reverse_kl" else 1].topk(top_k).indices
        columns = [column.gather(-1, chosen) for column in columns]
    nothing = torch.zeros(len(columns[0]))
    columns.append(append_tail_logprob(columns[0])[:, -1])
    actual = OBJECTIVES.build(name, parameters)(TokenBatch(*[nothing] * 4, *columns))[0].mean()
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in (actual, expected))
    torch.testing.assert_close(*gradients)
