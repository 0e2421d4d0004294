"""`--weights`: the names, the parameters and the labels."""

import numpy as np
import pytest
from helpers.planted import plant, planted_run

from opdctl.analysis.shown_weights import chosen_weights
from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import IwOpd, PrefixCurriculum
from opdctl.runs.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    return run


def test_weights_of_figure_4_are_shown_by_default(run):
    assert chosen_weights(run).labels == [
        "iw_opd gamma=1",  # the recipe's weight first
        "iw_opd",
        "iw_opd signed=true",
        "linear_decay",
        *(f"prefix_ratio alpha={alpha}" for alpha in (1, 0.1, 0.01, 0.001)),
    ]


def test_named_weights_replace_the_default_ones(run):
    assert chosen_weights(run, "suffix_only").labels == ["iw_opd gamma=1", "suffix_only"]


def test_all_has_every_weight_whose_columns_are_stored(run):
    every = chosen_weights(run, "all,iw_opd:gamma=7").labels
    assert {"uniform", "teacher_confidence", "prefix_curriculum", "iw_opd signed=true", "iw_opd gamma=7"} < set(every)
    assert not {"tip", "fire", "prune"} & set(every)  # they need columns that this run has not stored


def test_parameters_have_the_types_of_a_recipe(run):
    weights = chosen_weights(run, "iw_opd:gamma=2:signed=true,prefix_curriculum:mode=mask:start=0.25").others
    label, weight = next(iter(weights.items()))
    assert (label, weight) == ("iw_opd gamma=2 signed=true", IwOpd(gamma=2.0, signed=True))
    assert weights["prefix_curriculum mode=mask start=0.25"] == PrefixCurriculum(mode="mask", start=0.25)


def test_equal_weights_are_shown_once(run):
    assert chosen_weights(run, "iw_opd:gamma=1,iw_opd,iw_opd:gamma=0.5").labels == ["iw_opd gamma=1", "iw_opd"]


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("linear_decai", "unknown_name", "did you mean `linear_decay`?"),
        ("", "unknown_name", "weight ``; known:"),
        ("uniform,", "unknown_name", "weight ``; known:"),
        ("al", "unknown_name", "did you mean `all`?"),
        ("all:gamma=1", "unknown_name", "weight `all`"),
        ("iw_opd:gama=1", "invalid_usage", "did you mean `gamma`?"),
        ("iw_opd:name=1", "invalid_usage", "has no parameter `name`"),
        ("iw_opd:gamma", "invalid_usage", "NAME:key=value"),
        ("iw_opd:gamma=-1", "invalid_usage", "gamma"),
        ("iw_opd:gamma=much", "invalid_usage", "must be of type float, got 'much'"),
        ("iw_opd:gamma=", "invalid_usage", "must be of type float, got ''"),
        ("iw_opd:signed=1", "invalid_usage", "must be of type bool"),
        ("fire", "settings_mismatch", "`score.entropy = true`"),
    ],
)
def test_weight_that_cannot_be_shown_is_rejected_with_the_reason(run, text, kind, reason):
    with pytest.raises(OpdctlError) as error:
        chosen_weights(run, text)
    assert (error.value.kind, reason in error.value.message) == (kind, True), error.value.message
