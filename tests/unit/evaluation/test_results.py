"""Finished evaluations, read from disk: the comparison by problem, and the incorrect responses, on planted grades."""

from pathlib import Path

import pytest
from helpers.evaluations import PROTOCOL, plant_evaluation

from opdctl.errors import OpdctlError
from opdctl.evaluation.results import compare_evaluations, differing_responses, incorrect_responses, load_evaluation

ONE = {"a": [True, False], "b": [False, False], "c": [True, True], "d": [False, False]}
OTHER = {"a": [True, True], "b": [True, False], "c": [True, True], "d": [True, True]}


def test_evaluations_are_compared_by_problem(tmp_path: Path) -> None:
    one, other = plant_evaluation(tmp_path / "one", ONE), plant_evaluation(tmp_path / "other", OTHER)
    (comparison,) = compare_evaluations(one, other)
    # differences 1/2, 1/2, 0, 1
    assert comparison["difference"] == pytest.approx(0.5)
    assert (comparison["problems"], comparison["better"], comparison["worse"]) == (4, 3, 0)
    assert (comparison["a"]["avg"], comparison["b"]["avg"]) == (0.375, 0.875)
    assert comparison["ci"][0] < 0.5 < comparison["ci"][1]
    assert comparison["p_value"] == pytest.approx(2 / 8)  # 2 of the 8 sign vectors of three differences are as extreme
    assert comparison["protocol_differences"] == []


def test_order_of_problems_does_not_matter(tmp_path: Path) -> None:
    other = plant_evaluation(tmp_path / "other", dict(reversed(OTHER.items())))
    (comparison,) = compare_evaluations(plant_evaluation(tmp_path / "one", ONE), other)
    assert (comparison["difference"], comparison["better"]) == (pytest.approx(0.5), 3)


def test_runs_are_compared_by_their_newest_students(tmp_path: Path) -> None:
    for run, grades in (("x", ONE), ("y", OTHER)):
        plant_evaluation(tmp_path / run / "eval" / "mine" / "step-00000", {key: [False] for key in "abcd"})
        plant_evaluation(tmp_path / run / "eval" / "mine" / "step-00012", grades)
        plant_evaluation(tmp_path / run / "eval" / "mine" / "teacher", {key: [True] for key in "abcd"})
    plant_evaluation(tmp_path / "x" / "eval" / "more" / "step-00012", ONE, "more")
    (comparison,) = compare_evaluations(tmp_path / "x", tmp_path / "y")
    assert (comparison["bench"], comparison["difference"]) == ("mine", pytest.approx(0.5))
    with pytest.raises(OpdctlError, match=r"x is evaluated on mine, more; .*y on mine") as caught:
        compare_evaluations(tmp_path / "x", tmp_path / "y", ["more"])
    assert caught.value.kind == "missing_evaluation"


def test_run_is_compared_with_a_single_evaluation(tmp_path: Path) -> None:
    plant_evaluation(tmp_path / "x" / "eval" / "mine" / "step-00012", ONE)
    (comparison,) = compare_evaluations(tmp_path / "x", plant_evaluation(tmp_path / "base", OTHER))
    assert comparison["a"]["path"].endswith("step-00012")


@pytest.mark.parametrize("is_teacher_evaluated", [True, False])
def test_run_without_an_evaluated_student_is_rejected(tmp_path: Path, is_teacher_evaluated: bool) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/run.json").touch()
    if is_teacher_evaluated:
        plant_evaluation(tmp_path / "x" / "eval" / "mine" / "teacher", ONE)
    with pytest.raises(OpdctlError) as caught:
        compare_evaluations(tmp_path / "x", plant_evaluation(tmp_path / "base", OTHER))
    assert caught.value.kind == "missing_evaluation"
    assert f"opdctl eval {tmp_path / 'x'}" in str(caught.value.hint)


def test_different_problems_are_rejected(tmp_path: Path) -> None:
    other = plant_evaluation(tmp_path / "other", OTHER, benchmark={"digest": "e"})
    with pytest.raises(OpdctlError) as caught:
        compare_evaluations(plant_evaluation(tmp_path / "one", ONE), other)
    assert caught.value.kind == "different_problems"
    assert str(other) in caught.value.message


def test_different_protocol_is_reported(tmp_path: Path) -> None:
    other = plant_evaluation(tmp_path / "other", OTHER, protocol=PROTOCOL | {"temperature": 0.6})
    (comparison,) = compare_evaluations(plant_evaluation(tmp_path / "one", ONE), other)
    assert comparison["protocol_differences"] == ["temperature"]


def test_grades_by_older_rules_are_reported(tmp_path: Path) -> None:
    older = {key: value for key, value in PROTOCOL.items() if key != "grader_version"}
    other = plant_evaluation(tmp_path / "other", OTHER, protocol=older)
    (comparison,) = compare_evaluations(plant_evaluation(tmp_path / "one", ONE), other)
    assert comparison["protocol_differences"] == ["grader_version"]


def test_corrupt_part_is_not_compared(tmp_path: Path) -> None:
    one, other = plant_evaluation(tmp_path / "one", ONE), plant_evaluation(tmp_path / "other", OTHER)
    part = next(other.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(OpdctlError) as caught:
        compare_evaluations(one, other)
    assert caught.value.kind == "checksum_mismatch"
    assert part.name in caught.value.message


def test_summary_without_responses_is_not_compared(tmp_path: Path) -> None:
    one, other = plant_evaluation(tmp_path / "one", ONE), plant_evaluation(tmp_path / "other", OTHER)
    for path in (one / "manifest.json", next(one.glob("part-*"))):
        path.unlink()
    with pytest.raises(OpdctlError) as caught:
        compare_evaluations(one, other)
    assert caught.value.kind == "corrupt_artifact"


@pytest.mark.parametrize(("math_verify", "expected"), [(None, []), (True, ["a/0", "c/0", "a/1"]), (False, ["b/0"])])
def test_responses_on_which_math_verify_differs(tmp_path: Path, math_verify: bool | None, expected: list[str]) -> None:
    grades = {"a": [False, False], "b": [True], "c": [False]}
    evaluation = load_evaluation(plant_evaluation(tmp_path / "one", grades, math_verify=math_verify))
    assert [row.sample_id for row in differing_responses(evaluation.rows(), 9)] == [f"mine/{name}" for name in expected]


def test_incorrect_responses_of_all_problems_come_first(tmp_path: Path) -> None:
    grades = {"a": [False, False], "b": [True, True], "c": [True, False], "d": [False, True]}
    evaluation = load_evaluation(plant_evaluation(tmp_path / "one", grades))
    expected = ["mine/a/0", "mine/c/1", "mine/d/0", "mine/a/1"]
    assert [row.sample_id for row in incorrect_responses(evaluation.rows(), 9)] == expected
    assert [row.sample_id for row in incorrect_responses(evaluation.rows(), 2)] == expected[:2]
    assert incorrect_responses(evaluation.rows(), 0) == []
