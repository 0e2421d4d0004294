"""Token weights: hand-worked numbers, a float64 reference, and what must hold for every response."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.errors import OpdctlError
from opdctl.registry import WEIGHTS
from opdctl.weights import IwOpd, Uniform

ADVANTAGES = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=200).map(np.array)


def test_iw_opd_by_hand():
    # |A| = 1, 0, 3, 4; total 8; spent before each token 0, 1/8, 1/8, 4/8; w = 1 + 0.5 (1 - spent)
    weight = IwOpd(gamma=0.5)(np.array([-1.0, 0.0, 3.0, -4.0]))
    np.testing.assert_allclose(weight, [1.5, 1.4375, 1.4375, 1.25], rtol=0, atol=1e-15)


def test_iw_opd_without_any_discrepancy_weighs_one_plus_gamma():
    np.testing.assert_array_equal(IwOpd(gamma=0.7)(np.zeros(3)), [1.7, 1.7, 1.7])


def test_iw_opd_of_one_token_and_of_none():
    np.testing.assert_array_equal(IwOpd(gamma=0.5)(np.array([-2.0])), [1.5])
    assert IwOpd()(np.zeros(0)).shape == (0,)


def test_gamma_zero_is_uniform():
    advantage = np.array([0.3, -2.0, 1.1])
    np.testing.assert_array_equal(IwOpd(gamma=0.0)(advantage), Uniform()(advantage))


def reference(advantage: np.ndarray, gamma: float) -> list[float]:
    """The formula, term by term, in exactly summed float64."""
    total = math.fsum(abs(a) for a in advantage)
    spent = [math.fsum(abs(a) for a in advantage[:t]) for t in range(len(advantage))]
    return [1 + gamma * (1 - (before / total if total else 0)) for before in spent]


@given(ADVANTAGES, st.floats(0, 5))
def test_iw_opd_is_the_formula_and_falls_from_one_plus_gamma_towards_one(advantage, gamma):
    weight = IwOpd(gamma)(advantage)
    np.testing.assert_allclose(weight, reference(advantage, gamma), rtol=1e-12)
    assert weight[0] == 1 + gamma
    assert (np.diff(weight) <= 1e-12).all()
    assert weight.min() >= 1


@given(ADVANTAGES, st.floats(1e-3, 1e3))
def test_iw_opd_does_not_depend_on_the_scale_of_the_discrepancy(advantage, scale):
    np.testing.assert_allclose(IwOpd()(advantage * scale), IwOpd()(advantage), rtol=1e-9)


@given(ADVANTAGES)
def test_iw_opd_does_not_see_the_sign(advantage):
    np.testing.assert_array_equal(IwOpd()(advantage), IwOpd()(-advantage))


@pytest.mark.parametrize("gamma", [-0.1, math.inf, math.nan])
def test_a_gamma_that_makes_no_sense_is_refused(gamma):
    with pytest.raises(OpdctlError, match="gamma must be a finite number >= 0"):
        WEIGHTS.build("iw_opd", {"gamma": gamma})
