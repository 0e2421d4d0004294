"""The policy gradient: hand-worked losses, its gradient, and the three clips."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdctl.errors import OpdctlError
from opdctl.objectives import PolicyGradient
from opdctl.registry import OBJECTIVES

LOG = math.log


def loss_of(logp, old, teacher, weight=None, rollout=None, **settings):
    """Return (loss, metrics) of tokens given as plain lists."""
    columns = {
        "logp_N": logp,
        "old_logp_N": old,
        "rollout_logp_N": rollout or old,
        "teacher_logp_N": teacher,
        "weight_N": weight or [1.0] * len(old),
    }
    return PolicyGradient(**settings)(**{name: torch.as_tensor(c, dtype=torch.float64) for name, c in columns.items()})


def test_on_policy_by_hand():
    # A = -1 - -2 = 1 and -3 - -1 = -2; ratio 1; loss = -(1.5 · 1) - (1.25 · -2) = 1
    loss, metrics = loss_of([-2.0, -1.0], [-2.0, -1.0], [-1.0, -3.0], [1.5, 1.25])
    assert loss.item() == pytest.approx(1.0, abs=1e-15)
    assert metrics["k1"].item() == 1.0  # -(1 - 2)
    assert metrics["abs_advantage"].item() == 3.0
    assert metrics["weight"].item() == 2.75
    assert metrics["clip_share"].item() == metrics["dual_clip_share"].item() == 0


def test_the_gradient_on_policy_is_minus_weighted_advantage():
    logp = torch.tensor([-2.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss_of(logp, [-2.0, -1.0], [-1.0, -3.0], [1.5, 1.25])[0].backward()
    assert logp.grad.tolist() == [-1.5, 2.5]


def test_a_good_token_gains_nothing_beyond_the_upper_clip():
    # A = 1, ratio 2 > 1.2: loss -1.2, no gradient
    logp = torch.tensor([-2.0 + LOG(2)], dtype=torch.float64, requires_grad=True)
    loss, metrics = loss_of(logp, [-2.0], [-1.0])
    loss.backward()
    assert loss.item() == pytest.approx(-1.2)
    assert logp.grad.item() == 0
    assert metrics["clip_share"].item() == 1


def test_a_bad_token_gains_nothing_below_the_lower_clip():
    # A = -1, ratio 0.5 < 0.8: loss 0.8, no gradient
    logp = torch.tensor([-2.0 + LOG(0.5)], dtype=torch.float64, requires_grad=True)
    loss, _ = loss_of(logp, [-2.0], [-3.0])
    loss.backward()
    assert loss.item() == pytest.approx(0.8)
    assert logp.grad.item() == 0


def test_the_loss_of_a_bad_token_is_bounded_by_the_dual_clip():
    # A = -1, ratio 5 > 3: loss 3 instead of 5
    loss, metrics = loss_of([-2.0 + LOG(5)], [-2.0], [-3.0])
    assert loss.item() == pytest.approx(3.0)
    assert metrics["dual_clip_share"].item() == 1


def test_the_rollout_correction_multiplies_and_is_capped():
    # p_old / p_rollout = 2 and 20: the loss of A = 1 is -2 and, capped, -5
    old, teacher = [-2.0, -2.0], [-1.0, -1.0]
    loss, metrics = loss_of(old, old, teacher, rollout=[-2.0 - LOG(2), -2.0 - LOG(20)])
    assert loss.item() == pytest.approx(-7.0)
    assert metrics["rollout_correction"].item() == pytest.approx(7.0)


def test_an_engine_that_is_off_by_a_thousand_nats_cannot_overflow():
    loss, _ = loss_of([-2.0], [-2.0], [-1.0], rollout=[-1002.0])
    assert loss.item() == pytest.approx(-5.0)


def test_the_teacher_gets_no_gradient_and_gives_one():
    """Never through A itself: the derivative of E[A] by that path has no teacher in it."""
    old = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    logp = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = PolicyGradient()(
        logp_N=logp, old_logp_N=old.detach(), rollout_logp_N=old.detach(), teacher_logp_N=teacher, weight_N=one
    )
    loss.backward()
    assert teacher.grad is None
    assert logp.grad.item() == -1.0


def reference(logp, old, rollout, teacher, weight) -> float:
    """One token, by cases, as a person would work it."""
    advantage = weight * (teacher - old)
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 0.8), 1.2)
    loss = max(-advantage * ratio, -advantage * clipped)
    if advantage < 0:
        loss = min(loss, -advantage * 3.0)
    return loss * min(math.exp(min(old - rollout, 50)), 5.0)


NATS = st.floats(-30, 0)
TOKEN = st.tuples(NATS, NATS, NATS, NATS, st.floats(0, 3))


@given(st.lists(TOKEN, min_size=1, max_size=20))
def test_the_sum_over_tokens_is_that_of_the_reference(tokens):
    logp, old, rollout, teacher, weight = (list(column) for column in zip(*tokens, strict=True))
    loss, _ = loss_of(logp, old, teacher, weight, rollout)
    terms = [reference(*token) for token in tokens]
    assert loss.item() == pytest.approx(math.fsum(terms), rel=1e-9, abs=1e-12 * sum(map(abs, terms)) + 1e-12)


@pytest.mark.parametrize(
    ("key", "value"), [("clip_low", 1.5), ("clip_high", 0.0), ("dual_clip", 1.0), ("rollout_correction_cap", math.inf)]
)
def test_clips_that_make_no_sense_are_refused(key, value):
    with pytest.raises(OpdctlError, match=key):
        OBJECTIVES.build("policy_gradient", {key: value})
