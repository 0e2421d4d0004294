"""Which sentences a report may have: their conditions on runs that are made for them, not their wording."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from helpers.planted import plant, planted_run
from scipy import optimize, stats

from opdctl.analysis import analyze, captions, figures, verdict
from opdctl.analysis.results import Analysis

PROMPTS = 40
LENGTH = 40
DIRECTIONS = ("early", "late")
ADVICE = re.compile(r"prefix_only with fraction [\d.]+ would keep")
"""A suggested fraction of a prefix weight."""


def sentences(analysis: Analysis) -> dict[str, str]:
    """Return all sentences of an analysis by where they are."""
    first, *others = verdict.answers(analysis)
    return {
        "overview": verdict.overview(analysis),
        "headline": " ".join((first.headline, first.details)),
        **{each.question: f"{each.headline} {each.details}" for each in others},
        **captions.figure_captions(analysis),
    }


def levels(before: float, after: float, count: int = PROMPTS, seed: int = 0) -> list[np.ndarray]:
    """Responses with one mean |A| in the first 30% and another one after it."""
    rng = np.random.default_rng(seed)
    mean = np.where(np.arange(LENGTH) < 0.3 * LENGTH, before, after)
    return [-rng.exponential(mean) for _ in range(count)]


def at_p_value(p_value: float) -> list[np.ndarray]:
    """Responses whose excess of the signal in the first 30% has this p-value. All have the same signal in total, so
    all estimates are equal."""
    rng = np.random.default_rng(1)
    excess = rng.normal(0.0, 0.05, PROMPTS)
    excess -= excess.mean()

    def difference(shift: float) -> float:
        shifted = excess + shift
        t = shifted.sum() / np.sqrt((shifted**2).sum())
        return float(2 * stats.t.sf(t, PROMPTS - 1) - p_value)

    shift = optimize.brentq(difference, 1e-6, 0.2, xtol=1e-12)
    in_prefix = np.arange(LENGTH) < 0.3 * LENGTH
    prefix = 0.3 + excess + shift
    return [-np.where(in_prefix, p / (0.3 * LENGTH), (1 - p) / (0.7 * LENGTH)) for p in prefix]


@dataclass(frozen=True)
class Made:
    """A run and what its sentences must be.

    steps: A of the responses by step. truncated: which ones are. changes: how |A| or its fraction in the first 30%
    differs between the first and the last step.
    """

    steps: Sequence[Sequence[np.ndarray]]
    direction: str
    prompts: Sequence[str] | None = None
    truncated: Callable[[int], bool] = field(default=lambda index: False)
    changes: frozenset[str] = frozenset()


PROMPT_NAMES = [f"prompt-{number}" for number in range(9)]
EARLY, LATE = levels(3.0, 1.0), levels(1.0, 3.0)
RUNS = {
    "no bias": Made([levels(1.0, 1.0)], "none found"),
    "early": Made([EARLY], "early"),
    "late": Made([LATE], "late"),
    "one token has most of the signal": Made(
        [[np.full(LENGTH, -1e-3)] * (PROMPTS - 1) + [np.array([-1e6] + [-1e-3] * (LENGTH - 1))]], "none found"
    ),
    "all truncated": Made([LATE], "late", truncated=lambda index: True),
    "truncated ones differ": Made(
        [[*EARLY, *levels(1.0, 90.0, 20)]], "mixed", truncated=lambda index: index >= PROMPTS
    ),
    "one prompt": Made([LATE], "unknown", prompts=["prompt"] * PROMPTS),
    "p just below the level": Made([at_p_value(0.0099)], "early"),
    "p just above the level": Made([at_p_value(0.0101)], "none found"),
    "one response": Made([LATE[:1]], "unknown"),
    "no tokens": Made([[np.zeros(0)] * 3], "unknown"),
    "no signal": Made([[np.zeros(LENGTH)] * PROMPTS], "unknown"),
    "two steps": Made([EARLY, levels(3.0, 1.0, seed=1)], "early"),
    "an early step and a late one": Made([EARLY, LATE], "mixed", changes=frozenset({"rose", "fell"})),
    "an early step and one without a bias": Made(
        [levels(9.0, 1.0), levels(1.0, 1.0)], "mixed", changes=frozenset({"fell"})
    ),
    "half of the signal is left": Made([levels(2.0, 2.0), levels(1.0, 1.0)], "none found", changes=frozenset({"fell"})),
    "half of the signal of few prompts": Made([levels(2.0, 2.0, 9), levels(1.0, 1.0, 9)], "unknown", PROMPT_NAMES),
}


@pytest.fixture(scope="module", params=RUNS)
def made(request, tmp_path_factory) -> tuple[Made, Analysis, dict[str, str]]:
    expected = RUNS[request.param]
    path: Path = tmp_path_factory.mktemp("sentences") / "run"
    run = planted_run(path)
    for step, advantages in enumerate(expected.steps):
        reasons = ["length" if expected.truncated(index) else "stop" for index in range(len(advantages))]
        plant(run, step, advantages, prompts=expected.prompts, finish_reasons=reasons)
    analysis = analyze.analyze_run(run)
    return expected, analysis, sentences(analysis)


def test_a_direction_is_stated_only_where_all_have_it(made):
    expected, analysis, texts = made
    assert analysis.direction() == expected.direction
    stated = re.findall(r"has an? (early|late) position bias", texts["headline"])
    assert stated == [word for word in DIRECTIONS if word == expected.direction]


def test_a_prefix_weight_is_suggested_only_for_an_early_signal(made):
    expected, analysis, texts = made
    has_advice = any(ADVICE.search(text) for text in texts.values())
    change = analysis.bias.change_point
    assert has_advice == (expected.direction == "early" and change is not None)


def test_a_change_is_stated_only_beyond_the_intervals(made):
    expected, _, texts = made
    assert {*re.findall(r"\b(fell|rose)\b", texts["Did training change it?"])} == expected.changes


def test_no_sentence_has_a_number_that_is_none(made):
    for name, text in made[2].items():
        assert not re.search(r"\b(nan|inf|None)\b|[∞]", text), (name, text)


def test_an_interval_is_stated_only_where_there_are_enough_prompts(made):
    expected, _, texts = made
    if expected.direction == "unknown":
        assert "[" not in texts["headline"]
    if expected.prompts:
        assert not [text for text in texts.values() if re.search(r"\[[-+\d]", text)]


def test_p_values_are_stated_beside_the_result_that_they_decide(made):
    _, analysis, texts = made
    headline = texts["headline"]
    assert bool(re.search(r"\bp [=<]", headline)) == (analysis.bias.direction in (*DIRECTIONS, "none found"))


def test_truncated_responses_are_left_out_only_where_others_are_left(made):
    expected, _, texts = made
    counts = {expected.truncated(index) for advantages in expected.steps for index in range(len(advantages))}
    text = " ".join(texts.values())
    assert ("without truncated responses" in text) == (counts == {True, False})


def test_a_figure_without_numbers_has_no_caption(made):
    expected, analysis, _ = made
    drawn, texts = figures.figure_panels(analysis), captions.figure_captions(analysis)
    assert drawn.keys() == texts.keys()
    responses = sum(len(advantages) for advantages in expected.steps)
    has_tokens = any(len(advantage) for advantages in expected.steps for advantage in advantages)
    # One response is no curve by position; without tokens, or with a constant |A|, there is nothing to correlate.
    assert ({"position", "prefix_logp"} <= texts.keys()) == (has_tokens and responses > 1)
    assert ("cumulative_signal" in texts) == bool(analysis.bias.estimates)
    assert ("correlations" in texts) == (has_tokens and bool(analysis.bias.estimates))
    assert ("weights" in texts) == ("one_response" in texts) == has_tokens
