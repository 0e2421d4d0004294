"""Finished evaluations read back: compared problem by problem, and the failures in them, on planted grades."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import invoke

from opdctl.artifacts import files, tables
from opdctl.artifacts.records import GradedResponse
from opdctl.cli import evaluate
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import results

PROTOCOL = dict.fromkeys(results.PROTOCOL_KEYS, "as ever")


def plant(folder: Path, correct: dict[str, list[bool]], bench: str = "mine", **summary: Any) -> Path:
    """Write a finished evaluation with these grades, in one part."""
    rows = [
        GradedResponse(
            sample_id=f"{bench}/{name}/{n}",
            problem_id=name,
            response_ids=np.arange(2, dtype=np.int32),
            text=f"text of {name}/{n}",
            finish_reason="stop",
            gold="1",
            extracted="1" if right else "2",
            correct=right,
            verdict="ok",
            vote="1" if right else "2",
        )
        for name, samples in correct.items()
        for n, right in enumerate(samples)
    ]
    folder.mkdir(parents=True)
    part = folder / "part-00000-of-00001.parquet"
    tables.write_rows(part, rows, GradedResponse)
    files.write_json(folder / "manifest.json", {"parts": [{"name": part.name, "sha256": files.sha256_file(part)}]})
    shares = [sum(samples) / len(samples) for samples in correct.values()]
    fixed = {"bench": bench, "avg": sum(shares) / len(shares), "ci": [0.0, 1.0], "protocol": PROTOCOL}
    files.write_json(folder / "summary.json", fixed | {"benchmark": {"digest": "d"}} | summary)
    return folder


ONE = {"a": [True, False], "b": [False, False], "c": [True, True], "d": [False, False]}
OTHER = {"a": [True, True], "b": [True, False], "c": [True, True], "d": [True, True]}


def test_two_evaluations_are_compared_problem_by_problem(tmp_path: Path) -> None:
    (found,) = results.compare_evaluations(plant(tmp_path / "one", ONE), plant(tmp_path / "other", OTHER))
    # differences 1/2, 1/2, 0, 1
    assert found["difference"] == pytest.approx(0.5)
    assert (found["problems"], found["better"], found["worse"]) == (4, 3, 0)
    assert (found["a"]["avg"], found["b"]["avg"]) == (0.375, 0.875)
    assert found["ci"][0] < 0.5 < found["ci"][1]
    assert found["p_value"] == pytest.approx(2 / 8)  # of the 8 signings of three differences, two are as extreme
    assert found["other_protocol"] == []


def test_the_order_of_the_problems_does_not_matter(tmp_path: Path) -> None:
    other = plant(tmp_path / "other", dict(reversed(OTHER.items())))
    (found,) = results.compare_evaluations(plant(tmp_path / "one", ONE), other)
    assert (found["difference"], found["better"]) == (pytest.approx(0.5), 3)


def test_runs_are_compared_by_their_newest_students_on_every_shared_benchmark(tmp_path: Path) -> None:
    for run, grades in (("x", ONE), ("y", OTHER)):
        plant(tmp_path / run / "eval" / "mine" / "step-00000", {key: [False] for key in "abcd"})
        plant(tmp_path / run / "eval" / "mine" / "step-00012", grades)
        plant(tmp_path / run / "eval" / "mine" / "teacher", {key: [True] for key in "abcd"})
    plant(tmp_path / "x" / "eval" / "more" / "step-00012", ONE, "more")
    (found,) = results.compare_evaluations(tmp_path / "x", tmp_path / "y")
    assert (found["bench"], found["difference"]) == ("mine", pytest.approx(0.5))
    with pytest.raises(OpdctlError, match=r"x was evaluated on mine, more, .*y on mine"):
        results.compare_evaluations(tmp_path / "x", tmp_path / "y", ["more"])


def test_a_run_and_a_single_evaluation_are_compared(tmp_path: Path) -> None:
    plant(tmp_path / "x" / "eval" / "mine" / "step-00012", ONE)
    (found,) = results.compare_evaluations(tmp_path / "x", plant(tmp_path / "base", OTHER))
    assert found["a"]["path"].endswith("step-00012")


def test_other_problems_are_not_compared_and_another_protocol_is_named(tmp_path: Path) -> None:
    one = plant(tmp_path / "one", ONE)
    with pytest.raises(OpdctlError, match="were asked other problems") as caught:
        results.compare_evaluations(one, plant(tmp_path / "other", OTHER, benchmark={"digest": "e"}))
    assert caught.value.code == ExitCode.RECIPE_MISMATCH
    cooler = plant(tmp_path / "cooler", OTHER, protocol=PROTOCOL | {"temperature": 0.6})
    assert results.compare_evaluations(one, cooler)[0]["other_protocol"] == ["temperature"]
    result = invoke("eval", "--compare", one, cooler, "--json")
    assert result.code == 0
    assert result.json()["comparisons"][0]["other_protocol"] == ["temperature"]
    assert "not the same protocol: temperature differ" in " ".join(result.err.split())


def test_the_command_prints_the_difference(tmp_path: Path) -> None:
    result = invoke("eval", "--compare", plant(tmp_path / "one", ONE), plant(tmp_path / "other", OTHER))
    assert result.code == 0
    assert result.out == ""
    for text in ("mine, 4 problems", "37.5%", "87.5%", "+50.0", "0.25", "3 / 0"):
        assert text in result.err


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_what_is_no_evaluation_is_told(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("eval", "--compare", plant(tmp_path / "one", ONE), tmp_path / missing)
    assert result.code == 2
    assert "no finished evaluation" in result.err


def test_a_damaged_part_is_not_compared(tmp_path: Path) -> None:
    one, other = plant(tmp_path / "one", ONE), plant(tmp_path / "other", OTHER)
    part = next(other.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(OpdctlError, match="SHA-256") as caught:
        results.compare_evaluations(one, other)
    assert caught.value.code == ExitCode.BAD_DATA


def test_failures_show_each_problem_once_before_any_twice(tmp_path: Path) -> None:
    grades = {"a": [False, False], "b": [True, True], "c": [True, False], "d": [False, True]}
    evaluation = results.load_evaluation(plant(tmp_path / "one", grades))
    wanted = ["mine/a/0", "mine/c/1", "mine/d/0", "mine/a/1"]
    assert [row.sample_id for row in results.failures(evaluation, 9)] == wanted
    assert [row.sample_id for row in results.failures(evaluation, 2)] == wanted[:2]
    assert results.failures(evaluation, 0) == []


def test_a_hostile_response_gives_the_terminal_no_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = plant(tmp_path / "one", {"a": [False]})
    (row,) = results.load_evaluation(folder).rows()
    part = folder / "part-00000-of-00001.parquet"
    tables.write_rows(part, [replace(row, text="\x1b[2J\x1b]0;owned\x07 [red]\u202e")], GradedResponse)
    files.write_json(folder / "manifest.json", {"parts": [{"name": part.name, "sha256": files.sha256_file(part)}]})
    evaluate.show_failures(results.load_evaluation(folder), 1)
    shown = capsys.readouterr().err
    assert "owned" in shown
    assert "[red]" in shown
    assert not {"\x1b", "\x07", "\u202e"} & {*shown}
