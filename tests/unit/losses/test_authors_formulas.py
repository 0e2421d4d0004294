"""Every token weight against its published formula, written again as loops over Python floats."""

import math
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from helpers.token_weights import EXTREME_STEPS, STEPS, K, assert_close, tokens, weights_of
from hypothesis import given
from hypothesis import strategies as st

from opdctl.losses.token_weights import COLUMN_SETTINGS
from opdctl.registry import WEIGHTS


def first(fraction, length):
    """Return ceil(fraction · length) for the exact decimal fraction."""
    return math.ceil(Fraction(str(fraction)) * length)


def iw_opd(t, gamma, floor, signed):
    """1 + gamma (1 - F) with the share F of Σ|A| before the token; the sum of the denominator contains the last one."""
    spend = [a if signed else abs(a) for a in t.advantage_T.tolist()]
    shares = [math.fsum(spend[:k]) / (math.fsum(spend) or math.inf) for k in range(len(t))]
    return [floor + gamma * (1 - min(max(share, 0), 1)) for share in shares]


def prefix_ratio(responses, alpha, floor, gamma, normalize):
    ratios = [[math.exp(alpha * math.fsum(t.advantage_T[:k])) for k in range(len(t))] for t in responses]
    weights = []
    for row in ratios:
        columns = [[other[k] for other in ratios if k < len(other)] for k in range(len(row))]
        groups = columns if normalize == "position" else [row] * len(row)
        means = [math.fsum(group) / len(group) for group in groups]
        weights.append([floor + gamma * ratio / mean for ratio, mean in zip(row, means, strict=True)])
    return weights


def teacher_confidence(t, alpha, window, q, w_min):
    weights = [1.0][: len(t)]
    for k in range(1, len(t)):
        surprise = sorted(-logp for logp in t.teacher_logp_T[max(0, k - window) : k].tolist())
        worst = surprise[-max(1, math.floor((1 - Fraction(str(q))) * len(surprise))) :]
        weights.append(max(w_min, math.exp(-alpha * math.fsum(worst) / len(worst))))
    return weights


def prune(t, drop, tau, base, top_k):
    weights, drifted = [], 0
    for student, teacher in zip(t.columns["student_top_ids"], t.columns["teacher_top_ids"], strict=True):
        drifted += len({*student[:top_k].tolist()} & {*teacher[:top_k].tolist()}) < Fraction(str(tau)) * top_k
        weights.append(min(max(1 - drop * drifted, 0), 1) + base)
    return weights


def linear_decay(t, gamma):
    return [1 + gamma * (1 - k / (len(t) - 1 or 1)) for k in range(len(t))]


def position_sigmoid(t, w_min, tau, scale):
    return [w_min + (1 - w_min) / (1 + math.exp((tau - k / len(t)) / scale)) for k in range(1, len(t) + 1)]


def prefix_boost(t, fraction, multiplier, outside=1):
    return [multiplier if k < first(fraction, len(t)) else outside for k in range(len(t))]


def prefix_curriculum(t, mode, schedule, start, end, steps, multiplier):
    progress = min(t.step / (steps - 1), 1) if steps > 1 else 1  # of steps from 1: (step - 1) / (steps - 1)
    grown = progress if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    fraction = round(start + (end - start) * grown, 12)  # a rounding error could add a token
    return prefix_boost(t, fraction, multiplier) if mode == "boost" else prefix_boost(t, fraction, 1, 0)


SHARE, SIZE = st.integers(0, 100).map(lambda n: n / 100), st.floats(0, 5)
CURRICULUM = {"mode": st.sampled_from(["boost", "mask"]), "schedule": st.sampled_from(["cosine", "linear"])}
CURRICULUM |= {"start": SHARE, "end": SHARE, "steps": st.integers(1, 120), "multiplier": SIZE}
CONFIDENCE = {"alpha": st.floats(0, 2), "window": st.integers(1, 70), "q": SHARE, "w_min": st.floats(0, 1)}
FORMULAS = [
    ("uniform", lambda t: [1] * len(t), STEPS, {}),
    ("iw_opd", iw_opd, EXTREME_STEPS, {"gamma": SIZE, "floor": SIZE, "signed": st.just(False)}),
    ("iw_opd", iw_opd, STEPS, {"gamma": SIZE, "floor": SIZE, "signed": st.just(True)}),
    ("teacher_confidence", teacher_confidence, STEPS, CONFIDENCE),
    ("prune", prune, STEPS, {"drop": SHARE, "tau": SHARE, "base": SIZE, "top_k": st.integers(1, K)}),
    ("linear_decay", linear_decay, STEPS, {"gamma": SIZE}),
    ("position_sigmoid", position_sigmoid, STEPS, {"w_min": SHARE, "tau": SHARE, "scale": st.floats(0.002, 5)}),
    ("prefix_only", lambda t, fraction: prefix_boost(t, fraction, 1, 0), STEPS, {"fraction": SHARE}),
    ("suffix_only", lambda t, fraction: prefix_boost(t, fraction, 1, 0)[::-1], STEPS, {"fraction": SHARE}),
    ("prefix_boost", prefix_boost, STEPS, {"fraction": SHARE, "multiplier": SIZE}),
    ("prefix_curriculum", prefix_curriculum, STEPS, CURRICULUM),
]


@pytest.mark.parametrize(("name", "formula", "steps", "params"), FORMULAS)
@given(data=st.data())
def test_weight_matches_its_formula(name, formula, steps, params, data):
    params, step = data.draw(st.fixed_dictionaries(params)), data.draw(steps)(COLUMN_SETTINGS.values())
    assert_close(weights_of(name, step, **params), [formula(t, **params) for t in step], 1e-9)


RATIO = {
    "alpha": st.floats(0, 0.5),
    "floor": SIZE,
    "gamma": SIZE,
    "normalize": st.sampled_from(["position", "response"]),
}


@given(STEPS, st.fixed_dictionaries(RATIO))
def test_prefix_ratio_matches_its_formula(step, params):
    assert_close(weights_of("prefix_ratio", step(), **params), prefix_ratio(step(), **params), 1e-9)


def kl_to_teacher(t, k, top_k):
    logps = [t.columns[name][k, :top_k].tolist() for name in ("student_top_logprobs", "teacher_student_top_logprobs")]
    student, teacher = ([*each, math.log(max(1 - math.fsum(map(math.exp, each)), 1e-6))] for each in logps)
    return max(0.0, math.fsum(math.exp(s) * (s - other) for s, other in zip(student, teacher, strict=True)))


def of_range(values):
    low, high = min(values, default=0), max(values, default=0)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


@given(STEPS, SHARE, st.integers(0, K))
def test_tip_matches_its_formula(step, rho, top_k):
    step = step(COLUMN_SETTINGS.values())
    entropy = of_range([h for t in step for h in t.columns["student_entropies"].tolist()])
    apart = [kl_to_teacher(t, k, top_k) if top_k else abs(t.advantage_T[k]) for t in step for k in range(len(t))]
    scores = [h + d - h * d for h, d in zip(entropy, of_range(apart), strict=True)]
    count = first(rho, len(scores))
    least = sorted(scores, reverse=True)[count - 1] if count else math.inf
    flat_weights = [weight for weights in weights_of("tip", step, rho=rho, top_k=top_k) for weight in weights]
    assert sum(flat_weights) >= count
    assert {*flat_weights} <= {0, 1}
    for weight, score in zip(flat_weights, scores, strict=True):
        assert weight == (score > least) or abs(score - least) < 1e-9  # within rounding of the threshold


@given(STEPS, SIZE, SIZE, st.integers(0, 100))
def test_fire_matches_its_formula(step, alpha, beta, percentile):
    step = step(COLUMN_SETTINGS.values())
    means = {i: math.fsum(t.teacher_logp_T) / len(t) for i, t in enumerate(step) if len(t)}
    ranked = sorted(means.values())
    below, part = divmod(Fraction(percentile, 100) * (len(ranked) - 1), 1)
    least = ranked[below] + float(part) * (ranked[below + (part > 0)] - ranked[below]) if ranked else 0
    kept = [i for i, mean in means.items() if mean >= least]
    entropies = [[t.columns[name].tolist() for t in step] for name in ("teacher_entropies", "student_entropies")]
    top_t, top_s = (max((h for each in entropy for h in each), default=0) or 1 for entropy in entropies)
    expected = [
        [(1 + alpha * (1 - t / top_t)) * (1 + beta * s / top_s) * (i in kept) for t, s in zip(*each, strict=True)]
        for i, each in enumerate(zip(*entropies, strict=True))
    ]
    mean = math.fsum(weight for i in kept for weight in expected[i]) / (sum(len(step[i]) for i in kept) or 1)
    weights = weights_of("fire", step, alpha=alpha, beta=beta, percentile=percentile)
    assert_close(weights, [[weight / mean for weight in each] for each in expected], 1e-9)


def test_every_weight_has_a_formula_here():
    assert {name for name, *_ in FORMULAS} | {"prefix_ratio", "tip", "fire"} == {*WEIGHTS.names()}


# ── Where the sources differ from one another ────────────────────────────────────────────────────────────────────────


def iw_opd_of_equation_17(advantages, gamma=0.5):
    """F sums up to T - 1 in the denominator: the last weight is 1."""
    sums = [0.0, *accumulate(map(abs, advantages))]
    return [1 + gamma * (1 - before / (sums[-2] or 1)) for before in sums[:-1]]


def iw_opd_of_the_code(advantages, gamma=0.5):
    """F sums all tokens and adds 1e-8."""
    sums = [0.0, *accumulate(map(abs, advantages))]
    return [1 + gamma * (1 - before / (sums[-1] + 1e-8)) for before in sums[:-1]]


def test_denominators_of_iw_opd_by_hand():
    # |A| = 1, 0, 3, 4: Eq. 17 divides by 4, the code and opdctl by 8
    assert iw_opd_of_equation_17([-1, 0, 3, -4]) == [1.5, 1.375, 1.375, 1.0]
    assert_close(weights_of("iw_opd", [tokens([-1, 0, 3, -4])]), [[1.5, 1.4375, 1.4375, 1.25]])


@given(st.lists(st.floats(-20, 20).filter(lambda a: abs(a) > 1e-3), min_size=2, max_size=60))
def test_denominators_of_iw_opd_differ_by_the_last_tokens_share(advantages):
    (weights,) = weights_of("iw_opd", [tokens(advantages)])
    total = math.fsum(map(abs, advantages))
    above = np.subtract(weights, iw_opd_of_equation_17(advantages))
    assert above[-1] == pytest.approx(0.5 * abs(advantages[-1]) / total)
    assert (above >= -1e-12).all()
    assert (above <= above[-1] + 1e-12).all()
    np.testing.assert_allclose(weights, iw_opd_of_the_code(advantages), rtol=0, atol=0.5 * 1e-8 / total + 1e-12)


def test_alpha_of_the_prefix_ratio_must_fit_the_length():
    """At A = -1 nat a token, alpha 0.1 leaves nothing of the ratio after 60 tokens, and 0.01 nothing after 600."""
    for alpha, length in ((0.1, 60), (0.01, 600), (0.001, 6000)):
        ratio = [math.exp(-alpha * k) for k in range(length + 1)]
        mean = math.fsum(ratio) / len(ratio)
        (weights,) = weights_of("prefix_ratio", [tokens([-1.0] * (length + 1))], alpha=alpha, normalize="response")
        assert weights[-1] == pytest.approx(ratio[-1] / mean)
        assert weights[-1] < 0.02
