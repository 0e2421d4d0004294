"""Token weights: values by hand, and invariants. Their formulas are tested in test_authors_formulas.py."""

import inspect
import math
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.token_weights import EXTREME_STEPS, STEPS, assert_close, blank, tokens, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.errors import ExitCode, OpdctlError
from opdctl.losses.token_weights import COLUMN_SETTINGS, Product, Uniform, build_weight, weigh
from opdctl.registry import WEIGHTS

LN2, LN3 = math.log(2), math.log(3)
EVERY = [(name, {}) for name in WEIGHTS.names()] + [
    ("iw_opd", {"signed": True}),
    ("prefix_ratio", {"alpha": 1.0, "floor": 1.0}),
    ("prefix_ratio", {"alpha": 1.0, "normalize": "response"}),
    ("prefix_curriculum", {"mode": "mask", "schedule": "linear"}),
    ("tip", {"top_k": 0}),
]
POSITION = ["linear_decay", "position_sigmoid", "prefix_only", "suffix_only", "prefix_boost", "prefix_curriculum"]


# ── By hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SIGNED, WITHIN = {"signed": True}, {"normalize": "response"}
SURPRISE = tokens([0] * 4, [-LN2, -2 * LN2, -3 * LN2, 0])
TOP = {"student_top_ids": [[1, 2, 3]] * 5, "teacher_top_ids": [[2, 1, 9], [7, 1, 2], [1, 2, 3], [3, 8, 1], [1, 3, 2]]}
BY_HAND = [
    ("uniform", {}, tokens([3, -1]), [1, 1]),
    # |A| = 1, 0, 3, 4; total 8; fraction before each token 0, 1/8, 1/8, 4/8; w = 1 + 0.5 (1 - fraction)
    ("iw_opd", {}, tokens([-1, 0, 3, -4]), [1.5, 1.4375, 1.4375, 1.25]),
    ("iw_opd", {"gamma": 0.75}, tokens([0, 0, 0]), [1.75, 1.75, 1.75]),  # |A| is 0 everywhere
    ("iw_opd", {"gamma": 0.0}, tokens([1, -2]), [1, 1]),
    ("iw_opd", SIGNED, tokens([2, -1, 3]), [1.5, 1.25, 1.375]),  # total 4; before each token 0, 2/4, 1/4
    ("iw_opd", SIGNED, tokens([-3, 1, 1]), [1.5, 1, 1]),  # total -1; 0, 3 and 2, both clipped to 1
    ("iw_opd", SIGNED, tokens([-1, 3]), [1.5, 1.5]),  # total 2; 0, -1/2 clipped to 0
    ("iw_opd", SIGNED, tokens([1, -1]), [1.5, 1.5]),  # total 0: the fraction is 0
    ("iw_opd", SIGNED, tokens([3, -1, -2]), [1.5, 1.5, 1.5]),  # the same
    ("iw_opd", SIGNED, tokens([0.1, 0.2, -0.3]), [1.5, 1.5, 1.5]),  # in float64 their sum is 5.6e-17: rounding
    ("iw_opd", SIGNED, tokens([0.1, 0.2, -0.29999]), [1.5, 1, 1]),  # total 1e-5: 0, 1e4 and 3e4
    # the surrogate alone: 1 - fraction
    ("iw_opd", {"floor": 0.0, "gamma": 1.0}, tokens([-1, 0, 3, -4]), [1, 0.875, 0.875, 0.5]),
    ("iw_opd", {"floor": 0.25}, tokens([0, 0]), [0.75, 0.75]),
    # r = 1, 2, 1, of mean 4/3; the last A precedes no token
    ("prefix_ratio", {"alpha": 1.0, **WITHIN}, tokens([LN2, -LN2, 9]), [0.75, 1.5, 0.75]),
    # r = 1, 2^-1, 2^1, of mean 7/6
    ("prefix_ratio", {"alpha": 0.5, **WITHIN}, tokens([-2 * LN2, 4 * LN2, 0]), [6 / 7, 3 / 7, 12 / 7]),
    # blended: 1 + 2 r
    ("prefix_ratio", {"alpha": 1.0, "floor": 1.0, "gamma": 2.0, **WITHIN}, tokens([LN2, -LN2, 9]), [2.5, 4, 2.5]),
    # -log p = 1, 2, 3, 0 in ln 2; the windows of two are empty, {1}, {1, 2}, {2, 3}; their worst half 1, 2, 3:
    # exp(-Q) = 1/2, 1/4, 1/8; the last is below 0.2
    ("teacher_confidence", {"alpha": 1.0, "window": 2, "q": 0.5, "w_min": 0.2}, SURPRISE, [1, 0.5, 0.25, 0.2]),
    # the same with alpha 2 and the mean of each window: Q = 1, 3/2, 5/2 in ln 2, exp(-2 Q) = 2^-2, 2^-3, 2^-5
    ("teacher_confidence", {"alpha": 2.0, "window": 2, "q": 0.0, "w_min": 0.0}, SURPRISE, [1, 1 / 4, 1 / 8, 1 / 32]),
    # the worst 0.1 of 9 and of 10 are one token, although (1 - 0.9) * 10 < 1; of 19 still one, of 20 two
    (
        "teacher_confidence",
        {},
        tokens([0] * 21, [0.0] * 8 + [-LN2] + [0.0] * 12),
        [1] * 9 + [1 / 2] * 11 + [2**-0.5],
    ),
    # overlap of two ids 1, 1/2, 1, 0, 1/2; tokens below 0.7 up to t: 0, 1, 1, 2, 3; 1 - 0.4 n: 1, 0.6, 0.6, 0.2, -0.2
    ("prune", {"drop": 0.4, "top_k": 2}, tokens([0] * 5, **TOP), [1.5, 1.1, 1.1, 0.7, 0.5]),
    # with tau 0.5 only the fourth token is below
    ("prune", {"drop": 0.4, "top_k": 2, "tau": 0.5, "base": 0.0}, tokens([0] * 5, **TOP), [1, 1, 1, 0.6, 0.6]),
    ("linear_decay", {}, blank(5), [1.5, 1.375, 1.25, 1.125, 1]),
    ("linear_decay", {"gamma": 2.0}, blank(1), [3]),
    # t/n = 1/4 … 1; sigmoid of -1, 0, 1, 2: 0.268941421370, 0.5, 0.731058578630, 0.880797077978; 0.25 + 0.75 of these
    ("position_sigmoid", {"tau": 0.5, "scale": 0.25}, blank(4), [0.45170606603, 0.625, 0.79829393397, 0.91059780848]),
    ("prefix_only", {}, blank(5), [1, 1, 0, 0, 0]),  # 0.3 · 5 = 1.5, so two tokens
    ("prefix_only", {"fraction": 0.07}, blank(100), [1] * 7 + [0] * 93),  # although 0.07 * 100 > 7
    ("suffix_only", {}, blank(5), [0, 0, 0, 1, 1]),
    ("suffix_only", {"fraction": 0.0}, blank(2), [0, 0]),
    ("prefix_boost", {}, blank(5), [1.5, 1.5, 1, 1, 1]),
    ("prefix_boost", {"fraction": 0.5, "multiplier": 0.25}, blank(2), [0.25, 1]),
    # half-way from 0.3 to 1 is 0.65: 2.6 of 4 tokens
    ("prefix_curriculum", {"steps": 101}, blank(4, step=50), [1.5, 1.5, 1.5, 1]),
]


@pytest.mark.parametrize(("name", "params", "response", "expected"), BY_HAND)
def test_one_response_by_hand(name, params, response, expected):
    assert_close(weights_of(name, [response], **params), [expected])


# Of 20 tokens, at steps 0 to 5. Cosine: (1 - cos(pi/4)) / 2 = 0.1464 is 2.93, (1 - cos(3 pi/4)) / 2 = 0.8536 17.07.
@pytest.mark.parametrize(("schedule", "kept"), [("linear", [0, 5, 10, 15, 20, 20]), ("cosine", [0, 3, 10, 18, 20, 20])])
def test_curriculum_reaches_its_end_at_its_last_step(schedule, kept):
    params = {"schedule": schedule, "start": 0.0, "end": 1.0, "steps": 5}
    step = [blank(20, step) for step in range(6)]
    assert weights_of("prefix_curriculum", step, mode="mask", **params) == [[1] * n + [0] * (20 - n) for n in kept]
    boosted = weights_of("prefix_curriculum", step, mode="boost", multiplier=3.0, **params)
    assert boosted == [[3] * n + [1] * (20 - n) for n in kept]


def test_curriculum_of_one_step_has_its_end_value():
    assert weights_of("prefix_curriculum", [blank(4)], mode="mask", end=0.75, steps=1) == [[1, 1, 1, 0]]


# Ratios exp(Σ A before) = 1, 2, 8 and 1, 1/2 and 1: of the three responses the mean at the first position is 1, of the
# two longer ones at the second 5/4, and of the longest alone at the third 8.
RAGGED = [tokens([LN2, 2 * LN2, 5]), tokens([-LN2, 3]), tokens([7]), tokens([])]


def test_prefix_ratio_over_the_responses_by_hand():
    by_position = [[1, 8 / 5, 1], [1, 2 / 5], [1], []]
    assert_close(weights_of("prefix_ratio", RAGGED, alpha=1.0), by_position)
    blended = [[1 + 0.5 * ratio for ratio in ratios] for ratios in by_position]
    assert_close(weights_of("prefix_ratio", RAGGED, alpha=1.0, floor=1.0, gamma=0.5), blended)
    within = [[3 / 11, 6 / 11, 24 / 11], [4 / 3, 2 / 3], [1], []]
    assert_close(weights_of("prefix_ratio", RAGGED, alpha=1.0, normalize="response"), within)


# Entropies 0, 1, 2, 4 are 0, 1/4, 1/2, 1 of their range; |A| = 4, 0, 1, 2 are 1, 0, 1/4, 1/2.
# h + d - h d = 1, 1/4, 1/2 + 1/4 - 1/8 = 5/8, 1 + 1/2 - 1/2 = 1; of four tokens, 0.25 are one and 0.51 are three
TIP = [tokens([-4, 0], student_entropies=[0.0, 1.0]), tokens([1, 2], student_entropies=[2.0, 4.0])]


@pytest.mark.parametrize(
    ("rho", "expected"), [(0, [0, 0, 0, 0]), (0.25, [1, 0, 0, 1]), (0.51, [1, 0, 1, 1]), (1, [1] * 4)]
)
def test_tip_on_the_sampled_token_by_hand(rho, expected):
    assert weights_of("tip", TIP, rho=rho, top_k=0) == [expected[:2], expected[2:]]


# The student gives its first token 1/2, 1/2, 3/4, 1/2, the teacher 1/4, 1/2, 1/4, 1/2; the tail has the remaining mass:
# KL = ln(2)/2 + ln(2/3)/2 = ln(4/3)/2, 0, 3/4 ln 3 - 1/4 ln 3 = ln(3)/2, 0; of their range d = 0.26186, 0, 1, 0.
@pytest.mark.parametrize(("entropy", "expected"), [(0.25, [1, 0, 1, 1]), (0.27, [0, 1, 1, 1])])
def test_tip_on_the_top_k_by_hand(entropy, expected):
    student = [[-LN2, -9], [-LN2, -9], [LN3 - 2 * LN2, -9], [-LN2, -9]]  # the second column is beyond top_k
    teacher = [[-2 * LN2, -9], [-LN2, -9], [-2 * LN2, -9], [-LN2, -9]]
    columns = {"student_top_logprobs": student, "teacher_student_top_logprobs": teacher}
    response = tokens([0, 9, 0, 0], student_entropies=[0, entropy, 0, 1], **columns)
    assert weights_of("tip", [response], rho=0.75, top_k=1) == [expected]


def test_tip_keeps_ties():
    # h = 0, 1, 1/4 and d = 0, 4/10, 1: h + d - h d = 0, 1, 1
    response = tokens([0, 4, 10], student_entropies=[0.0, 4.0, 1.0])
    assert weights_of("tip", [response], rho=0.1, top_k=0) == [[0, 1, 1]]


def test_tip_ranks_subnormal_numbers():
    response = tokens([0, 0, 0], student_entropies=[0.0, 5e-324, 0.0])
    assert weights_of("tip", [response], rho=0.3, top_k=0) == [[0, 1, 0]]


# Mean log p_teacher is -1, -2, -3: the 50th percentile is -2. H_T / 8 = 0, 1/4, 1/2, 1; H_S / 4 = 1/4, 1/2, 1, 0.
FIRE = [
    tokens([0, 0], [-0.5, -1.5], teacher_entropies=[0.0, 2.0], student_entropies=[1.0, 2.0]),
    tokens([0], [-2], teacher_entropies=[4.0], student_entropies=[4.0]),
    tokens([], [], teacher_entropies=[], student_entropies=[]),
    tokens([0], [-3], teacher_entropies=[8.0], student_entropies=[0.0]),
]


def test_fire_by_hand():
    # alpha 1, beta 2: (2)(3/2) = 3, (7/4)(2) = 7/2, (3/2)(3) = 9/2; mean 11/3
    assert_close(weights_of("fire", FIRE, percentile=50, beta=2), [[9 / 11, 21 / 22], [27 / 22], [], [0]])
    # alpha 2, beta 1, all kept: (3)(5/4) = 15/4, (5/2)(3/2) = 15/4, (2)(2) = 4, (1)(1) = 1; mean 25/8
    assert_close(weights_of("fire", FIRE, percentile=0, alpha=2), [[1.2, 1.2], [1.28], [], [0.32]])


def test_fire_keeps_the_response_at_the_percentile():
    # -8 … -1, then -0.1: the 28th percentile of 26 is the value after 0.28 · 25 = 7 others, although 0.28 * 25 > 7.
    means = [*range(-8, 0), *[-0.1] * 18]
    step = [tokens([0], [mean], teacher_entropies=[0.0], student_entropies=[0.0]) for mean in means]
    assert_close(weights_of("fire", step, percentile=28), [[0]] * 7 + [[1]] * 19)


# ── Invariants ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "params"), EVERY)
@settings(max_examples=50)
@given(step=EXTREME_STEPS)
def test_weights_are_finite_and_non_negative(name, params, step):
    weight = WEIGHTS.build(name, params)
    step = step(weight.needs)
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        weights = weight.weigh_step(step)
    assert [(weight_T.shape, weight_T.dtype) for weight_T in weights] == [((len(t),), np.float64) for t in step]
    assert all(np.isfinite(weight_T).all() and (weight_T >= 0).all() for weight_T in weights)


@pytest.mark.parametrize(("name", "params"), EVERY)
@settings(max_examples=40)
@given(step=STEPS, data=st.data())
def test_weights_do_not_depend_on_order_or_other_responses(name, params, step, data):
    weight = WEIGHTS.build(name, params)
    step = step(weight.needs)
    order, weights = data.draw(st.permutations(range(len(step)))), weigh(weight, step)
    assert_close(weigh(weight, [step[i] for i in order]), [weights[i] for i in order])
    if not weight.needs_full_step:
        assert_close([weigh(weight, [response])[0] for response in step], weights, 0)


@pytest.mark.parametrize(
    ("name", "params"), [("tip", {"top_k": 0}), ("fire", {"percentile": 0}), ("prefix_ratio", {"alpha": 1.0})]
)
def test_relative_weights_depend_on_all_responses_of_the_step(name, params):
    one, other, third = (
        tokens(x, student_entropies=x, teacher_entropies=x) for x in ([1.0, 2.0], [7.0, 9.0], [0.0, 0.5])
    )
    together = weights_of(name, [one, other], **params)
    assert weights_of(name, [one, third], **params)[0] != together[0]
    assert weights_of(name, [one], **params) + weights_of(name, [other], **params) != together


@pytest.mark.parametrize("name", POSITION)
@settings(max_examples=30)
@given(step=EXTREME_STEPS)
def test_position_weights_depend_on_the_length_only(name, step):
    assert weights_of(name, step()) == weights_of(name, [blank(len(t), t.step) for t in step()])


@pytest.mark.parametrize("name", ["iw_opd", "linear_decay"])
@given(EXTREME_STEPS, st.floats(0, 1e6))
def test_iw_opd_and_linear_decay_fall_from_one_plus_gamma_towards_one(name, step, gamma):
    for weights in filter(None, weights_of(name, step(), gamma=gamma)):
        assert weights[0] == 1 + gamma
        assert weights == sorted(weights, reverse=True)
        assert weights[-1] >= 1


@given(STEPS, EXTREME_STEPS, st.integers(-300, 300), st.booleans())
def test_iw_opd_is_invariant_to_scale_and_sign(step, extreme, power, signed):
    scaled = [tokens(math.ldexp(-1.0, power) * t.advantage_T) for t in step()]
    assert weights_of("iw_opd", scaled, signed=signed) == weights_of("iw_opd", step(), signed=signed)
    mirrored = [tokens(-t.advantage_T) for t in extreme()]
    assert weights_of("iw_opd", mirrored, signed=signed) == weights_of("iw_opd", extreme(), signed=signed)
    absolute = [tokens(np.abs(t.advantage_T)) for t in extreme()]
    assert weights_of("iw_opd", absolute) == weights_of("iw_opd", extreme())


@given(EXTREME_STEPS, st.floats(0, 10))
def test_prefix_ratio_has_mean_one_in_each_response_or_at_each_position(step, alpha):
    for weights in filter(None, weights_of("prefix_ratio", step(), alpha=alpha, normalize="response")):
        assert math.fsum(weights) / len(weights) == pytest.approx(1)
    for weights in zip_longest(*weights_of("prefix_ratio", step(), alpha=alpha)):
        present = [weight for weight in weights if weight is not None]
        assert math.fsum(present) / len(present) == pytest.approx(1)


@given(EXTREME_STEPS, st.floats(0, 5), st.floats(0, 5), st.floats(0, 100))
def test_fire_has_mean_one_over_the_kept_tokens(step, alpha, beta, percentile):
    step = step(COLUMN_SETTINGS.values())
    weights = weights_of("fire", step, alpha=alpha, beta=beta, percentile=percentile)
    kept = [weight for each in weights if any(each) for weight in each]
    assert bool(kept) == any(map(len, step))
    assert not kept or (math.fsum(kept) / len(kept) == pytest.approx(1) and min(kept) > 0)


# ── Products and errors ──────────────────────────────────────────────────────────────────────────────────────────────


def test_product_by_hand():
    # iw_opd 1.5, 1.4375, 1.4375, 1.25 and 1.5, 1.5, on the first half of each
    weight = build_weight("iw_opd", {}, ("prefix_only", {"fraction": 0.5}))
    assert_close(weigh(weight, [tokens([-1, 0, 3, -4]), blank(2)]), [[1.5, 1.4375, 0, 0], [1.5, 0]])
    # tip keeps [1, 0] and [0, 1] of the whole step; linear_decay is 1.5, 1 in each
    assert_close(weigh(build_weight("tip", {"top_k": 0}, ("linear_decay", {"gamma": 0.5})), TIP), [[1.5, 0], [0, 1]])
    assert build_weight("iw_opd", {"gamma": 2.0}) == WEIGHTS.build("iw_opd", {"gamma": 2.0})


def test_product_needs_the_union_and_the_greater_value():
    prune, tip = WEIGHTS.build("prune", {"top_k": 8}), WEIGHTS.build("tip", {"top_k": 32})
    expected = {"rollout.entropy": True, "rollout.top_k": 32, "score.top_k": 8, "score.student_top_k": True}
    assert Product(prune, tip).needs == Product(tip, prune).needs == expected
    assert Product(prune, WEIGHTS.build("uniform", {})).needs == prune.needs


def test_each_weight_needs_what_it_reads():
    needs = {name: WEIGHTS.build(name, {}).needs for name in WEIGHTS.names()}
    assert needs["prune"] == {"rollout.top_k": 16, "score.top_k": 16}
    assert needs["tip"] == {"rollout.entropy": True, "rollout.top_k": 16, "score.student_top_k": True}
    assert needs["fire"] == {"rollout.entropy": True, "score.entropy": True}
    assert not any(needs[name] for name in [*POSITION, "uniform", "iw_opd", "prefix_ratio", "teacher_confidence"])
    assert WEIGHTS.build("prune", {"top_k": 3}).needs == {"rollout.top_k": 3, "score.top_k": 3}
    assert WEIGHTS.build("tip", {"top_k": 0}).needs == {"rollout.entropy": True}


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_each_weight_says_whether_it_reads_the_students_log_probs(name, params):
    """If it does not, other log-probs of the student change nothing."""
    columns = {"student_entropies": [0.5, 1, 2], "teacher_entropies": [1, 2, 3]}
    columns |= {"student_top_ids": [[1, 2]] * 3, "teacher_top_ids": [[2, 3]] * 3}
    columns |= {"student_top_logprobs": [[-1, -2]] * 3, "teacher_student_top_logprobs": [[-2, -1], [-1, -3], [-1, -2]]}
    weight = WEIGHTS.build(name, params)
    steps = [[tokens(a, [-1, -2, -3], **columns), tokens([5, 0, 1], **columns)] for a in ([-9, 4, 2], [1, -4, 2])]
    first, second = (np.concatenate(weigh(weight, step)).tolist() for step in steps)
    assert (first != second) == weight.reads_student_logprobs
    assert Product(weight, Uniform()).reads_student_logprobs == weight.reads_student_logprobs


@pytest.mark.parametrize("weights", [[1, math.nan], [1, math.inf], [1, -1e-300], [1], [1, 1, 1], [[1, 1]], []])
def test_invalid_weights_are_rejected(weights):
    weight = SimpleNamespace(weigh_step=lambda responses: [np.ones(1), np.array(weights, float)])
    with pytest.raises(OpdctlError, match="a response of 2 tokens") as caught:
        weigh(weight, [blank(1), blank(2)])
    assert (caught.value.kind, caught.value.code) == ("invalid_data", ExitCode.BAD_DATA)


STORED = ["rollout.entropy", "rollout.top_k", "rollout.top_k", "score.entropy", "score.top_k", "score.student_top_k"]


@pytest.mark.parametrize(("column", "setting"), [*zip(COLUMN_SETTINGS, STORED, strict=True)])
def test_missing_column_names_its_setting(column, setting):
    with pytest.raises(OpdctlError, match=f"`{column}`") as caught:
        blank(1).column(column)
    assert (caught.value.kind, caught.value.code) == ("settings_mismatch", ExitCode.RECIPE_MISMATCH)
    assert f"`{setting}`" in caught.value.hint
    assert tokens([0], **{column: [3]}).column(column).tolist() == [3]


PARAMETERS = [(entry.name, key, kind) for entry in WEIGHTS.entries() for key, kind in entry.parameters.items()]
WRONG = {bool: [1, "true"], str: ["bost", 1], int: [1.5, True, "3"], float: [math.nan, math.inf, True, "3"]}


@pytest.mark.parametrize(("name", "key", "default"), PARAMETERS)
def test_parameter_of_the_wrong_type(name, key, default):
    for value in WRONG[type(default)]:
        with pytest.raises(OpdctlError) as caught:
            WEIGHTS.build(name, {key: value})
        assert caught.value.kind == "invalid_recipe"
        assert caught.value.detail.startswith(f"{key} must be ")


RANGES = """
0 inf iw_opd.gamma iw_opd.floor linear_decay.gamma prefix_ratio.alpha prefix_ratio.floor prefix_ratio.gamma
0 inf teacher_confidence.alpha prune.drop prune.base tip.top_k
0 inf prefix_boost.multiplier prefix_curriculum.multiplier fire.alpha fire.beta
0 1 teacher_confidence.q teacher_confidence.w_min prune.tau position_sigmoid.w_min position_sigmoid.tau tip.rho
0 1 prefix_only.fraction suffix_only.fraction prefix_boost.fraction prefix_curriculum.start prefix_curriculum.end
0 100 fire.percentile
1 inf teacher_confidence.window prune.top_k prefix_curriculum.steps
0.002 inf position_sigmoid.scale
"""
RANGES = [(low, high, path) for low, high, *paths in map(str.split, RANGES.strip().splitlines()) for path in paths]


@pytest.mark.parametrize(("low", "high", "path"), RANGES)
def test_parameter_out_of_range(low, high, path):
    low, high = float(low), float(high)
    name, key = path.split(".")
    is_integer = isinstance(getattr(WEIGHTS.build(name, {}), key), int)
    for value in (low, min(high, 1e6)):
        assert getattr(WEIGHTS.build(name, {key: int(value) if is_integer else value}), key) == value
    for value in [int(low) - 1] if is_integer else [math.nextafter(low, -1), math.nextafter(high, math.inf)]:
        with pytest.raises(OpdctlError) as caught:
            WEIGHTS.build(name, {key: value})
        assert caught.value.detail.startswith(f"{key} must be a finite number ")


def test_unknown_choice_or_parameter():
    with pytest.raises(OpdctlError, match="mode must be 'boost' or 'mask', got 'bost'"):
        WEIGHTS.build("prefix_curriculum", {"mode": "bost"})
    with pytest.raises(OpdctlError, match="schedule must be 'cosine' or 'linear', got 'step'"):
        WEIGHTS.build("prefix_curriculum", {"schedule": "step"})
    with pytest.raises(OpdctlError, match="has no parameter `gama`; did you mean `gamma`"):
        build_weight("uniform", {}, ("iw_opd", {"gama": 1.0}))


@pytest.mark.parametrize("entry", WEIGHTS.entries(), ids=WEIGHTS.names())
def test_every_weight_has_a_summary_and_a_source(entry):
    assert entry.summary == inspect.getdoc(WEIGHTS.get(entry.name)).splitlines()[0]
    assert entry.summary.endswith(".")  # the default docstring of a dataclass is its signature
    assert entry.source


def test_plugin_errors(monkeypatch):
    with pytest.raises(OpdctlError, match="did you mean `student_entropies`") as caught:
        tokens([0.0]).column("student_entrop")
    assert caught.value.kind == "unknown_name"
    monkeypatch.setattr(Uniform, "weigh_step", lambda self, responses: [])
    with pytest.raises(OpdctlError, match="0 arrays for 1 responses") as caught:
        weigh(Uniform(), [tokens([0.0])])
    assert caught.value.kind == "invalid_plugin"
