"""`opdctl compare` on planted evaluations."""

from pathlib import Path

import pytest
from helpers.commands import invoke
from helpers.evaluations import PROTOCOL, plant_curve, plant_evaluation

ONE = {"a": [True, False], "b": [False, False], "c": [True, True], "d": [False, False]}
OTHER = {"a": [True, True], "b": [True, False], "c": [True, True], "d": [True, True]}


@pytest.fixture
def evaluations(tmp_path: Path) -> tuple[Path, Path]:
    cooler = PROTOCOL | {"temperature": 0.6}
    other = plant_evaluation(tmp_path / "other", OTHER, protocol=cooler)
    return plant_evaluation(tmp_path / "one", ONE), other


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    settings = {"a": ({0: 0.1, 8: 0.65}, "weight.name=uniform"), "b": ({0: 0.1, 8: 0.8},), "c": ({0: 0.2, 8: 0.7},)}
    return [plant_curve(tmp_path / name, *arguments, f"name={name}") for name, arguments in settings.items()]


def test_difference_of_two_evaluations_is_printed(evaluations: tuple[Path, Path]) -> None:
    result = invoke("compare", *evaluations)
    assert result.code == 0
    assert result.out == ""
    for text in ("mine, 4 problems", "37.5%", "87.5%", "+50.0", "0.25", "3 / 0"):
        assert text in result.err


def test_different_protocol_is_warned_of(evaluations: tuple[Path, Path]) -> None:
    result = invoke("compare", *evaluations, "--json")
    assert result.code == 0
    assert result.json()["evaluations"][0]["protocol_differences"] == ["temperature"]
    assert "the protocols differ in temperature" in " ".join(result.err.split())
    assert result.json()["curves"] == []


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_missing_evaluation_is_rejected(evaluations: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("compare", evaluations[0], tmp_path / name)
    assert (result.code, result.kind) == (2, "missing_evaluation")


@pytest.mark.parametrize("option", [["--target", "0.5"], ["--output", "figures"]])
def test_options_of_curves_are_rejected_for_evaluations(evaluations: tuple[Path, Path], option: list[str]) -> None:
    result = invoke("compare", *evaluations, *option)
    assert (result.code, result.kind) == (2, "missing_run")
    assert option[0] in result.err


def test_curves_are_printed_and_written(runs: list[Path], tmp_path: Path) -> None:
    result = invoke("compare", *runs, "--target", "0.65", "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"sort12.{kind}" for kind in ("png", "svg", "csv", "parquet")
    }
    assert (result.json()["curves"][0]["bench"], len(result.json()["files"])) == ("sort12", 4)
    message = " ".join(result.err.split())
    assert "target 65.0%: uniform reaches it after 8 steps and is at 65.0% at step 8" in message
    assert "steps to 65.0%" in message


def test_incomparable_runs_are_rejected(runs: list[Path], tmp_path: Path) -> None:
    other = plant_curve(tmp_path / "other", {0: 0.1}, digest="another")
    without_evaluations = plant_curve(tmp_path / "none", {})
    for paths, code, kind in (
        ([runs[0]], 2, "invalid_usage"),
        ([*runs, runs[0]], 2, "invalid_usage"),
        ([*runs, other], 4, "different_problems"),
        ([*runs, without_evaluations], 2, "missing_evaluation"),
        ([*runs, tmp_path / "typo"], 2, "missing_run"),
        ([runs[0], tmp_path / "typo"], 2, "missing_run"),
        ([runs[0], without_evaluations], 2, "missing_evaluation"),
    ):
        result = invoke("compare", *paths, "--output", tmp_path / "out")
        assert (result.code, result.kind) == (code, kind), result.err
        assert not (tmp_path / "out").exists()


def test_two_runs_have_both_comparisons(tmp_path: Path) -> None:
    paths = [plant_curve(tmp_path / name, {0: 0.1}, f"weight.name={name}") for name in ("uniform", "iw_opd")]
    for path, grades in zip(paths, (ONE, OTHER), strict=True):
        plant_evaluation(path / "eval/sort12/step-00008", grades, "sort12", problems=4, samples=2)
    result = invoke("compare", *paths, "--bench", "sort12", "--json")
    assert result.code == 0, result.err
    assert [each["difference"] for each in result.json()["evaluations"]] == [pytest.approx(0.5)]
    assert [each["label"] for each in result.json()["curves"][0]["settings"]] == ["uniform", "iw_opd"]
    assert invoke("compare", *paths, "--bench", "perm").kind == "missing_evaluation"
