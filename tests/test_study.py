"""The study: its statistics by hand, its faulty answers, what it reads off responses, and its whole path once."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.commands import ROOT
from scipy import stats

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores
from opdctl.data.toy import sort12

STUDY = ROOT / "tests" / "study"
sys.path.insert(0, str(STUDY))

from arms import ARMS, FULL, IW_OPD, PREFIX, QUICK, STUDENTS, SUFFIX, UNIFORM, Training  # noqa: E402
from measure import first_share  # noqa: E402
from results import Results, area, best_rates, holm, late, mean_over  # noqa: E402
from students import EARLY, LATE, Faults  # noqa: E402

WORD = "lkjihgfedcba"


def test_holm_s_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_one_stratum_is_a_t_test_and_two_pool_their_spread():
    one, other = np.array([1.0, 2.0, 4.0, 3.0]), np.array([3.0, 3.5, 2.0])
    single, wanted = mean_over([one]), stats.ttest_1samp(one, 0)
    assert (single.mean, single.p) == pytest.approx((wanted.statistic * stats.sem(one), wanted.pvalue))
    assert (single.low, single.high) == pytest.approx(wanted.confidence_interval(0.95))
    both = mean_over([one, other])
    variance = (one.var() * 4 + other.var() * 3) / 5
    half = stats.t.ppf(0.975, 5) * np.sqrt(variance * (1 / 4 + 1 / 3)) / 2
    assert (both.mean, both.high - both.mean) == pytest.approx(((2.5 + 17 / 6) / 2, half))


def row(accuracy: list[float]) -> dict[str, object]:
    return {
        "accuracy": accuracy,
        "final": accuracy[-1],
        "length": 9.0,
        "onset": 0.5,
        "first_share": 0.2,
        "seconds": 1.0,
    }


@pytest.fixture
def results() -> Results:
    """All arms alike but for the seed, on two students; of the prefix half the gain is kept, of the suffix nothing."""
    scale = replace(QUICK, students=STUDENTS[:2], rates=(1e-4, 2e-4), seeds=(0, 1, 2), condition_seeds=(0, 1, 2))
    ends = {UNIFORM: 0.9, IW_OPD: 0.9, PREFIX: 0.5, SUFFIX: 0.1}
    rates = dict.fromkeys((arm.name for arm in scale.arms), 2e-4)
    rows = {}
    for each in [*scale.selection(), *scale.comparison(rates), *scale.conditions(STUDENTS[:1])]:
        better = each.rate * 100 if each.seed in scale.selection_seeds else 0.02 * each.seed
        rows[each.key] = row([0.1 + better, *[ends[each.arm] + better] * 6])
    return Results(rows, scale, rates, STUDENTS[:1])


def test_the_learning_rate_of_the_largest_area_is_chosen(results: Results) -> None:
    assert best_rates(results.rows, results.scale) == results.rates


def test_arms_are_compared_seed_by_seed(results: Results) -> None:
    same, worse = (results.difference(UNIFORM, arm, area) for arm in (IW_OPD, PREFIX))
    assert (same.mean, same.low, same.high) == pytest.approx((0, 0, 0))  # the seeds' luck cancels
    assert (worse.mean, worse.low) == pytest.approx((-0.4 * 6 / 7,) * 2)
    found = results.against_uniform(area)
    assert [name for name, (_, p) in found.items() if p < 0.05] == [PREFIX.name, SUFFIX.name]


def test_steps_to_the_target_count_updates_and_tell_who_never_got_there(results: Results) -> None:
    assert results.target(STUDENTS[0]) == pytest.approx(0.56)
    assert results.steps_to_target(STUDENTS[0], UNIFORM) == [1, 1, 1]  # (0.1 + 0.9 + 0.9) / 3 is the mean at step 1
    assert results.steps_to_target(STUDENTS[0], SUFFIX) == [None] * 3


def test_what_a_part_keeps_of_the_gain(results: Results) -> None:
    for each in results.conditions():
        assert each.gain.mean == pytest.approx(0.8)
        assert (each.prefix.mean, each.suffix.mean) == pytest.approx((0.5, 0))
    assert late(row([0.0, 1.0, 0.0, 0.0, 0.0, 0.5])) == pytest.approx(0.3)


def test_of_each_seed_no_training_is_measured_twice() -> None:
    rates = dict.fromkeys((arm.name for arm in ARMS), 1e-4)
    keys = [each.key for each in [*FULL.selection(), *FULL.comparison(rates)]]
    assert len(keys) == len(set(keys)) == 3 * 15 * (3 + 5)
    assert Training(STUDENTS[0], UNIFORM, 1e-4, 0).key == "student/uniform/0.0001/0"


@pytest.mark.parametrize("terse", [False, True])
@pytest.mark.parametrize(("passes", "first", "last"), [(EARLY, 0.0, 0.34), (LATE, 0.66, 0.83)])
def test_faults_begin_where_they_should(passes: range, first: float, last: float, terse: bool) -> None:
    rng = random.Random(0)
    worked = sort12.solve(WORD)
    for _ in range(50):
        faulty = Faults(passes, 1.0, terse)(WORD, rng)
        wrong = next((i for i, (a, b) in enumerate(zip(worked, faulty, strict=False)) if a != b), None)
        assert wrong is None or first <= wrong / len(worked) < last
    assert Faults(passes, 0.0, terse)(WORD, rng) == worked


def test_the_signal_s_share_on_the_first_tokens_by_hand() -> None:
    ids, zeros = np.arange(4, dtype=np.int32), np.zeros(4, np.float32)
    response = Response("a/0/0", "a", ids, ids, zeros, "stop", 0, "student", "teacher", None)
    scored = ScoredResponse(response, TokenScores(np.array([-1, 2, -4, 1], np.float32)))
    assert first_share([scored]) == pytest.approx(3 / 8)  # of four tokens the first two: 30 % rounded up


def test_the_whole_path_in_small(tmp_path) -> None:
    command = [sys.executable, STUDY, "--quick", "--out", tmp_path / "docs", "--work", tmp_path / "work"]
    done = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "docs/study.md").read_text()
    assert "nan" not in page
    images = {f"{name}.png" for name in ("study-accuracy", "study-differences", "study-prefixes", "study-conditions")}
    assert {path.name for path in (tmp_path / "docs/images").iterdir()} == images
    assert all(f"images/{name}" in page for name in images)
    before = (tmp_path / "work/measured.jsonl").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False)  # nothing is measured twice
    assert again.returncode == 0
    assert (tmp_path / "work/measured.jsonl").read_text() == before
