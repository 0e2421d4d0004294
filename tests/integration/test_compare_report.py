"""`opdctl compare --output`: the signal of several runs in one report, with paired differences."""

import html
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import invoke
from helpers.evaluations import plant_evaluation
from helpers.planted import plant, planted_run

PROMPTS = [f"prompt-{number}" for number in range(20)]


def plant_pair(path: Path, factor: float, *overrides: str) -> Path:
    """A run whose |A| is `factor` times that of a level of each prompt, with an evaluated student."""
    run = planted_run(path, *overrides)
    levels = np.random.default_rng(0).exponential(3.0, len(PROMPTS))
    for step in range(2):
        plant(run, step, [np.full(10, -factor * level) for level in levels], prompts=PROMPTS)
    plant_evaluation(path / "eval/sort12/step-00001", {"a": [True], "b": [False]}, "sort12", problems=2, samples=1)
    return path


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    return [plant_pair(tmp_path / "one", 1.0), plant_pair(tmp_path / "other", 1.1, "weight.name=uniform")]


def test_runs_are_compared_prompt_by_prompt(pair, tmp_path):
    result = invoke("compare", *pair, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    first, other = pq.read_table(tmp_path / "out/differences.parquet").to_pylist()
    assert (first["run"], other["run"], other["phase"]) == ("one", "other", "step 1")
    assert first["abs_advantage_difference"] == first["abs_advantage_difference_low"] == 0.0
    # Each prompt's |A| is a tenth greater: far less than the prompts differ, and yet beyond the paired interval.
    assert other["abs_advantage_difference"] == pytest.approx(0.1 * first["abs_advantage"])
    assert 0 < other["abs_advantage_difference_low"] < other["abs_advantage_difference"]
    assert "mean |A| of step 1 is greater than that of one" in " ".join(result.err.split())


def test_the_report_has_the_figures_of_all_runs(pair, tmp_path):
    result = invoke("compare", *pair, "--output", tmp_path / "out", "--json")
    files = {Path(path).name for path in result.json()["files"]}
    assert {"report.html", "signal.pdf", "signal_by_step.png", "differences.csv", "sort12.png"} <= files
    assert files == {path.name for path in (tmp_path / "out").iterdir()}
    page = html.unescape((tmp_path / "out/report.html").read_text())
    assert page.count("<figure ") == 3
    assert "default-src 'none'" in page
    assert "nan" not in page.split("<main")[1].split("<script")[0]
    for text in ("one: 2 steps, 40 responses", "token weight uniform", "Difference to one", "Accuracy on sort12"):
        assert text in page


def test_runs_without_scored_responses_have_no_report(pair, tmp_path):
    unscored = planted_run(tmp_path / "unscored").path
    plant_evaluation(unscored / "eval/sort12/step-00001", {"a": [True], "b": [False]}, "sort12", problems=2, samples=1)
    result = invoke("compare", pair[0], unscored, "--output", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert "unscored: its signal is not compared" in " ".join(result.err.split())
    assert not (tmp_path / "out/report.html").exists()
