"""analyze-position on planted artifacts: what was put in comes out."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import invoke, small_recipe

from opdctl import SCHEMA_VERSION
from opdctl.records import Response, Scores
from opdctl.run import Run, open_run
from opdctl.stages import analyze
from opdctl.stages.analyze import Sums
from opdctl.store import write_json, write_rows, write_scores


def plant(run: Run, step: int, advantages: list[np.ndarray]) -> None:
    """Write a step's artifacts whose advantages are those given."""
    rollout = run.rollout(step)
    names = [f"planted/{step:05d}/{i}" for i in range(len(advantages))]
    rows = [
        Response(
            sample_id=name,
            prompt_id=name,
            prompt_ids=np.array([2], np.int32),
            response_ids=np.full(len(advantage), 3, np.int32),
            logprobs=np.full(len(advantage), -1, np.float32),
            finish_reason="stop",
            policy_step=step,
            source="planted",
            teacher="teacher",
            answer=None,
        )
        for name, advantage in zip(names, advantages, strict=True)
    ]
    rollout.begin({})
    rollout.write(0, partial(write_rows, rows=rows, kind=Response), rows=len(rows), tokens=0)
    rollout.seal()
    scores = run.score(step, "teacher")
    scores.begin({})
    meaning = {"rollout": rollout.sha256(0)}
    planted = [Scores((a - 1).astype(np.float32)) for a in advantages]
    scores.write(0, partial(write_scores, ids=names, scores=planted, meaning=meaning), rows=len(rows), tokens=0)
    scores.seal()


@pytest.fixture
def run(tmp_path) -> Run:
    return open_run(small_recipe("rollout.parts=1", "train.steps=8", "weight.gamma=1.0"), tmp_path / "run")


def test_planted_numbers_come_back(run):
    # two responses of ten tokens: |A| = 2 on the first three tokens, 0.5 on the rest, A negative
    advantage = np.array([-2.0] * 3 + [-0.5] * 7)
    plant(run, 0, [advantage, advantage])
    (phase,) = analyze.run(run)["summary"]["phases"]
    assert phase["responses"] == 2
    assert phase["tokens"] == 20
    assert phase["abs_advantage"] == phase["k1"] == pytest.approx(0.95)  # (6 + 3.5) / 10
    assert phase["share_of_first_30_percent"] == pytest.approx(6 / 9.5)
    # gamma 1: w = 2 - spent; before the fourth token 6 / 9.5 are spent
    assert phase["tenths"][0]["weight"] == pytest.approx(2.0)
    assert phase["tenths"][3]["weight"] == pytest.approx(2 - 6 / 9.5)


def test_positions_are_fractions_of_the_real_length(run):
    # a response of 2 and one of 20 tokens: the first half of each holds all the signal
    plant(run, 0, [np.array([1.0, 0.0]), np.array([1.0] * 10 + [0.0] * 10)])
    (phase,) = analyze.run(run)["summary"]["phases"]
    assert sum(t["share"] for t in phase["tenths"][:5]) == pytest.approx(1.0)
    assert phase["k1"] == pytest.approx(-0.5)


def test_early_and_late_steps_are_told_apart(run):
    for step in range(8):
        plant_updates(run, step)
        plant(run, step, [np.full(10, -1.0 if step < 4 else -0.25)])
    early, late = analyze.run(run)["summary"]["phases"]
    assert (early["phase"], late["phase"]) == ("steps 0–1", "steps 6–7")
    assert early["abs_advantage"] == pytest.approx(1.0)
    assert late["abs_advantage"] == pytest.approx(0.25)


def plant_updates(run: Run, step: int) -> None:
    if step:
        planted = {name: {} for name in ("settings", "inputs", "trainer", "student", "metrics")}
        write_json(run.update_path(step - 1), planted | {"schema_version": SCHEMA_VERSION, "step": step - 1})


def test_the_table_holds_every_position_with_its_interval(run):
    plant(run, 0, [np.array([1.0, 3.0]), np.array([3.0])])
    found = analyze.run(run)
    with open(found["table"], newline="") as file:
        rows = list(csv.DictReader(file))
    # position 0: |A| 1 and 3, mean 2, sample standard deviation √2, half width 1.96 · √2 / √2
    assert [row["tokens"] for row in rows] == ["2", "1"]
    assert float(rows[0]["abs_advantage"]) == 2.0
    assert float(rows[0]["abs_advantage_half_width"]) == pytest.approx(1.96)
    assert rows[1]["abs_advantage_half_width"] == "nan"


def test_empty_responses_and_responses_of_one_token_are_legal(run):
    plant(run, 0, [np.zeros(0), np.array([-1.0])])
    (phase,) = analyze.run(run)["summary"]["phases"]
    assert (phase["responses"], phase["tokens"]) == (2, 1)


def test_a_run_without_scores_names_the_next_command(run):
    result = invoke("analyze-position", run.path)
    assert result.code == 1
    assert "opdctl rollout" in result.err


def test_a_hostile_name_cannot_reach_the_report_as_markup(tmp_path):
    run = open_run(small_recipe("rollout.parts=1"), tmp_path / "<script>alert(1)<")
    plant(run, 0, [np.array([-1.0])])
    page = Path(analyze.run(run)["report"]).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page


def test_sums_by_hand():
    sums = Sums()
    sums.add(np.array([0, 1]), np.array([[1.0, 2.0], [0, 0], [0, 0]]))
    sums.add(np.array([0, 1, 1, 4]), np.array([[3.0, 2.0, 5.0, 7.0], [0] * 4, [0] * 4]))
    assert sums.count_P.tolist() == [2, 3, 0, 0, 1]
    assert sums.mean("abs_advantage").tolist() == [2, 3, 0, 0, 7]
    np.testing.assert_allclose(sums.share("abs_advantage"), np.array([4, 9, 0, 0, 7]) / 20)


def test_the_figure_is_a_picture(run):
    plant(run, 0, [np.linspace(-1, 0, 10)] * 3)
    (figure,) = analyze.run(run)["figures"]
    assert Path(figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
