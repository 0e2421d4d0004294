"""Objectives: values by hand, plain float64 references, gradients, and invariants."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.errors import OpdctlError
from opdctl.losses.objectives import TokenBatch, append_tail_logprob
from opdctl.losses.token_weights import MIN_TAIL_PROB
from opdctl.registry import OBJECTIVES

LOG, DOUBLE = math.log, torch.float64
POLICY, DIVERGENCES = ["policy_gradient", "power", "top_d", "constant_penalty"], ["forward_kl", "reverse_kl", "jsd"]
K1, K2, K3 = (("sampled_kl", {"estimator": name}) for name in ("k1", "k2", "k3"))
EVERY = [(name, {}) for name in OBJECTIVES.names()] + [K1, K3, ("top_d", {"alpha": 1.0})]
EVERY += [(name, {"support": support}) for name in DIVERGENCES for support in ("full", "student")]


def batch(logp, target, old=None, rollout=None, student=None, teacher=None, dtype=DOUBLE) -> TokenBatch:
    """Return tokens from plain lists or tensors. They are on-policy unless `old` or `rollout` are given."""
    if old is None:
        old = logp.detach() if torch.is_tensor(logp) else logp
    tail = None if student is None else append_tail_logprob(student)[:, -1]
    columns = (logp, old, old if rollout is None else rollout, target, student, teacher, tail)
    return TokenBatch(*(None if column is None else torch.as_tensor(column, dtype=dtype) for column in columns))


def loss_of(name, tokens, **parameters):
    return OBJECTIVES.build(name, parameters)(tokens)


def loss_and_slope(name, logp, target, old=None, *, dtype=DOUBLE, **parameters) -> tuple[float, float]:
    """Return the loss of one token and its derivative with respect to the student's log-prob."""
    leaf = torch.tensor([logp], dtype=dtype, requires_grad=True)
    loss, _ = loss_of(name, batch(leaf, [target], None if old is None else [old], dtype=dtype), **parameters)
    loss.sum().backward()
    return loss.item(), leaf.grad.item()


# ── On the sampled token ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ratio", "target", "loss", "slope", "clipped", "dual"),
    [
        (1.0, -1.0, -1.0, -1.0, 0, 0),  # on-policy, A = 1: the loss and its derivative are -A
        (1.0, -4.0, 2.0, 2.0, 0, 0),  # A = -2
        (2.0, -1.0, -1.2, 0, 1, 0),  # A = 1: no gradient beyond the upper clip
        (0.5, -1.0, -0.5, -0.5, 0, 0),  # A = 1 below the lower clip: -A ratio
        (0.5, -3.0, 0.8, 0, 1, 0),  # A = -1: no gradient below the lower clip
        (2.0, -3.0, 2.0, 2.0, 0, 0),  # A = -1 above the upper clip: -A ratio
        (5.0, -3.0, 3.0, 0, 0, 1),  # A = -1: the dual clip bounds the loss by 3 instead of 5
    ],
)
def test_policy_gradient_clips_by_hand(ratio, target, loss, slope, clipped, dual):
    logp, old = -2.0 + LOG(ratio), -2.0
    assert loss_and_slope("policy_gradient", logp, target, old) == (pytest.approx(loss), pytest.approx(slope))
    _, metrics = loss_of("policy_gradient", batch([logp], [target], [old]))
    expected = {"advantage": target - old, "ratio": ratio, "rollout_correction": 1}
    expected |= {"clip_fraction": clipped, "dual_clip_fraction": dual}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_rollout_correction_is_capped_without_overflow():
    # p_old / p_rollout = 2, 20, 1/4 and e^1000: the loss for A = 1 is -2, -5 (capped), -1/4 and -5 (capped)
    rollout = [-2.0 - LOG(2), -2.0 - LOG(20), -2.0 + LOG(4), -1002.0]
    tokens = batch([-2.0] * 4, [-1.0] * 4, rollout=rollout, dtype=torch.float32)
    loss, metrics = loss_of("policy_gradient", tokens)
    assert (-loss).tolist() == metrics["rollout_correction"].tolist() == pytest.approx([2.0, 5.0, 0.25, 5.0])


@pytest.mark.parametrize(("target", "loss"), [(-99.0, -1.2), (-101.0, 3.0), (-100.0, 0.0)])
def test_overflowing_ratio_is_clipped_in_value_and_gradient(target, loss):
    # A = 1, -1 and 0, ratio e^99 > 3e38
    result = loss_and_slope("policy_gradient", -1.0, target, -100.0, dtype=torch.float32)
    assert result == (pytest.approx(loss), 0)


@pytest.mark.parametrize(
    ("name", "parameters", "advantage"),
    [  # p_T = 3/4, p_S = 1/4
        ("policy_gradient", {}, LOG(3)),
        ("policy_gradient", {"advantage_clip": 1.0}, 1.0),
        ("power", {}, 1 / 2),  # 3/4 - 1/4
        ("power", {"alpha": 0.5}, math.sqrt(3) / 2 - 1 / 2),
        ("top_d", {}, LOG(2)),  # log(1/2 · 3 + 1/2)
        ("top_d", {"alpha": 0.25}, LOG(1.5)),  # log(1/4 · 3 + 3/4)
        ("constant_penalty", {}, -0.1),
        ("constant_penalty", {"penalty": 2.0, "advantage_clip": 0.5}, -0.5),
    ],
)
def test_advantages_by_hand(name, parameters, advantage):
    result = loss_and_slope(name, LOG(1 / 4), LOG(3 / 4), **parameters)
    assert result == (pytest.approx(-advantage), pytest.approx(-advantage))


CLIPS = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "rollout_correction_cap": 5.0, "advantage_clip": 0.0}
OTHERS = {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.3, "rollout_correction_cap": 2.0, "advantage_clip": 0.7}


def reference(name, clips, logp, old, rollout, target) -> float:
    """The policy gradient of one token, case by case."""
    advantage = {
        "policy_gradient": target - old,
        "power": math.exp(target) - math.exp(old),
        "top_d": LOG(0.5 * math.exp(target - old) + 0.5),
        "constant_penalty": -0.1,
    }[name]
    if clips["advantage_clip"] and abs(advantage) > clips["advantage_clip"]:
        advantage = math.copysign(clips["advantage_clip"], advantage)
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - clips["clip_low"]), 1 + clips["clip_high"])
    loss = max(-advantage * ratio, -advantage * clipped)
    if advantage < 0:
        loss = min(loss, -advantage * clips["dual_clip"])
    return loss * min(math.exp(min(old - rollout, 50)), clips["rollout_correction_cap"])


NATS = st.floats(-30, 0)
NEAR = st.tuples(st.floats(-30, -1), *[st.floats(-1, 1)] * 3).map(lambda n: (n[0], *(n[0] + d for d in n[1:])))


@pytest.mark.parametrize("name", POLICY)
@given(NEAR | st.tuples(NATS, NATS, NATS, NATS), st.sampled_from([CLIPS, OTHERS]))
@settings(max_examples=300)
def test_policy_gradients_match_the_reference(name, token, clips):
    logp, old, rollout, target = ([value] for value in token)
    loss, _ = loss_of(name, batch(logp, target, old, rollout), **clips)
    assert loss.item() == pytest.approx(reference(name, clips, *token), rel=1e-9, abs=1e-12)


@given(NATS, NATS, st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_bounds_of_the_advantages(logp, target, alpha, share):
    tokens = batch([logp], [target])
    assert abs(loss_of("power", tokens, alpha=alpha)[0].item()) <= 1
    assert loss_of("top_d", tokens, alpha=share)[1]["advantage"].item() >= LOG(1 - share) - 1e-12
    assert loss_of("top_d", tokens, alpha=1.0)[0].equal(loss_of("policy_gradient", tokens)[0])
    assert loss_of("constant_penalty", tokens)[0].equal(loss_of("constant_penalty", batch([logp], [0.0]))[0])


@pytest.mark.parametrize(
    ("estimator", "p_target", "value", "slope"),
    [  # p_S = 1/4; A = ± log 2. The derivative of k1 itself would be 1 for any teacher
        ("k1", 1 / 2, -LOG(2), -LOG(2)),
        ("k1", 1 / 8, LOG(2), LOG(2)),
        ("k2", 1 / 2, LOG(2) ** 2 / 2, -LOG(2)),
        ("k2", 1 / 8, LOG(2) ** 2 / 2, LOG(2)),
        ("k3", 1 / 2, 2 - 1 - LOG(2), 1 - 2),
        ("k3", 1 / 8, 1 / 2 - 1 + LOG(2), 1 - 1 / 2),
    ],
)
def test_kl_estimators_by_hand(estimator, p_target, value, slope):
    result = loss_and_slope("sampled_kl", LOG(1 / 4), LOG(p_target), estimator=estimator)
    assert result == (pytest.approx(value), pytest.approx(slope))


@given(NATS, NATS)
def test_kl_estimators_match_their_formulas(logp, target):
    a = target - logp
    k3 = math.expm1(a) - a if a <= 10 else math.exp(10) * (a - 9) - 1 - a
    for estimator, value, slope in [("k1", -a, -a), ("k2", a * a / 2, -a), ("k3", k3, -math.expm1(min(a, 10)))]:
        result = loss_and_slope("sampled_kl", logp, target, estimator=estimator)
        assert result == pytest.approx((value, slope), rel=1e-9, abs=1e-14)
        assert loss_of("sampled_kl", batch([logp], [target]), estimator=estimator)[1][estimator].item() == result[0]


def test_k3_is_linear_beyond_its_cap():
    for a in (500.0, 1000.0):  # e^10 (1 + A - 10) - 1 - A, whose derivative is 1 - e^10
        result = loss_and_slope("sampled_kl", -a, 0.0, estimator="k3", dtype=torch.float32)
        assert result == pytest.approx((math.exp(10) * (a - 9) - 1 - a, 1 - math.exp(10)))
    for a in (2 - 1e-9, 2 + 1e-9):
        result = loss_and_slope("sampled_kl", -a, 0.0, estimator="k3", cap=2.0)
        assert result == pytest.approx((math.exp(2) - 3, 1 - math.exp(2)), abs=1e-7)


@pytest.mark.parametrize("a", [1e-4, -1e-3, 0.03])
def test_k3_is_accurate_near_zero_in_float32(a):
    # the rounding error of exp(A) is 6e-8, and exp(A) - 1 - A is 5e-9 at A = 1e-4
    loss, _ = loss_of("sampled_kl", batch([0.0], [a], dtype=torch.float32), estimator="k3")
    assert loss.item() == pytest.approx(math.expm1(a) - a, rel=0.01)


@pytest.mark.parametrize(
    ("sampled", "divergence"),
    [(("policy_gradient", {}), "reverse_kl"), (K1, "reverse_kl"), (K2, "reverse_kl"), (K3, "forward_kl")],
)
def test_expected_gradient_is_that_of_the_divergence(sampled, divergence):
    """The expectation is over the samples of the student: five tokens, weighted by their probability."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1], dtype=DOUBLE, requires_grad=True)
    teacher = torch.tensor([1.0, 0.5, -0.4, 0.0, 1.3], dtype=DOUBLE).log_softmax(-1)
    logp = logits.log_softmax(-1)
    name, parameters = sampled
    expected_loss = logp.exp().detach() @ loss_of(name, batch(logp, teacher), **parameters)[0]
    (gradient,) = torch.autograd.grad(expected_loss, logits)
    (reference_gradient,) = torch.autograd.grad(distance(divergence, logits.log_softmax(-1), teacher), logits)
    torch.testing.assert_close(gradient, reference_gradient)


@pytest.mark.parametrize(("name", "parameters"), [*((name, {}) for name in POLICY), K1])
def test_advantages_are_detached(name, parameters):
    logp, target, rollout = (torch.tensor([x], dtype=DOUBLE, requires_grad=True) for x in (-2.0, -1.0, -2.1))
    loss_of(name, batch(logp, target, rollout=rollout), **parameters)[0].sum().backward()
    assert logp.grad.item() != 0
    assert target.grad is rollout.grad is None


# ── On a distribution ────────────────────────────────────────────────────────────────────────────────────────────────


def distance(name, student, teacher, **parameters) -> torch.Tensor:
    """Return the divergence of two distributions given as log-probs, [S]; the support is the vocabulary by default."""
    tokens = batch([0.0], [0.0], student=student[None], teacher=teacher[None], dtype=student.dtype)
    return loss_of(name, tokens, **{"support": "full"} | parameters)[0].sum()


def logs(*probabilities) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=DOUBLE).log()


@pytest.mark.parametrize(
    ("name", "value"),
    [  # teacher 3/4, 1/4, student 1/2, 1/2; M = 5/8, 3/8
        ("forward_kl", 3 / 4 * LOG(3 / 2) + 1 / 4 * LOG(1 / 2)),
        ("reverse_kl", 1 / 2 * LOG(2 / 3) + 1 / 2 * LOG(2)),
        ("jsd", (3 / 4 * LOG(6 / 5) + 1 / 4 * LOG(2 / 3)) / 2 + (1 / 2 * LOG(4 / 5) + 1 / 2 * LOG(4 / 3)) / 2),
    ],
)
def test_divergences_of_two_tokens_by_hand(name, value):
    assert distance(name, logs(1 / 2, 1 / 2), logs(3 / 4, 1 / 4)).item() == pytest.approx(value)
    for support in ("teacher", "student"):
        assert distance(name, logs(1 / 2), logs(3 / 4), support=support, top_k=1).item() == pytest.approx(value)


def test_tail_keeps_a_top_k_divergence_positive():
    # teacher 1/4, 3/8, 3/8, student 1/2, 1/4, 1/4, the support is the first token:
    # 1/4 log(1/2) = -0.17 without the tail, which adds 3/4 log(3/2) = 0.30
    alone = distance("forward_kl", logs(1 / 2), logs(1 / 4)).item()
    assert alone == pytest.approx(1 / 4 * LOG(1 / 2)) == pytest.approx(-0.1733, abs=1e-4)
    with_tail = distance("forward_kl", logs(1 / 2), logs(1 / 4), support="teacher").item()
    assert with_tail == pytest.approx(alone + 3 / 4 * LOG(3 / 2)) == pytest.approx(0.1308, abs=1e-4)


def formula(name, student, teacher, beta) -> float:
    def kl(p, q):
        return math.fsum(a * LOG(a / b) for a, b in zip(p, q, strict=True))

    if name != "jsd":
        return kl(teacher, student) if name == "forward_kl" else kl(student, teacher)
    mixed = [beta * t + (1 - beta) * s for s, t in zip(student, teacher, strict=True)]
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def pairs(size) -> st.SearchStrategy[torch.Tensor]:
    """Two distributions over a small vocabulary, as log-probs from logits in ± size, [2, V]."""
    words = st.lists(st.tuples(*[st.floats(-size, size)] * 2), min_size=2, max_size=6)
    return words.map(lambda words: torch.tensor(words, dtype=DOUBLE).T.log_softmax(-1))


@pytest.mark.parametrize("name", DIVERGENCES)
@given(pairs(5), st.integers(1, 5), st.floats(0.01, 0.99))
def test_divergences_match_their_formulas(name, two, k, beta):
    parameters, k = {"beta": beta} if name == "jsd" else {}, min(k, two.shape[1] - 1)
    p, q = two.exp().tolist()
    full = distance(name, *two, **parameters).item()
    assert full == pytest.approx(formula(name, p, q, beta), rel=1e-8, abs=1e-10)
    top = distance(name, *two[:, :k], support="teacher", **parameters).item()
    expected = formula(name, [*p[:k], math.fsum(p[k:])], [*q[:k], math.fsum(q[k:])], beta)
    assert top == pytest.approx(expected, rel=1e-8, abs=1e-10)
    assert -1e-10 <= top <= full + 1e-10  # the data processing inequality
    if k == two.shape[1] - 1:
        assert top == pytest.approx(full, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(pairs(60), st.sampled_from([torch.float32, DOUBLE]))
def test_divergences_are_non_negative_and_zero_if_equal(name, two, dtype):
    student, teacher = two.to(dtype)
    for support, k in [("full", len(student)), ("teacher", 1), ("student", len(student) - 1)]:
        # up to rounding, and up to the least tail probability of 1e-6
        assert distance(name, student[:k], teacher[:k], support=support).item() >= -2e-6
        assert abs(distance(name, teacher[:k], teacher[:k], support=support).item()) <= 1e-6


@given(pairs(60))
def test_jsd_is_symmetric_and_bounded(two):
    student, teacher = two
    divergence = distance("jsd", student, teacher).item()
    assert divergence == pytest.approx(distance("jsd", teacher, student).item(), rel=1e-9, abs=1e-12)
    assert divergence <= LOG(2) + 1e-12


@pytest.mark.parametrize(("name", "parameters"), [each for each in EVERY if each is not K1])
def test_gradients_match_finite_differences(name, parameters):
    """k1 is excluded: its gradient is that of another function by design."""
    torch.manual_seed(0)
    objective = OBJECTIVES.build(name, parameters)
    width = 6 if objective.support == "full" else 3
    logits, teacher = 2 * torch.randn(2, 8, 6, dtype=DOUBLE)
    teacher, old = teacher.log_softmax(-1), logits.log_softmax(-1)[:, 0] + 0.1 * torch.randn(8, dtype=DOUBLE)

    def loss(logits):
        student = logits.log_softmax(-1)
        return objective(batch(student[:, 0], teacher[:, 0], old, old, student[:, :width], teacher[:, :width]))[0]

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize(
    ("name", "push"),
    [  # student 1/2, 1/2, teacher 9/10, 1/10, the support is the first token; the derivative is of the second logit
        ("forward_kl", 1 / 2 - 1 / 10),  # q - p
        ("reverse_kl", 1 / 2 * (LOG(5) - (LOG(5 / 9) + LOG(5)) / 2)),  # q (log(q / p) - KL)
        ("jsd", 1 / 4 * (LOG(5 / 3) - (LOG(5 / 7) + LOG(5 / 3)) / 2)),  # the same for M = 7/10, 3/10, halved
    ],
)
def test_tail_penalizes_mass_outside_the_support(name, push):
    logits, teacher = torch.zeros(2, dtype=DOUBLE, requires_grad=True), logs(9 / 10, 1 / 10)
    student = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad(distance(name, student[:1], teacher[:1], support="teacher"), logits)
    assert gradient.tolist() == pytest.approx([-push, push])
    # without a tail, and normalized on the support: no gradient
    student = logits.log_softmax(-1)
    alone = distance(name, student[:1].log_softmax(-1), teacher[:1].log_softmax(-1))
    assert torch.autograd.grad(alone, logits)[0].tolist() == [0, 0]


@pytest.mark.parametrize(("support", "k"), [("full", 4), ("teacher", 1), ("teacher", 3)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_give_finite_values_and_gradients(name, support, k):
    """One of four logits is 1e4 above the others: a top-k has all mass or none, up to float32 rounding."""
    peaks = 1e4 * torch.eye(4)
    for logits, teacher in [(one.clone().requires_grad_(), other) for one in peaks for other in peaks]:
        loss = distance(name, logits.log_softmax(-1)[:k], teacher.log_softmax(-1)[:k], support=support)
        loss.backward()
        assert -2e-6 <= loss.item() <= 1.1e4
        assert logits.grad.isfinite().all()


@given(st.floats(LOG(2e-6), LOG(0.5)), st.floats(-700, LOG(0.5)), st.integers(1, 5))
def test_tail_logprob_is_accurate_near_zero_and_one(log_tail, log_mass, k):
    for mass, tail in [(math.log1p(-math.exp(log_tail)), log_tail), (log_mass, math.log1p(-math.exp(log_mass)))]:
        logp = torch.full((k,), mass - LOG(k), dtype=DOUBLE)
        extended = append_tail_logprob(logp)
        assert extended[:-1].equal(logp)
        assert extended[-1].item() == pytest.approx(tail, rel=1e-9)
        low = append_tail_logprob(torch.tensor([mass], dtype=torch.float32))[-1].item()
        mass = torch.tensor(mass, dtype=torch.float32).item()  # the rounded input is the reference
        assert low == pytest.approx(LOG(-math.expm1(mass)) if mass > -1 else math.log1p(-math.exp(mass)), rel=1e-6)


def test_tail_of_the_student_is_not_bounded():
    # teacher 1/2, 1/5 and a tail of 3/10, student 1 - 2e-9, 1e-9, 1e-9
    tail = torch.tensor([LOG(1e-9)], dtype=DOUBLE, requires_grad=True)
    columns = [torch.zeros(1)] * 4, logs(1 - 2e-9, 1e-9)[None], logs(1 / 2, 1 / 5)[None]
    loss, _ = loss_of("forward_kl", TokenBatch(*columns[0], *columns[1:], tail), support="teacher", top_k=2)
    expected = 1 / 2 * LOG(1 / 2 / (1 - 2e-9)) + 1 / 5 * LOG(1 / 5 / 1e-9) + 3 / 10 * LOG(3 / 10 / 1e-9)
    assert loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(loss.sum(), tail)[0].item() == pytest.approx(-3 / 10)


@pytest.mark.parametrize("mass", [3e-7, 0.0, -1e-8, -1e-6, -LOG(2), -100.0, -1e4, -3e38])
def test_tail_probability_has_a_minimum_and_a_finite_gradient(mass):
    logp = torch.tensor([mass, mass - 50], requires_grad=True)
    tail = append_tail_logprob(logp)[-1]
    tail.backward()
    assert LOG(0.9 * MIN_TAIL_PROB) <= tail.item() <= 0
    assert logp.grad.isfinite().all()


# ── Every objective ──────────────────────────────────────────────────────────────────────────────────────────────────


def evaluate(objective, tokens, rows) -> dict[str, torch.Tensor]:
    """Return the losses, metrics and gradients of some tokens."""
    columns = {field.name: getattr(tokens, field.name)[rows].clone() for field in dataclasses.fields(tokens)}
    leaves = [columns[name].requires_grad_() for name in ("logp_N", "student_logp_NS", "student_tail_logp_N")]
    loss, metrics = objective(TokenBatch(**columns))
    assert {value.shape for value in (loss, *metrics.values())} == {(len(rows),)}
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    return {"loss": loss, **metrics, "by_logp": gradients[0], "by_support": gradients[1], "by_tail": gradients[2]}


@pytest.mark.parametrize(("name", "parameters"), EVERY)
@given(st.permutations(range(6)), st.integers(0, 6), st.integers(0, 2**32))
@settings(max_examples=25)
def test_tokens_are_independent(name, parameters, order, cut, seed):
    objective, source = OBJECTIVES.build(name, parameters), torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, 6, 5, generator=source, dtype=DOUBLE)).log_softmax(-1)
    old, rollout = student[:, 0] + 0.3 * torch.randn(2, 6, generator=source, dtype=DOUBLE)
    width = 5 if objective.support == "full" else 3
    tail = student[:, width - 1]
    tokens = TokenBatch(student[:, 0], old, rollout, teacher[:, 0], student[:, :width], teacher[:, :width], tail)
    single = [evaluate(objective, tokens, [row]) for row in order]
    batches = [evaluate(objective, tokens, rows) for rows in (order[:cut], order[cut:])]  # one may be empty
    for key in single[0]:
        by_batch, by_token = (torch.cat([values[key] for values in cuts]) for cuts in (batches, single))
        torch.testing.assert_close(by_batch, by_token, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entry", OBJECTIVES.entries(), ids=lambda entry: entry.name)
def test_every_objective_has_a_summary_and_a_source(entry):
    assert entry.summary == inspect.getdoc(OBJECTIVES.get(entry.name)).splitlines()[0]
    assert entry.summary.endswith(".")
    assert entry.source


def test_needs_are_settings_of_the_recipe(small):
    top_k = {"score.top_k": 7}, {"rollout.top_k": 7, "score.student_top_k": True}
    needs = dict(zip(("full", "teacher", "student"), ({"score.hidden_states": True}, *top_k), strict=True))
    for name in OBJECTIVES.names():
        for support, expected in needs.items() if name in DIVERGENCES else [("sampled", {})]:
            objective = OBJECTIVES.build(name, {"support": support, "top_k": 7} if expected else {})
            assert (objective.support, objective.needs) == (support, expected)
            assert expected.keys() <= small().flat().keys()


INVALID = {
    "clip_low": (["policy_gradient", "power"], [0.0, 1.0, -0.1, math.nan]),
    "clip_high": (["policy_gradient"], [0.0, math.inf]),
    "dual_clip": (POLICY, [1.0, math.nan]),
    "rollout_correction_cap": (["policy_gradient"], [0.0, math.inf, "5"]),
    "advantage_clip": (["policy_gradient"], [-1.0, math.inf]),
    "alpha": (["power", "top_d"], [0.0, -1.0, math.inf]),
    "penalty": (["constant_penalty"], [0.0, -0.1, math.inf]),
    "cap": (["sampled_kl"], [0.0, 80.0, math.nan]),
    "estimator": (["sampled_kl"], ["k4"]),
    "support": (DIVERGENCES, ["techer", "sampled"]),
    "top_k": (DIVERGENCES, [0, 1.5, True]),
    "beta": (["jsd"], [0.0, 1.0, math.nan]),
    "temprature": (OBJECTIVES.names(), [1.0]),
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for key, (names, values) in INVALID.items() for name in names for value in values],
)
def test_invalid_parameters_are_named(name, key, value):
    with pytest.raises(OpdctlError, match=rf"\b{key}\b") as caught:
        OBJECTIVES.build(name, {key: value})
    assert caught.value.kind == "invalid_recipe"
