"""`opdctl compare` on planted evaluations."""

from pathlib import Path

import pytest
from helpers.commands import invoke
from helpers.evaluations import PROTOCOL, plant_curve, plant_evaluation, plant_run

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
    for text in ("mine, 4 problems", "37.5%", "87.5%", "+50.0", "0.25", "3 / 0"):
        assert text in result.out


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


@pytest.mark.parametrize("option", [["--target", "0.5"], ["--output", "figures"], ["--table"]])
def test_options_of_curves_are_rejected_for_evaluations(evaluations: tuple[Path, Path], option: list[str]) -> None:
    result = invoke("compare", *evaluations, *option)
    assert (result.code, result.kind) == (2, "missing_run")
    assert option[0] in result.err


def test_curves_are_printed_and_written(runs: list[Path], tmp_path: Path) -> None:
    result = invoke("compare", *runs, "--target", "0.65", "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"sort12.{kind}" for kind in ("png", "pdf", "csv", "parquet")
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


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Two settings with two seeds each on two benchmarks."""
    return [
        plant_run(
            tmp_path / f"{weight}-{seed}",
            {"perm": {4: "10", 8: "10"}, "sort12": {4: "11", 8: "10" if weight == "uniform" else "11"}},
            f"weight.name={weight}",
            f"seed={seed}",
        )
        for weight in ("uniform", "iw_opd")
        for seed in (0, 1)
    ]


def test_table_is_printed_on_stdout(seeds: list[Path]) -> None:
    result = invoke("compare", *seeds, "--table")
    assert (result.code, result.err) == (0, "")
    for text in ("sort12", "Avg", "50.0 ± 0.0", "difference to uniform", "+50.0 [−100.0, +100.0]", "paired by seed"):
        assert text in result.out


@pytest.mark.parametrize(
    ("name", "first", "part"),
    [
        ("csv", "setting,benchmark,problems,", "iw_opd,Avg,4,0 1,8 8,2,0.75,0.0,"),
        ("markdown", "| setting | step |", "| iw_opd | 8 | 2 |"),
        ("latex", "% \\usepackage{booktabs}", r"iw\_opd & 8 & 2 &"),
    ],
)
def test_formats_go_to_stdout_and_to_files(seeds: list[Path], tmp_path: Path, name: str, first: str, part: str) -> None:
    result = invoke("compare", *seeds, "--table", "--format", name, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.out.startswith(first)
    assert part in result.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"results.{kind}" for kind in ("csv", "md", "tex")}
    assert result.out in [path.read_text() for path in (tmp_path / "out").iterdir()]


def test_json_has_the_table(seeds: list[Path]) -> None:
    table = invoke("compare", *seeds, "--table", "--at", "best", "--bench", "sort12", "--json").json()["table"]
    assert (table["at"], table["baseline"]) == ("best", "uniform")
    records = table["records"]
    assert [record["steps"] for record in records] == [[4, 4], [4, 4]]  # step 4 is the earliest of the best
    assert [record["benchmark"] for record in records] == ["sort12"] * 2
    assert records[1]["difference"] == 0


def test_single_run_has_a_table(tmp_path: Path) -> None:
    run = plant_run(tmp_path / "run", {"sort12": {8: "10"}}, "name=alone")
    result = invoke("compare", run, "--table", "--format", "markdown")
    assert result.code == 0, result.err
    assert "| alone | 8 | 1 | 50.0 [0.0, 100.0] |" in result.out


def test_options_of_the_table_are_checked(seeds: list[Path], tmp_path: Path) -> None:
    for options, kind, part in (
        (["--at", "best"], "invalid_usage", "--at"),
        (["--format", "csv"], "invalid_usage", "--format"),
        (["--table", "--at", "newest"], "invalid_usage", "--at newest"),
        (["--table", "--at", "-1"], "invalid_usage", "--at -1"),
        (["--table", "--target", "0.5"], "invalid_usage", "--target"),
        (["--table", "--format", "csv", "--json"], "invalid_usage", "--json"),
        (["--table", "--at", "5"], "missing_evaluation", f"{seeds[0]}: step 5"),
        (["--table", "--bench", "perm,aime24"], "missing_evaluation", "--bench perm,aime24"),
    ):
        result = invoke("compare", *seeds, *options, "--output", tmp_path / "out")
        assert (result.code, result.kind) == (2, kind), result.err
        assert part in result.err
        assert not (tmp_path / "out").exists()


def test_figure_by_size_is_written_for_different_models(tmp_path: Path) -> None:
    students = {"small": "toy:student", "large": "toy:teacher"}
    paths = [
        plant_run(tmp_path / name, {"perm": {8: "10"}, "sort12": {8: "11"}}, f"student.model={model}")
        for name, model in students.items()
    ]
    curves = invoke("compare", *paths, "--output", tmp_path / "out")
    assert curves.code == 0, curves.err
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names == {"perm", "sort12", "Avg", "by_size"}
    table = invoke("compare", *paths, "--table", "--output", tmp_path / "table", "--json")
    assert {Path(path).stem for path in table.json()["files"]} == {"results", "by_size"}
