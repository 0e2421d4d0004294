"""`opdctl list`: benchmarks, engines and recipes. integration/test_methods.py lists weights and objectives."""

import pytest
from helpers.commands import invoke

from opdctl.recipe.library import recipe_names
from opdctl.registry import BENCHMARKS, ENGINES


def listed(kind: str) -> list[dict[str, object]]:
    result = invoke("list", kind, "--json")
    assert result.code == 0, result.err
    rows: list[dict[str, object]] = result.json()[kind]
    for row in rows[:1]:
        assert str(next(iter(row.values()))) in result.err
    return rows


def test_benchmarks() -> None:
    rows = {row["bench"]: row for row in listed("benchmarks")}
    assert {*rows} == {*BENCHMARKS.names()}
    assert rows["gsm8k"]["data"] == "openai/gsm8k@740312add88f781978c0658806c59bc2815b9866"
    assert (rows["humaneval_plus"]["data"], rows["humaneval_plus"]["grader"]) == (
        "evalplus:HumanEvalPlus@v0.1.10",
        "code",
    )
    assert (rows["sort12"]["data"], rows["sort12"]["samples"]) == ("toy:sort12", 1)


def test_engines() -> None:
    rows = {row["engine"]: row for row in listed("engines")}
    assert {*rows} == {*ENGINES.names()}
    assert rows["transformers"]["available"] is True


def test_recipes() -> None:
    rows = {row["recipe"]: row for row in listed("recipes")}
    assert {*rows} == {*recipe_names()}
    assert rows["quickstart"]["description"]


def test_no_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert listed("runs") == []


def test_unknown_kind_is_rejected() -> None:
    result = invoke("list", "teachers")
    assert result.code == 2
    assert "benchmarks" in result.err
