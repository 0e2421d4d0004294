"""The table of compared runs, on planted evaluations with numbers calculated by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import plant_run
from scipy import stats

from opdctl.errors import OpdctlError
from opdctl.evaluation.compared_runs import load_compared_runs, make_columns
from opdctl.evaluation.result_table import ResultTable, tabulate_results
from opdctl.evaluation.statistics import Estimate, combine_independent, compare_paired

UNIFORM = "weight.name=uniform"


def tabulate(*paths: Path, benches: list[str] | None = None, at: str = "last") -> ResultTable:
    return tabulate_results(*load_compared_runs(paths, benches), at)


def means(table: ResultTable, column: str = "sort12") -> dict[str, float]:
    return {row.label: row.cells[column].mean.value for row in table.rows}


# ── Columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_joint_benchmark_is_pooled_over_problems_and_counts_once_in_the_average() -> None:
    aime, hmmt, average = make_columns({"aime24": 30, "hmmt25_feb": 30, "hmmt25_nov": 10})
    assert [aime.name, hmmt.name, average.name] == ["aime24", "hmmt25", "Avg"]
    assert hmmt.weights == {"hmmt25_feb": 0.75, "hmmt25_nov": 0.25}
    assert average.weights == {"aime24": 0.5, "hmmt25_feb": 0.375, "hmmt25_nov": 0.125}
    assert (hmmt.problems, average.problems) == (40, 70)


@pytest.mark.parametrize("benches", [["hmmt25_feb"], ["hmmt25_nov", "aime24"]])
def test_one_part_of_a_joint_benchmark_stays_itself(benches: list[str]) -> None:
    columns = [column.name for column in make_columns(dict.fromkeys(benches, 30))]
    assert columns == benches + ["Avg"] * (len(benches) > 1)


def test_hmmt_is_the_mean_over_the_problems_of_both(tmp_path: Path) -> None:
    evaluations: dict[str, Any] = {"aime24": {8: "1000"}, "hmmt25_feb": {8: "100"}, "hmmt25_nov": {8: "1"}}
    table = tabulate(plant_run(tmp_path / "run", evaluations))
    (row,) = table.rows
    # feb 1 of 3, nov 1 of 1: 2 of 4 problems, not (1/3 + 1) / 2; Avg (1/4 + 2/4) / 2
    assert row.cells["hmmt25"].mean.value == pytest.approx(0.5)
    assert row.cells["Avg"].mean.value == pytest.approx(0.375)
    assert list(row.cells) == ["aime24", "hmmt25", "Avg"]


# ── Means and differences ────────────────────────────────────────────────────────────────────────────────────────────


def plant_seeds(tmp_path: Path, name: str, patterns: dict[int, str], *overrides: str) -> list[Path]:
    return [
        plant_run(tmp_path / f"{name}-{seed}", {"sort12": {8: pattern}}, f"seed={seed}", *overrides)
        for seed, pattern in patterns.items()
    ]


def test_equal_seeds_are_paired(tmp_path: Path) -> None:
    uniform = plant_seeds(tmp_path, "uniform", {0: "1000", 1: "1100"}, UNIFORM)
    iw_opd = plant_seeds(tmp_path, "iw_opd", {1: "1111", 0: "1100"})
    table = tabulate(*uniform, *iw_opd)
    one, other = table.rows
    assert (table.baseline, one.label, other.label, one.seeds) == ("uniform", "uniform", "iw_opd", [0, 1])
    cell = one.cells["sort12"]
    assert (cell.mean.value, cell.deviation) == pytest.approx((0.375, 0.125 * math.sqrt(2)))
    assert cell.difference is None
    cell = other.cells["sort12"]
    assert (cell.mean.value, cell.deviation) == pytest.approx((0.75, 0.25 * math.sqrt(2)))
    # differences 0.25 with seed 0 and 0.5 with seed 1: standard error 0.125, t with 1 degree of freedom 12.7062
    assert other.pairing == "paired by seed"
    assert cell.difference is not None
    assert (cell.difference.value, cell.difference.low, cell.difference.high) == (0.375, -1, 1)
    assert 12.7062 * 0.125 > 1.375  # the bounds are those of a difference of accuracies


def test_three_equal_seeds_by_hand(tmp_path: Path) -> None:
    uniform = plant_seeds(tmp_path, "u", {0: "10000", 1: "11000", 2: "10000"}, UNIFORM)
    iw_opd = plant_seeds(tmp_path, "i", {2: "11100", 0: "11000", 1: "11100"})
    difference = tabulate(*uniform, *iw_opd).rows[1].cells["sort12"].difference
    # differences 0.2, 0.2, 0.4: mean 0.266667, standard error 0.066667, t with 2 degrees of freedom 4.302653
    assert difference is not None
    bounds = (0.266667 - 4.302653 * 0.066667, 0.266667 + 4.302653 * 0.066667)
    assert (difference.low, difference.high) == pytest.approx(bounds, abs=1e-5)


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    uniform = plant_seeds(tmp_path, "u", {0: "10000000", 1: "11000000"}, UNIFORM)
    iw_opd = plant_seeds(tmp_path, "i", {0: "11000000", 2: "11110000", 3: "11100000"})
    row = tabulate(*uniform, *iw_opd).rows[1]
    assert row.pairing == "unpaired seeds"
    difference = row.cells["sort12"].difference
    assert difference is not None
    reference = stats.ttest_ind([0.25, 0.5, 0.375], [0.125, 0.25], equal_var=False).confidence_interval(0.95)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1875, *reference))


@pytest.mark.parametrize("other_seeds", [(0, 1), (2, 3)])
def test_seeds_that_do_not_differ_are_paired_by_problem(tmp_path: Path, other_seeds: tuple[int, int]) -> None:
    uniform = plant_seeds(tmp_path, "u", {0: "11000000", 1: "11000000"}, UNIFORM)
    iw_opd = plant_seeds(tmp_path, "i", dict.fromkeys(other_seeds, "11110000"))
    row = tabulate(*uniform, *iw_opd).rows[1]
    difference = row.cells["sort12"].difference
    expected = compare_paired([1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]).ci
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.25, *expected))
    assert (row.cells["sort12"].mean.low, row.cells["sort12"].mean.high) == (0, 1)  # that of the planted summary


def test_single_seed_is_paired_by_problem_with_the_mean_over_the_others(tmp_path: Path) -> None:
    uniform = plant_seeds(tmp_path, "u", {0: "1000"}, UNIFORM)
    iw_opd = plant_seeds(tmp_path, "i", {0: "1100", 1: "1110"})
    one, other = tabulate(*uniform, *iw_opd).rows
    assert math.isnan(one.cells["sort12"].deviation)
    assert (one.cells["sort12"].mean.low, one.cells["sort12"].mean.high) == (0, 1)  # that of the planted summary
    assert other.pairing == "paired by problem"
    difference = other.cells["sort12"].difference
    expected = compare_paired([1, 0, 0, 0], [1, 1, 0.5, 0]).ci
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.375, *expected))


def test_difference_of_the_average_combines_the_benchmarks(tmp_path: Path) -> None:
    one = plant_run(tmp_path / "one", {"perm": {8: "1100"}, "sort12": {8: "1000"}}, UNIFORM)
    other = plant_run(tmp_path / "other", {"perm": {8: "1100"}, "sort12": {8: "1100"}})
    difference = tabulate(one, other).rows[1].cells["Avg"].difference
    perm = Estimate(0, *compare_paired([1, 1, 0, 0], [1, 1, 0, 0]).ci)
    sort12 = Estimate(0.25, *compare_paired([1, 0, 0, 0], [1, 1, 0, 0]).ci)
    assert difference == combine_independent([perm, sort12], [0.5, 0.5])


def test_average_over_seeds_is_that_of_each_seed(tmp_path: Path) -> None:
    paths = [
        plant_run(tmp_path / "0", {"perm": {8: "1000"}, "sort12": {8: "1110"}}, "seed=0"),
        plant_run(tmp_path / "1", {"perm": {8: "1110"}, "sort12": {8: "1000"}}, "seed=1"),
    ]
    (row,) = tabulate(*paths).rows
    assert row.cells["perm"].deviation == pytest.approx(0.25 * math.sqrt(2))
    assert (row.cells["Avg"].mean.value, row.cells["Avg"].deviation) == (
        0.5,
        0,
    )  # each seed's average is 1/2


# ── Students, teachers, pairs ────────────────────────────────────────────────────────────────────────────────────────

CURVE: dict[str, dict[int | str, str]] = {
    "perm": {0: "0000", 4: "1100", 8: "1000", 12: "1000"},
    "sort12": {0: "0000", 4: "1100", 8: "1110", 16: "1111"},
}


@pytest.mark.parametrize(("at", "step"), [("last", 8), ("best", 4), ("4", 4), ("8", 8), ("0", 0)])
def test_step_is_evaluated_on_all_columns(tmp_path: Path, at: str, step: int) -> None:
    # steps 0, 4 and 8 are; Avg at 4 and at 8 is 1/2, and the earlier one is the best
    row = next(row for row in tabulate(plant_run(tmp_path / "run", CURVE), at=at).rows if row.setting)
    assert [model.step for model in row.models] == [step]


def test_best_is_chosen_for_each_run(tmp_path: Path) -> None:
    paths = [
        plant_run(tmp_path / "0", {"sort12": {2: "1100", 4: "1000", 6: "1100"}}, "seed=0"),
        plant_run(tmp_path / "1", {"sort12": {2: "1000", 4: "1100", 6: "1110"}}, "seed=1"),
    ]
    (row,) = tabulate(*paths, at="best").rows
    assert [model.step for model in row.models] == [2, 6]
    assert row.cells["sort12"].mean.value == pytest.approx(0.625)


def test_best_of_averages_that_are_equal_except_for_rounding_is_the_earliest(tmp_path: Path) -> None:
    # 3/10 + 0 and 1/10 + 2/10 differ in the last bit
    run = plant_run(
        tmp_path / "run",
        {"perm": {2: "1110000000", 4: "1000000000"}, "sort12": {2: "0000000000", 4: "1100000000"}},
    )
    (row,) = tabulate(run, at="best").rows
    assert row.models[0].step == 2


@pytest.mark.parametrize(("at", "part"), [("12", "step 12"), ("3", "step 3")])
def test_step_that_is_not_evaluated_is_rejected(tmp_path: Path, at: str, part: str) -> None:
    run = plant_run(tmp_path / "run", CURVE)
    with pytest.raises(OpdctlError) as caught:
        tabulate(run, at=at)
    assert caught.value.kind == "missing_evaluation"
    assert f"{run}: {part}" in caught.value.message
    assert "0, 4, 8" in caught.value.message


def test_run_without_a_common_step_is_rejected(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "run", {"perm": {4: "10"}, "sort12": {8: "10"}})
    with pytest.raises(OpdctlError, match="no step is evaluated on all of perm, sort12") as caught:
        tabulate(run)
    assert caught.value.kind == "missing_evaluation"


def test_benchmark_that_is_not_shared_is_rejected(tmp_path: Path) -> None:
    one = plant_run(tmp_path / "one", CURVE)
    other = plant_run(tmp_path / "other", {"sort12": {8: "1111"}}, UNIFORM)
    assert [column.name for column in tabulate(one, other).columns] == ["sort12"]
    with pytest.raises(OpdctlError, match=r"--bench perm,sort12: .*other is evaluated on sort12") as caught:
        tabulate(one, other, benches=["perm", "sort12"])
    assert caught.value.kind == "missing_evaluation"


def test_unequal_steps_and_repeated_seeds_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tabulate(*(plant_run(tmp_path / name, {"sort12": {int(name): "10"}}) for name in "48"))
    message = " ".join(capsys.readouterr().err.split())
    assert "the last evaluated steps differ" in message
    assert "seed 0 is that of 2 runs" in message


def test_untrained_students_and_teachers_have_one_row_each(tmp_path: Path) -> None:
    evaluations: dict[str, dict[int | str, str]] = {"sort12": {0: "1000", 8: "1100", "teacher": "1111"}}
    paths = [
        plant_run(tmp_path / f"{weight}-{seed}", evaluations, f"weight.name={weight}", f"seed={seed}")
        for weight in ("uniform", "iw_opd")
        for seed in (0, 1)
    ]
    table = tabulate(*paths)
    assert means(table) == {
        "toy:student before training": 0.25,
        "uniform": 0.5,
        "iw_opd": 0.5,
        "toy:teacher (teacher)": 1,
    }
    assert [row.seeds for row in table.rows] == [[0, 1]] * 4  # runs with one seed evaluate these models alike
    assert [row.pairing for row in table.rows] == [None, None, "paired by seed", None]
    assert "toy:student before training" not in means(tabulate(*paths, at="0"))


def test_baseline_is_that_of_the_same_models(tmp_path: Path) -> None:
    smaller = "student.model=toy:student-spread"
    paths = [
        plant_run(tmp_path / "a", {"sort12": {8: "1000"}}, UNIFORM),
        plant_run(tmp_path / "b", {"sort12": {8: "1100"}}),
        plant_run(tmp_path / "c", {"sort12": {8: "1111"}}, smaller),
        plant_run(tmp_path / "d", {"sort12": {8: "1110"}}, UNIFORM, smaller),
    ]
    cells = [row.cells["sort12"].difference for row in tabulate(*paths).rows]
    assert [each and each.value for each in cells] == [None, 0.25, 0.25, None]
