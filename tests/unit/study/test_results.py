"""The statistics of the study, calculated by hand."""

from dataclasses import replace

import numpy as np
import pytest
from arms import IW_OPD, PREFIX, QUICK, STUDENTS, SUFFIX, UNIFORM
from results import (
    Results,
    accuracy_of_final_steps,
    area,
    holm,
    ratio_of_means,
    select_learning_rates,
    stratified_mean,
)
from scipy import stats


def test_holm_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_one_stratum_is_a_t_test():
    values = np.array([1.0, 2.0, 4.0, 3.0])
    interval, expected = stratified_mean([values]), stats.ttest_1samp(values, 0)
    assert (interval.mean, interval.p_value()) == pytest.approx(
        (expected.statistic * stats.sem(values), expected.pvalue)
    )
    assert (interval.low, interval.high) == pytest.approx(expected.confidence_interval(0.95))
    assert interval.p_value(1.5) == pytest.approx(stats.ttest_1samp(values, 1.5).pvalue)


def test_two_strata_are_a_test_of_welch():
    first, second = np.array([1.0, 2.0, 4.0, 3.0]), np.array([3.0, 3.5, 2.0])
    interval, expected = stratified_mean([first, second]), stats.ttest_ind(first, -second, equal_var=False)
    assert interval.p_value() == pytest.approx(expected.pvalue)
    assert interval.degrees_of_freedom == pytest.approx(expected.df)
    half_width = (expected.confidence_interval().high - expected.confidence_interval().low) / 2
    assert (interval.mean, interval.high - interval.mean) == pytest.approx(((2.5 + 17 / 6) / 2, half_width / 2))


def test_constant_strata_have_no_width():
    equal = stratified_mean([np.ones(3), np.zeros(3)])
    assert (equal.format(), equal.p_value(), equal.p_value(0.5)) == ("+0.500", 0.0, 1.0)


def test_size_with_the_spreads_of_three_students():
    """Null draws with the spreads of the study's students: the pooled variance has twice the nominal size at 1 %."""
    draws = np.random.default_rng(0).normal(size=(4000, 3, 5)) * np.array([0.032, 0.0115, 0.003])[:, None]
    p = np.array([stratified_mean(list(draw)).p_value() for draw in draws])
    pooled = draws.mean(2).mean(1) / np.sqrt(draws.var(2, ddof=1).mean(1) / 15)
    assert np.mean(2 * stats.t.sf(np.abs(pooled), 12) < 0.01) > 0.018
    assert np.mean(p < 0.01) < 0.015
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.01)


def test_ratio_of_means_has_the_spread_of_its_own_seeds():
    all_S, part_S = np.array([0.4, 0.5, 0.6]), np.array([0.1, 0.3, 0.2])
    ratio = ratio_of_means(part_S, all_S)
    residuals = np.array([0.1 - 0.4 * 0.4, 0.3 - 0.4 * 0.5, 0.2 - 0.4 * 0.6]) / 0.5
    assert ratio.mean == pytest.approx(0.4)
    assert ratio.standard_error == pytest.approx(np.sqrt((residuals**2).sum() / 2 / 3))
    assert ratio.degrees_of_freedom == 2


def row(accuracy: list[float]) -> dict[str, object]:
    measures = {"length": 9.0, "onset": 0.5, "prefix_signal": 0.2, "seconds": 1.0}
    return {"accuracy": accuracy, "final": accuracy[-1], **measures}


@pytest.fixture
def results() -> Results:
    """Runs on two students that differ by seed and arm only. The prefix retains half of the gain, the suffix none."""
    scale = replace(
        QUICK, students=STUDENTS[:2], learning_rates=(1e-4, 2e-4), seeds=(0, 1, 2), condition_seeds=(0, 1, 2)
    )
    end = {UNIFORM: 0.9, IW_OPD: 0.9, PREFIX: 0.5, SUFFIX: 0.1}
    learning_rates = dict.fromkeys((arm.name for arm in scale.arms), 2e-4)
    rows = {}
    for each in [*scale.selection(), *scale.comparison(learning_rates), *scale.conditions(STUDENTS[:1])]:
        offset = each.learning_rate * 100 if each.seed in scale.selection_seeds else 0.02 * each.seed
        rows[each.key] = row([0.1 + offset, *[end[each.arm] + offset] * 6])
    return Results(rows, scale, learning_rates, STUDENTS[:1])


def test_learning_rate_with_the_largest_area_is_selected(results: Results) -> None:
    assert select_learning_rates(results.rows, results.scale) == results.learning_rates


def test_arms_are_paired_by_seed(results: Results) -> None:
    equal, lower = (results.difference(UNIFORM, arm, area) for arm in (IW_OPD, PREFIX))
    assert (equal.mean, equal.low, equal.high) == pytest.approx((0, 0, 0))  # the effect of the seed cancels
    assert (lower.mean, lower.low) == pytest.approx((-0.4 * 6 / 7,) * 2)
    differences = results.against_uniform(area)
    assert [name for name, (_, p) in differences.items() if p < 0.05] == [PREFIX.name, SUFFIX.name]


def test_steps_to_target_are_updates_or_none(results: Results) -> None:
    assert results.target(STUDENTS[0]) == pytest.approx(0.56)
    assert results.steps_to_target(STUDENTS[0], UNIFORM) == [1, 1, 1]  # (0.1 + 0.9 + 0.9) / 3 is the mean at step 1
    assert results.steps_to_target(STUDENTS[0], SUFFIX) == [None] * 3


def test_retained_fraction_of_the_gain(results: Results) -> None:
    for condition in results.conditions():
        assert condition.gain.mean == pytest.approx(0.8)
        assert (condition.prefix.mean, condition.suffix.mean, condition.difference.mean) == pytest.approx((0.5, 0, 0.5))
    assert accuracy_of_final_steps(row([0.0, 1.0, 0.0, 0.0, 0.0, 0.5])) == pytest.approx(0.3)
